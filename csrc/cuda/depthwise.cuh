// The depthwise 3x3 of a tile of pixels, from a halo in shared memory: a warp sums up 8 channels of
// its pixels.
//
// Of 16-bit types it is nine products on tensor cores, one a tap: 16 pixels x 8 channels, as they
// lie in the halo, by the diagonal matrix of the tap's 8 weights. So one instruction multiplies 128
// values, loads and sums need no conversion, and a pixel's neighbour costs another address. A
// diagonal matrix is zero beside its diagonal, where an infinity becomes NaN: where a NaN shows,
// the warp sums up once more, one value after the other, and what torch has finite is finite.
#pragma once

#include "product.cuh"

namespace fastscnn::cuda {

// Where a halo's pixel lies: at stride 2 even columns first, so that neighbouring outputs read
// neighbouring memory.
template <int Stride, int HaloColumns>
__host__ __device__ constexpr int slot(int row, int column) {
  if (Stride == 2) column = column / 2 + column % 2 * ((HaloColumns + 1) / 2);
  return row * HaloColumns + column;
}

// A halo of tiles of Across columns at Stride, whose slots lie Pitch elements apart.
template <int Stride, int Across, int Pitch>
struct Halo {
  static constexpr int kColumns = (Across - 1) * Stride + 3;

  // The row and column of the pixel that lies in a slot.
  __device__ static __forceinline__ int2 position(int at) {
    constexpr int kEven = (kColumns + 1) / 2;
    const int row = at / kColumns, column = at % kColumns;
    if (Stride == 1) return {row, column};
    return {row, column < kEven ? 2 * column : 2 * (column - kEven) + 1};
  }

  // In elements: where an output's window begins, and a tap from there on: known, and moved.
  __device__ __forceinline__ int window(int pixel) const {
    return slot<Stride, kColumns>(pixel / Across * Stride, pixel % Across * Stride) * Pitch;
  }
  __host__ __device__ static constexpr int known(int tap) {
    return slot<Stride, kColumns>(tap / 3, tap % 3) * Pitch;
  }
  __device__ __forceinline__ int moved(int) const { return 0; }
};

// A halo of `columns` slots a row, whose windows' taps lie `down` rows and `along` slots apart.
template <int Across, int Pitch>
struct DilatedHalo {
  int columns, down, along;

  __device__ __forceinline__ int window(int pixel) const {
    return (pixel / Across * columns + pixel % Across) * Pitch;
  }
  __host__ __device__ static constexpr int known(int) { return 0; }
  __device__ __forceinline__ int moved(int tap) const {
    return (tap / 3 * down * columns + tap % 3 * along) * Pitch;
  }
};

// Eight channels' weights of nine taps, (9, pitch) float in global memory, as a lane needs them.
template <class T>
class Filter {
 public:
  // What of the weights the lane begins with.
  __device__ static __forceinline__ const float* own(const float* weight) {
    return weight + (sizeof(T) == 2 ? threadIdx.x % 32 / 4 : threadIdx.x % 4 * 2);
  }

  __device__ __forceinline__ Filter(const float* own, int pitch) : from_(own), pitch_(pitch) {
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int tap = 0; tap < 9; ++tap, own += pitch) own_[tap] = *own;
    }
  }

  // Which bits of the lane's part of a diagonal matrix are not zero.
  __device__ static __forceinline__ int mask() {
    const int lane = threadIdx.x % 32, channel = lane / 4;
    const uint32_t half = channel % 2 ? 0xffff0000u : 0xffffu;
    return int(lane % 4 == channel / 2 ? half : 0);
  }

  // The lane's part of the diagonal matrix.
  __device__ __forceinline__ uint32_t diagonal(int tap, int mask) const {
    const auto twice = packed({own_[tap], own_[tap]}, T{});
    uint32_t bits;
    std::memcpy(&bits, static_cast<const void*>(&twice), sizeof bits);
    return bits & uint32_t(mask);
  }

  // Of the two channels whose sums the lane has; rounded as the diagonal is.
  __device__ __forceinline__ float2 pair(int tap) const {
    const int moved = sizeof(T) == 2 ? threadIdx.x % 4 * 2 - int(threadIdx.x % 32 / 4) : 0;
    return unpacked(packed(load_pair(from_ + tap * pitch_ + moved), T{}));
  }

 private:
  const float* from_;
  int pitch_;
  float own_[9];
};

// The sums of a warp's 16 Rows pixels from `first` on, of which a lane knows its part. With
// KeepsWindows it computes where its windows begin once, else the compiler may do it for each
// chunk.
template <int Rows, int LeftPitch, bool KeepsWindows, class T, class Halo>
class Depthwise {
 public:
  __device__ __forceinline__ Depthwise(const Halo& halo, int first) : halo_(halo), first_(first) {
    if constexpr (sizeof(T) == 2) {
      static_assert(Rows % 2 == 0);
      const int lane = threadIdx.x % 32;
      mask_ = kept(Filter<T>::mask());
      left_ = kept((first + lane / 4) * LeftPitch + lane % 4 * 2);
#pragma unroll
      for (int i = 0; i < Rows / 2; ++i) {
        const int window = halo.window(first + 32 * i + lane);
        windows_[i] = KeepsWindows ? kept(window) : window;
      }
    }
  }

  // To `left`; `memory`, in which the halo is, `left` and `bias` at the first of the 8 channels.
  // `left` may be the halo: what another warp reads is not written to.
  __device__ __forceinline__ void operator()(const T* memory, T* left, const Filter<T>& filter,
                                             const float* bias, const Clamp<T>& clamp) const {
    Accumulator<Rows, 1> sums;
    const auto one_by_one = [&] {
      constexpr int kUnrolled = sizeof(T) == 2 ? 1 : 3;  // where it is rare it takes few registers
      sums.start(bias);
#pragma unroll kUnrolled
      for (int tap = 0; tap < 9; ++tap) {
        const T* const at = memory + Halo::known(tap) + halo_.moved(tap);
        const float2 weight = filter.pair(tap);
        sums.for_each([&](int row, int column, float2& pair) {
          pair = multiply_add(load_pair(at + halo_.window(first_ + row) + column), weight, pair);
        });
      }
    };
    if constexpr (sizeof(T) == 2) {
      sums.start(bias);
      unrolled<9>([&](auto tap) {
        const uint32_t diagonal = filter.diagonal(tap, mask_);
#pragma unroll
        for (int i = 0; i < Rows / 2; ++i) {
          uint32_t a[4];
          load_matrices<Halo::known(tap) * int(sizeof(T))>(a,
                                                           memory + windows_[i] + halo_.moved(tap));
          multiply_add<T>(sums.v[2 * i][0], a[0], a[1], diagonal);
          multiply_add<T>(sums.v[2 * i + 1][0], a[2], a[3], diagonal);
        }
      });
      float none = 0;
      sums.for_each([&](int, int, float2& pair) { none = fmaf(pair.x, 0, fmaf(pair.y, 0, none)); });
      if (any_of_warp(none != 0)) one_by_one();
      sync_warp();
      const int lane = threadIdx.x % 32;
      sums.for_each([&](int row, int, float2& pair) {
        put(left + left_ + (row - lane / 4) * LeftPitch, clamp(pair));
      });
    } else {
      one_by_one();
      sync_warp();
      sums.for_each([&](int row, int column, float2& pair) {
        put(left + (first_ + row) * LeftPitch + column, clamp(pair));
      });
    }
  }

 private:
  Halo halo_;
  int first_;
  // In elements where the lane's rows of the windows begin, and its sums; its diagonals' bits.
  int windows_[(Rows + 1) / 2], left_, mask_;
};

// Zeros in place of sums: of channels that do not exist.
template <int Rows, int Pitch, class T>
__device__ __forceinline__ void clear(T* left) {
  Accumulator<Rows, 1> none;
  none.for_each(
      [&](int row, int column, float2&) { put(left + row * Pitch + column, packed({0, 0}, T{})); });
}

}  // namespace fastscnn::cuda
