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
    if (columns >= 8 * Columns) return start(bias);
    for_each([&](int, int column, float2& pair) {
      pair = column < columns ? load_pair(bias + column) : float2{0, 0};
    });
  }
  __device__ __forceinline__ void start() {
    for_each([](int, int, float2& pair) { pair = {0, 0}; });
  }

  // Zeros from the column on.
  __device__ __forceinline__ void keep_columns(int columns) {
    for_each([&](int, int column, float2& pair) {
      if (column >= columns) pair.x = 0;
      if (column + 1 >= columns) pair.y = 0;
    });
  }
};

// Where a lane's part of the operands of a product begins, in elements from the matrices' first.
template <class T>
__device__ __forceinline__ int own_left(int pitch) {
  const int lane = threadIdx.x % 32;
  return sizeof(T) == 2 ? lane % 16 * pitch + lane / 16 * 8 : lane / 4 * pitch;
}
template <class T>
__device__ __forceinline__ int own_right(int pitch) {
  const int lane = threadIdx.x % 32;
  return sizeof(T) == 2 ? lane % 16 * pitch + lane / 16 * 8 : lane % 4 * 2;
}

// total += left (16 Rows, Depth) right (Depth, 8 Columns), both row-major in shared memory, from
// own_left() and own_right() on. LeftPitch is 0 where it is known only at run time.
template <int Depth, int LeftPitch, int RightPitch, class T, int Rows, int Columns>
__device__ __forceinline__ void multiply_own(Accumulator<Rows, Columns>& total, const T* left,
                                             const T* right, int left_pitch = LeftPitch) {
  if constexpr (sizeof(T) == 2) {
    static_assert(Depth % 16 == 0);
    unrolled<Depth / 16>([&](auto step) {
      constexpr int k = step * 16;
      uint32_t a[Rows][4];
      unrolled<Rows>([&](auto i) {
        constexpr int at = (16 * i * LeftPitch + k) * int(sizeof(T));
        load_matrices<at>(a[i], LeftPitch ? left : left + 16 * i * left_pitch);
      });
      unrolled<divided_up(Columns, 2)>([&](auto pair) {
        constexpr int j = pair * 2, at = (k * RightPitch + 8 * j) * int(sizeof(T));
        uint32_t b[j + 1 < Columns ? 4 : 2];
        load_matrices_transposed<at>(b, right);
#pragma unroll
        for (int i = 0; i < Rows; ++i) {
          multiply_add<T>(total.v[i][j], a[i], b[0], b[1]);
          if constexpr (j + 1 < Columns) multiply_add<T>(total.v[i][j + 1], a[i], b[2], b[3]);
        }
      });
    });
  } else {
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
          const float2 b = load_pair(right + (k + within) * RightPitch + 8 * j);
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

// The same from the matrices' first elements.
template <int Depth, int LeftPitch, int RightPitch, class T, int Rows, int Columns>
__device__ __forceinline__ void multiply(Accumulator<Rows, Columns>& total, const T* left,
                                         const T* right) {
  multiply_own<Depth, LeftPitch, RightPitch>(total, left + own_left<T>(LeftPitch),
                                             right + own_right<T>(RightPitch));
}

// How a block's `Warps` share a product of (Pixels, Columns): tiles of 16 rows and 8 columns of
// each.
template <int Pixels, int Columns, int Warps>
struct Shares {
  static constexpr int kNeeded = Warps * 16 / Pixels;
  static constexpr int kAcross = Columns >= 64 && kNeeded < 2 ? 2 : kNeeded ? kNeeded : 1;  // warps
  static constexpr int kRows = Pixels * kAcross / (16 * Warps);
  static constexpr int kColumns = Columns / (8 * kAcross);
  static_assert(kRows * 16 * Warps == Pixels * kAcross && kColumns * 8 * kAcross == Columns);
  using Tile = Accumulator<kRows, kColumns>;

  __device__ static int row() { return threadIdx.x / 32 / kAcross * kRows * 16; }
  __device__ static int column() { return threadIdx.x / 32 % kAcross * kColumns * 8; }
};

// Calls `f` with how many output channels a block of a kernel for any number of them computes: the
// fewest of a few that need no more blocks than 128 would.
template <class F>
void with_columns(int channels, F&& f) {
  const int own = divided_up(channels, divided_up(channels, kMostColumns));
  if (own <= 32) return f(Constant<32>{});
  if (own <= 64) return f(Constant<64>{});
  if (own <= 96) return f(Constant<96>{});
  f(Constant<128>{});
}

// A thread's share of what a block's Threads copy of a matrix of (rows, columns) in global memory
// to shared memory, (Rows, Columns) at a time and zeros beyond it; with Whole no row is beyond.
template <bool Whole, int Rows, int Columns, int Pitch, int Threads, class T>
class Copies {
 public:
  __device__ __forceinline__ Copies(T* to, const T* from, int from_pitch, int rows, int columns)
      : to_(kept_at(to, row() * Pitch + column())),
        from_(from + int64_t{row()} * from_pitch + column()),
        pitch_(from_pitch),
        left_(column() >= columns ? 0
              : Whole             ? Rows
                                  : rows - row()) {}

  // Queues the copies of the next Rows rows.
  __device__ __forceinline__ void queue() {
    const bool exists = left_ > 0;
    if (Rows >= kPass || row() < Rows) {
      const T* from = from_;
      unrolled<divided_up(Rows, kPass)>([&](auto pass) {
        constexpr int first = pass * kPass;
        if (first + kPass > Rows && row() + first >= Rows) return;
        async_copy_16<first * Pitch* int(sizeof(T))>(to_, from, Whole ? exists : first < left_);
        from += kPass * pitch_;
      });
    }
    from_ += int64_t{Rows} * pitch_;
    if (!Whole) left_ -= Rows;
  }
  // The same; those of the next call go to the rows below.
  __device__ __forceinline__ void queue_below() {
    queue();
    to_ += Rows * Pitch;
  }

  // What is copied next is `rows` further down and `columns` to the right, and goes to `to`
  // elements further on.
  __device__ __forceinline__ void move(int rows, int columns, int to) {
    to_ += to;
    from_ += int64_t{rows} * pitch_ + columns;
    if (!Whole) left_ -= rows;
  }

 private:
  static constexpr int kAcross = Columns / kPerVector<T>, kPass = Threads / kAcross;
  static_assert(kAcross * kPass == Threads);
  __device__ static int row() { return threadIdx.x / kAcross; }
  __device__ static int column() { return threadIdx.x % kAcross * kPerVector<T>; }

  T* to_;
  const T* from_;
  int pitch_, left_;
};

// The first (Rows, Columns) alone.
template <int Rows, int Columns, int Pitch, int Threads, class T>
__device__ __forceinline__ void copy_matrix(T* to, const T* from, int from_pitch, int rows,
                                            int columns) {
  constexpr int kAcross = Columns / kPerVector<T>, kPass = Threads / kAcross;
  static_assert(kAcross * kPass == Threads);
  const int row = threadIdx.x / kAcross, column = threadIdx.x % kAcross * kPerVector<T>;
  if (Rows < kPass && row >= Rows) return;
  const bool whole = rows >= Rows && columns >= Columns;  // where it is known, nothing is asked
  const int left = column < columns ? rows - row : 0;
  to += row * Pitch + column;
  from += int64_t{row} * from_pitch + column;
  unrolled<divided_up(Rows, kPass)>([&](auto pass) {
    constexpr int first = pass * kPass;
    if (first + kPass > Rows && row + first >= Rows) return;
    async_copy_16<first * Pitch* int(sizeof(T))>(to, from, whole || first < left);
    from += kPass * from_pitch;
  });
}

// Stores a tile of (Rows Across) pixels, of Columns channels each, to rows of `out`, 16 bytes at a
// time: what lies before row `rows`, column `columns` and channel `channels`.
template <int Rows, int Across, int Columns, int Pitch, int Threads, class T>
__device__ __forceinline__ void store_tile(T* out, const T* tile, int64_t out_row, int out_pixel,
                                           int rows, int columns, int channels) {
  constexpr int kVectors = Columns / kPerVector<T>, kPass = Threads / kVectors;
  static_assert(kPass * kVectors == Threads && (kPass % Across == 0 || Across % kPass == 0));
  const int pixel = threadIdx.x / kVectors, channel = threadIdx.x % kVectors * kPerVector<T>;
  const int row = pixel / Across, column = pixel % Across;
  if (channel >= channels) return;
  tile += pixel * Pitch + channel;
  out += row * out_row + int64_t{column} * out_pixel + channel;
#pragma unroll
  for (int first = 0; first < Rows * Across; first += kPass) {
    const int down = first / Across, along = first % Across;
    if (kPass > Rows * Across && row >= Rows) return;
    if (row + down < rows && column + along < columns) {
      copy_16(out + down * out_row + int64_t{along} * out_pixel, tile + first * Pitch);
    }
  }
}

}  // namespace fastscnn::cuda
