// Matrix products of operands in shared memory, a tile a warp: tensor cores for 16-bit types, FFMA
// for float.
//
// Both accumulate in the layout of mma.sync, so that what follows a product is the same for all
// types: of a tile of 16 rows and 8 columns, a lane holds the columns 2 (lane % 4) and the next, of
// rows lane / 4 and that + 8.
#pragma once

#include "elements.cuh"

namespace fastscnn::cuda {

// Elements from a row of a shared matrix to the next: 16 bytes more than a row of `columns` (a
// multiple of 16), so that eight rows' vectors lie in different banks.
template <class T>
__host__ __device__ constexpr int pitch(int columns) {
  return columns + kPerVector<T>;
}

// A warp's (16 Rows, 8 Columns) of a product.
template <int Rows, int Columns>
struct Accumulator {
  float v[Rows][Columns][4];

  // Calls `f(row, column, pair)` for every two adjacent columns that the lane holds; `pair` may be
  // written to.
  template <class F>
  __device__ __forceinline__ void for_each(F f) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < Rows; ++i) {
#pragma unroll
      for (int j = 0; j < Columns; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float2 pair{v[i][j][2 * half], v[i][j][2 * half + 1]};
          f(16 * i + 8 * half + lane / 4, 8 * j + 2 * (lane % 4), pair);
          v[i][j][2 * half] = pair.x;
          v[i][j][2 * half + 1] = pair.y;
        }
      }
    }
  }

  // Starts from `bias`, one value a column, or from zero.
  __device__ __forceinline__ void start(const float* bias) {
    for_each([&](int, int column, float2& pair) { pair = load_pair(bias + column); });
  }
  // The same of a bias that ends after `columns`.
  __device__ __forceinline__ void start(const float* bias, int columns) {
    for_each([&](int, int column, float2& pair) {
      pair = column < columns ? load_pair(bias + column) : float2{0, 0};
    });
  }
  __device__ __forceinline__ void start() {
    for_each([](int, int, float2& pair) { pair = {0, 0}; });
  }
};

// total += left (16 Rows, Depth) right (Depth, 8 Columns), both row-major in shared memory.
template <int Depth, class T, int Rows, int Columns>
__device__ __forceinline__ void multiply(Accumulator<Rows, Columns>& total, const T* left,
                                         int left_pitch, const T* right, int right_pitch) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    static_assert(Depth % 16 == 0 && Columns % 2 == 0);
    left += lane % 16 * left_pitch + lane / 16 * 8;
    right += lane % 16 * right_pitch + lane / 16 * 8;
// More at a time would cost registers.
#pragma unroll 4
    for (int k = 0; k < Depth; k += 16) {
      uint32_t a[Rows][4];
#pragma unroll
      for (int i = 0; i < Rows; ++i) load_matrices(a[i], left + 16 * i * left_pitch + k);
#pragma unroll
      for (int j = 0; j < Columns; j += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, right + k * right_pitch + 8 * j);
#pragma unroll
        for (int i = 0; i < Rows; ++i) {
          multiply_add<T>(total.v[i][j], a[i], b[0], b[1]);
          multiply_add<T>(total.v[i][j + 1], a[i], b[2], b[3]);
        }
      }
    }
  } else {
    left += lane / 4 * left_pitch;
    right += lane % 4 * 2;
#pragma unroll 1
    for (int k = 0; k < Depth; k += 2) {
      float2 a[Rows][2];
#pragma unroll
      for (int i = 0; i < Rows; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          a[i][half] = load_pair(left + (16 * i + 8 * half) * left_pitch + k);
        }
      }
#pragma unroll
      for (int within = 0; within < 2; ++within) {
#pragma unroll
        for (int j = 0; j < Columns; ++j) {
          const float2 b = load_pair(right + (k + within) * right_pitch + 8 * j);
#pragma unroll
          for (int i = 0; i < Rows; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const float one = within ? a[i][half].y : a[i][half].x;
              total.v[i][j][2 * half] = fmaf(one, b.x, total.v[i][j][2 * half]);
              total.v[i][j][2 * half + 1] = fmaf(one, b.y, total.v[i][j][2 * half + 1]);
            }
          }
        }
      }
    }
  }
}

// How a block's `Warps` share a product of (Pixels, Columns): tiles of 16 rows and 8 columns of
// each.
template <int Pixels, int Columns, int Warps>
struct Shares {
  static constexpr int kNeeded = Warps * 16 / Pixels;
  static constexpr int kAcross = Columns >= 64 && kNeeded < 2 ? 2 : kNeeded ? kNeeded : 1;  // warps
  static constexpr int kRows = Pixels * kAcross / (16 * Warps);
  static constexpr int kColumns = Columns / (8 * kAcross);
  static_assert(kRows * 16 * Warps == Pixels * kAcross && kColumns % 2 == 0);
  using Tile = Accumulator<kRows, kColumns>;

  __device__ static int row() { return threadIdx.x / 32 / kAcross * kRows * 16; }
  __device__ static int column() { return threadIdx.x / 32 % kAcross * kColumns * 8; }
};

// Queues copies of `rows` x `columns` of a matrix in global memory to shared memory, zeros beyond
// them up to (all_rows, Columns); a block's Threads share them.
template <int Columns, int Threads, class T>
__device__ __forceinline__ void copy_matrix(int all_rows, T* to, int to_pitch, const T* from,
                                            int64_t from_pitch, int rows, int columns) {
  constexpr int kAcross = Columns / kPerVector<T>;
#pragma unroll 1
  for (int i = threadIdx.x; i < all_rows * kAcross; i += Threads) {
    const int row = i / kAcross, column = i % kAcross * kPerVector<T>;
    const bool exists = row < rows && column < columns;
    async_copy_16(to + row * to_pitch + column, exists ? from + row * from_pitch + column : from,
                  exists);
  }
}

}  // namespace fastscnn::cuda
