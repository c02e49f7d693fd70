// What an instruction set provides: one table of the fused ops and the whole network.
#pragma once
#include <cstddef>
#include <cstdint>

#include "layer.h"

namespace fastscnn {

// A picture batch (N, C, H, W) with any strides, in elements; float, or raw uint8 to be normalised.
struct Picture {
  const void* data;
  bool raw;
  int n, c, h, w;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

// A dense channels-last activation: (h, w, padded(channels)) floats of one image.
struct Plane {
  float* data;
  int h, w;
};

// The threads that share one image; `barrier` is null for a team of one.
struct Team {
  int rank, size;
  void (*barrier)();
  void wait() const {
    if (size > 1) barrier();
  }
};

struct TrainingKernels;  // training.h

// Hands out 64-byte aligned pieces of a buffer. With base null it only measures.
struct Bump {
  char* base = nullptr;
  size_t used = 0;
  bool measuring() const { return base == nullptr; }
  template <class T>
  T* take(size_t n) {
    T* p = reinterpret_cast<T*>(base + used);
    used += (n * sizeof(T) + 63) / 64 * 64;
    return base ? p : nullptr;
  }
};

// One image through one op. `scratch` is this thread's own, `shared` the team's. Each returns the
// bytes of scratch that it needs, and only that where scratch is measuring. Results go to (h', w',
// padded(channels)) floats, of upsample_classify and network to (K, H, W) or (H, W).
struct Kernels {
  const char* name;
  const TrainingKernels* training;
  size_t (*stem_conv)(const Layer&, const Weights&, const Picture&, int image, Plane out,
                      const Team&, Bump scratch);
  size_t (*dsconv)(const Layer&, const Weights&, Plane x, Plane out, const Team&, Bump scratch);
  size_t (*inverted_residual)(const Layer&, const Weights&, Plane x, Plane out, const Team&,
                              Bump scratch);
  // `grids` holds pyramid_floats(layer) floats, shared by the team.
  size_t (*pyramid_pooling)(const Layer&, const Weights&, Plane x, float* grids, Plane out,
                            const Team&, Bump scratch);
  // `refined` is shared and has the low branch's size; only used where the layer is dense.
  size_t (*feature_fusion)(const Layer&, const Weights&, Plane high, Plane low, Plane refined,
                           Plane out, const Team&, Bump scratch);
  // `shared` is the team's buffer, whose size comes back in shared_bytes.
  size_t (*upsample_classify)(const Layer&, Plane x, Output, void* out, int h, int w, const Team&,
                              Bump shared, size_t* shared_bytes, Bump scratch);
  size_t (*network)(const Layer*, const Weights*, int layers, const Picture&, int image, Output,
                    void* out, const Team&, Bump shared, size_t* shared_bytes, Bump scratch);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// Pooled inputs, branch values and their products of a pyramid_pooling, for all its bins.
inline size_t pyramid_floats(const Layer& l) {
  size_t cells = 0;
  for (int b = 0; b < l.bin_count; b++) cells += size_t(l.bins[b]) * l.bins[b];
  return cells * (padded(l.in) + padded(l.mid) + padded(l.out));
}

}  // namespace fastscnn
