// What inverted_residual.cu and its counterpart in int8 share: which arguments they take, and how
// they cut a call's work.
#pragma once

#include "arguments.cuh"
#include "slices.cuh"

namespace fastscnn::cuda {

// The tiles, column blocks and slices of a call, for the Sizes that it runs with.
struct Cut {
  int64_t tiles_down, tiles_across, column_blocks;
  int chunks, slice_chunks, slices;

  template <class S, class Op>
  Cut(S, const Op& op, int wanted)
      : tiles_down(divided_up(op.out_height, S::kRows)),
        tiles_across(divided_up(op.out_width, S::kAcross)),
        column_blocks(divided_up(op.out_channels, S::kColumns)),
        chunks(divided_up(op.mid_channels, S::kChunk)),
        slice_chunks(divided_up(chunks, wanted)),
        slices(divided_up(chunks, slice_chunks)) {}

  int64_t tiles(int64_t images) const { return images * tiles_down * tiles_across * column_blocks; }
};

// Refuses arguments that do not say how large the result is, or how it is computed.
template <class Op>
void require_sizes(const Arguments& rules, const Op& op) {
  require(op.stride == 1 || op.stride == 2, "stride must be 1 or 2", op.stride);
  rules.channels("in_channels", op.in_channels);
  rules.channels("mid_channels", op.mid_channels);
  rules.channels("out_channels", op.out_channels);
  rules.side("height", op.height, op.out_height, op.stride, 1, 1);
  rules.side("width", op.width, op.out_width, op.stride, 1, 1);
  require(!op.residual || op.stride == 1, "stride must be 1 with residual", op.stride);
  require(!op.residual || op.in_channels == op.out_channels,
          "out_channels must be in_channels with residual", op.out_channels);
}

// Refuses what the slices of a call may be, and where their sums meet.
template <class Op>
void check_slices(const Arguments& rules, const Op& op) {
  rules.at_least(1, "slices", op.slices);
  if (op.slices < 2) return;
  rules.aligned("partials", op.partials);
  rules.aligned("counters", op.counters);
}

// What the C interface says of a call's slices and their scratch: `with_sizes(f)` refuses a call,
// or calls `f` with the Sizes that it runs with.
template <class Op, class WithSizes>
int slices_of(const Op& op, int processors, WithSizes&& with_sizes) {
  int best = 0;
  status_of([&] {  // the op says what is wrong
    require(processors >= 1, "processors must be at least 1", processors);
    with_sizes([&](auto sizes) {
      const Cut whole(sizes, op, 1);
      best = fewest_instructions(whole.tiles(op.images), whole.chunks, processors, sizes.kCounted);
    });
  });
  return best;
}

template <class Op, class WithSizes>
void scratch_of(const Op& op, size_t* partials, size_t* counters, WithSizes&& with_sizes) {
  *partials = *counters = 0;
  status_of([&] {
    if (op.slices < 2) return;
    with_sizes([&](auto sizes) {
      const Cut cut(sizes, op, op.slices);
      const size_t tiles = cut.tiles(op.images);
      if (cut.slices < 2) return;
      *partials = tiles * cut.slices * sizes.kPixels * sizes.kColumns * sizeof(float);
      *counters = tiles * sizeof(int32_t);
    });
  });
}

// Copies x's pixels (y, z) and so on of a tile to `result`, for what is added to them; of their
// channels as many as S has columns, `channels` of which exist. x: the image, from the first of
// these channels on. A thread waits for its own copies; `act` is what it does with each then.
template <class S, int Threads, class T, class F>
__device__ __forceinline__ void copy_addend(T* result, const T* x, int x_pixel, int y, int z,
                                            int height, int width, int channels, F act) {
  constexpr int kVectors = S::kColumns / kPerVector<T>;
  const auto each = [&](auto f) {
#pragma unroll 1
    for (int i = threadIdx.x; i < S::kPixels * kVectors; i += Threads) {
      const int pixel = i / kVectors, column = i % kVectors * kPerVector<T>;
      f(result + pixel * S::kRowPitch + column, y + pixel / S::kAcross, z + pixel % S::kAcross,
        column);
    }
  };
  each([&](T* to, int own_y, int own_z, int column) {
    const bool exists = own_y < height && own_z < width && column < channels;
    async_copy_16(to, exists ? x + (int64_t{own_y} * width + own_z) * x_pixel + column : x, exists);
  });
  async_commit();
  async_wait<0>();
  each([&](T* to, int, int, int) { act(to); });
  __syncthreads();
}

}  // namespace fastscnn::cuda
