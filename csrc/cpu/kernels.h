// What an instruction set provides: for each arithmetic one table of the fused ops and the whole
// network.
#pragma once
#include <cstddef>
#include <cstdint>

#include "bf16.h"
#include "layer.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace fastscnn {

// A picture batch (N, C, H, W) with any strides, in elements: of the network's own type, floats to
// be rounded to that (int8: to become pixels), or raw uint8 to be normalised (int8: as they are).
struct Picture {
  const void* data;
  Type type;
  int n, c, h, w;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

// A dense channels-last activation: (h, w, pixel_pitch(channels)) elements of one image.
struct Plane {
  void* data;
  int h, w;
};

// The rows of the current stage that a thread has yet to do; as one word, so that the thread and
// those that take over some of its rows agree without locks: stage (16 bits), begin, end (24 each).
struct alignas(64) Share {
  uint64_t rows;
};
constexpr int kMostRows = 1 << 24;

// The threads that work on one image; `barrier` is null for a team of one.
struct Team {
  int rank, size;
  void (*barrier)();
  Share* shares = nullptr;     // [size]
  mutable unsigned stage = 0;  // how many stages have begun
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
    char* p = base ? base + used : nullptr;
    const size_t bytes = whole_lines(n * sizeof(T));
    used += bytes;
#if defined(__SANITIZE_ADDRESS__)  // a line that nobody may touch follows each piece
    if (p) {
      __asan_unpoison_memory_region(p, bytes);
      __asan_poison_memory_region(p + bytes, kLine);
    }
    used += kLine;
#endif
    return reinterpret_cast<T*>(p);
  }
};

// One branch of pyramid_pooling: grids of bins x bins cells.
struct Branch {
  int bins;
  void *pooled, *value;  // in and mid channels, elements
  float* product;        // out channels
};
inline void place_branches(const Layer& l, Type type, Bump& shared, Branch* branches) {
  auto grid = [&](int b, int channels, size_t bytes) {
    return shared.take<char>(size_t(l.bins[b]) * l.bins[b] * pixel_pitch(channels, type) * bytes);
  };
  for (int b = 0; b < l.bin_count; b++) {
    branches[b].bins = l.bins[b];
    branches[b].pooled = grid(b, l.in, bytes_of(type));
    branches[b].value = grid(b, l.mid, bytes_of(type));
    branches[b].product = reinterpret_cast<float*>(grid(b, l.out, sizeof(float)));
  }
}

// `block` counts the stages of one name; -1 where there is one.
using Reached = void(const char* stage, int block);

// One image through one op. `scratch` is this thread's own, `shared` the team's. Each returns the
// bytes of scratch that it needs, and only that where scratch is measuring. Results go to (h', w',
// pixel_pitch(channels)) elements, of upsample_classify and network to (K, H, W) or (H, W).
struct Ops {
  // Null in an arithmetic whose networks compute this op in another (kRecords): the stem of `high`,
  // whose products are too short for taking them apart to pay, and the last resize of int8.
  size_t (*stem_conv)(const Layer&, const Weights&, const Picture&, int image, Plane out,
                      const Team&, Bump scratch);
  size_t (*dsconv)(const Layer&, const Weights&, Plane x, Plane out, const Team&, Bump scratch);
  size_t (*inverted_residual)(const Layer&, const Weights&, Plane x, Plane out, const Team&,
                              Bump scratch);
  // `branches` is shared by the team: place_branches.
  size_t (*pyramid_pooling)(const Layer&, const Weights&, Plane x, const Branch* branches,
                            Plane out, const Team&, Bump scratch);
  // `refined` is shared and has the low branch's size; only used where the layer is dense.
  size_t (*feature_fusion)(const Layer&, const Weights&, Plane high, Plane low, Plane refined,
                           Plane out, const Team&, Bump scratch);
  // `shared` is the team's buffer, whose size comes back in shared_bytes. `reached`, where not
  // null, is told of the end of each of the network's stages by the first thread.
  size_t (*upsample_classify)(const Layer&, Plane x, Output, void* out, int h, int w, const Team&,
                              Bump scratch);
  size_t (*network)(const Chain&, const Picture&, int image, Output, void* out, const Team&,
                    Reached* reached, Bump shared, size_t* shared_bytes, Bump scratch);
  // The fastest loop of the arithmetic's products, in registers alone: the roof. Returns the
  // floating-point operations done.
  double (*roof)(int64_t iterations);
};

// Null where an instruction set has no kernels of its own: the next lower one's are as good.
struct Kernels {
  const char* name;
  const Ops* ops[kArithmetics];
  const TrainingKernels* training;
};

// Older compilers lack the instructions for bf16 and tiles.
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define FASTSCNN_KNOWS_BF16 1
#else
#define FASTSCNN_KNOWS_BF16 0
#endif

#define FASTSCNN_KNOWS_VNNI FASTSCNN_KNOWS_BF16  // compilers of the same age

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif
#if FASTSCNN_KNOWS_VNNI
extern const Kernels kAvxVnni;
extern const Kernels kAvx512Vnni;
#endif
#if FASTSCNN_KNOWS_BF16
extern const Kernels kAvx512Bf16;
extern const Kernels kAmx;
#endif

}  // namespace fastscnn
