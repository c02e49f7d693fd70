// Bytes: products of them, and how integer sums become them, to the last bit what
// program/integers.py specifies.
//
// Tensor cores multiply signed bytes: of an activation q they get q - 128, a factor, which is q
// with its highest bit turned; biases are packed accordingly (lower/gpu_int8.py). Packed matrices
// are (N, K), and so they lie in shared memory: rows of both operands are terms of the product,
// which ldmatrix brings to the lanes as pairs of bytes. Sums lie in the registers of mma as floats
// do (product.cuh). Where the rows of the right matrix are `grouped`, what a lane holds of two
// neighbouring tiles of 8 columns are four adjacent columns, a word of bytes; and of several pairs
// of tiles, by which they may be grouped too, as many words.
#pragma once

#include "product.cuh"

namespace fastscnn::cuda {

using Byte = uint8_t;

// As lower/gpu_int8.py pads them: terms of a product and channels of an activation; rows of a
// matrix.
constexpr int kTerms = 32;  // of one product of tensor cores
__host__ __device__ constexpr int padded_terms(int channels) {
  return rounded_up(channels, kTerms);
}
__host__ __device__ constexpr int padded_rows(int channels) {
  const int power = power_of_two(padded_terms(channels));
  return rounded_up(channels, power < kMostColumns ? power : kMostColumns);
}

// ---------------------------------------------------------------- sums to bytes

// float(sum) * multiplier, each rounded by itself.
__device__ __forceinline__ float scaled(int sum, float multiplier) {
  return __fmul_rn(__int2float_rn(sum), multiplier);
}

// rint(v) + zero of floats v, as integers which saturated() makes bytes of.
//
// Of floats below 2^-126 the bits are an integer, in units of 2^-149; so a product with that unit
// rounds to an integer, ties to even, and one that is negative or large stays so as a number of
// bits. Denormals must not be flushed; nvcc does not where nobody asks for it. With an even zero
// the sum with it has the same ties, and product and sum are one instruction.
class EvenRounding {
 public:
  __device__ __forceinline__ explicit EvenRounding(int zero) {
    zero_ = __fmul_rn(__int2float_rn(zero), kUnit);  // the host's compiler sees initialisers
  }

  __device__ __forceinline__ int operator()(float v) const {
    return bits_of_multiply_add(v, kUnit, zero_);
  }

 protected:
  static constexpr float kUnit = 0x1p-149f;
  float zero_;
};

class Rounding : private EvenRounding {
 public:
  using EvenRounding::EvenRounding;
  __device__ __forceinline__ int operator()(float v) const {
    return bits_of_sum(__fmul_rn(v, kUnit), zero_);
  }
};

// Calls `f` with what rounds to that zero.
template <class F>
__device__ __forceinline__ void with_rounding(int zero, F f) {
  if (zero % 2 == 0) {
    f(EvenRounding(zero));
  } else {
    f(Rounding(zero));
  }
}

// Bytes and factors of each other, four at once.
__device__ __forceinline__ uint32_t factors(uint32_t bytes) { return bytes ^ 0x80808080u; }

// Sums of four adjacent columns as a word of bytes.
template <class R>
__device__ __forceinline__ uint32_t requantised(const int4& sums, const float4& multiplier,
                                                const R& rounding) {
  return saturated(rounding(scaled(sums.x, multiplier.x)), rounding(scaled(sums.y, multiplier.y)),
                   rounding(scaled(sums.z, multiplier.z)), rounding(scaled(sums.w, multiplier.w)));
}

// Of 16 bytes in shared memory, factors in their place.
__device__ __forceinline__ void to_factors(Byte* vector) {
  uint4* const at = reinterpret_cast<uint4*>(vector);
  const uint4 v = *at;
  *at = make_uint4(factors(v.x), factors(v.y), factors(v.z), factors(v.w));
}

// ---------------------------------------------------------------- products

// The row of a matrix, grouped by Pairs of tiles, in which a column of the product lies.
template <int Pairs = 1>
__host__ __device__ constexpr int grouped(int column) {
  constexpr int kOwn = 4 * Pairs;  // a lane's
  const int within = column % (4 * kOwn);
  return column - within + within % kOwn / 2 * 8 + within / kOwn * 2 + within % 2;
}

// The first of the adjacent columns that a lane has of a product by a matrix that is grouped.
template <int Pairs = 1>
__device__ __forceinline__ int own_four() {
  return threadIdx.x % 4 * (4 * Pairs);
}

// A warp's (16 Rows, 8 Columns) of a product of bytes.
template <int Rows, int Columns>
struct Sums {
  int v[Rows][Columns][4];

  // Of the row 8 half + lane / 4 four adjacent columns of a product by a grouped matrix, in which
  // the j-th tile has an even number: 8 j + 4 (lane % 4) and the next.
  __device__ __forceinline__ int4 four(int half, int j) const {
    const int* const a = v[half / 2][j] + half % 2 * 2;
    const int* const b = v[half / 2][j + 1] + half % 2 * 2;
    return make_int4(a[0], a[1], b[0], b[1]);
  }

  // Calls `f(row, column, a, b)` for every two adjacent columns of any other product.
  template <class F>
  __device__ __forceinline__ void for_each(F f) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < Columns; ++j) {
#pragma unroll
      for (int i = 0; i < Rows; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          f(16 * i + 8 * half + lane / 4, 8 * j + 2 * (lane % 4), v[i][j][2 * half],
            v[i][j][2 * half + 1]);
        }
      }
    }
  }

  // Starts a product by a matrix that is grouped by Pairs, or by another, from `bias`, which ends
  // after `columns`; or from zero.
  template <int Pairs = 1>
  __device__ __forceinline__ void start_fours(const int* bias, int columns = 8 * Columns) {
    static_assert(Columns % (2 * Pairs) == 0);
#pragma unroll
    for (int j = 0; j < Columns; j += 2) {
      const int pair = j / 2 % Pairs, column = 8 * (j - 2 * pair) + own_four<Pairs>() + 4 * pair;
      const int4 four = column < columns ? *reinterpret_cast<const int4*>(bias + column) : int4{};
      fill(j, four.x, four.y);
      fill(j + 1, four.z, four.w);
    }
  }
  __device__ __forceinline__ void start(const int* bias, int columns = 8 * Columns) {
#pragma unroll
    for (int j = 0; j < Columns; ++j) {
      const int column = 8 * j + threadIdx.x % 4 * 2;
      const int2 two = column < columns ? *reinterpret_cast<const int2*>(bias + column) : int2{};
      fill(j, two.x, two.y);
    }
  }
  __device__ __forceinline__ void start() {
#pragma unroll
    for (int j = 0; j < Columns; ++j) fill(j, 0, 0);
  }

  // All rows of a tile of columns.
  __device__ __forceinline__ void fill(int j, int even, int odd) {
#pragma unroll
    for (int i = 0; i < Rows; ++i) {
      v[i][j][0] = v[i][j][2] = even;
      v[i][j][1] = v[i][j][3] = odd;
    }
  }
};

// A lane's 4 Pairs adjacent columns of a product by a matrix that is grouped by Pairs, to bytes.
template <int Pairs>
class Requantised {
 public:
  // `multiplier` is that of the first of them, if it `exists`.
  __device__ __forceinline__ explicit Requantised(const float* multiplier, bool exists = true) {
#pragma unroll
    for (int pair = 0; pair < Pairs; ++pair) {
      multiplier_[pair] = exists ? reinterpret_cast<const float4*>(multiplier)[pair] : float4{};
    }
  }

  // Of a row of 2 Pairs tiles the lane's first row, or the second `half` below it; or its factors.
  template <bool Factors = false, class R>
  __device__ __forceinline__ void store(Byte* to, const int (*sums)[4], int half,
                                        const R& rounding) const {
    Vector<uint32_t, Pairs> words;
#pragma unroll
    for (int pair = 0; pair < Pairs; ++pair) {
      const int *even = sums[2 * pair] + 2 * half, *odd = sums[2 * pair + 1] + 2 * half;
      const int4 four = make_int4(even[0], even[1], odd[0], odd[1]);
      const uint32_t word = requantised(four, multiplier_[pair], rounding);
      words.v[pair] = Factors ? factors(word) : word;
    }
    *reinterpret_cast<Vector<uint32_t, Pairs>*>(to) = words;
  }

 private:
  float4 multiplier_[Pairs];
};

// How many pairs of a warp's tiles of columns a matrix is best grouped by, which is copied so many
// rows at a time; 0: of an odd number of tiles none.
__host__ __device__ constexpr int pairs_of(int tiles, int rows) {
  return tiles % 2 ? 0 : tiles % 8 == 0 && rows % 64 == 0 ? 4 : tiles % 4 == 0 ? 2 : 1;
}

// What store_bytes() does with a known rounding.
template <int Pairs, bool Factors, int Pitch, class R, int Rows, int Columns>
__device__ __forceinline__ void store_rounded(const Sums<Rows, Columns>& sums,
                                              const float* multiplier, int columns,
                                              const R& rounding, Byte* to) {
  to += threadIdx.x % 32 / 4 * Pitch;
  if constexpr (Pairs != 0) {
#pragma unroll
    for (int j = 0; j < Columns; j += 2 * Pairs) {
      const int column = 8 * j + own_four<Pairs>();
      const Requantised<Pairs> requantised(multiplier + column, column < columns);
#pragma unroll
      for (int i = 0; i < 2 * Rows; ++i) {
        requantised.template store<Factors>(to + 8 * i * Pitch + column, sums.v[i / 2] + j, i % 2,
                                            rounding);
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < Columns; ++j) {
      const int column = 8 * j + threadIdx.x % 4 * 2;
      float2 by{0, 0};
      if (column < columns) by = *reinterpret_cast<const float2*>(multiplier + column);
#pragma unroll
      for (int i = 0; i < 2 * Rows; ++i) {
        const int* const two = sums.v[i / 2][j] + i % 2 * 2;
        const uint32_t word =
            saturated(rounding(scaled(two[0], by.x)), rounding(scaled(two[1], by.y)));
        *reinterpret_cast<uint16_t*>(to + 8 * i * Pitch + column) =
            uint16_t(Factors ? factors(word) : word);
      }
    }
  }
}

// The bytes, or factors, of all sums to `to`, of which the lane's warp has the first (16 Rows, 8
// Columns) in rows Pitch bytes apart, of a product by a matrix that is grouped by Pairs, or by
// another; `multiplier` ends after `columns`.
template <int Pairs, bool Factors, int Pitch, int Rows, int Columns>
__device__ __forceinline__ void store_bytes(const Sums<Rows, Columns>& sums,
                                            const float* multiplier, int columns, int zero,
                                            Byte* to) {
  with_rounding(zero, [&](const auto& rounding) {
    store_rounded<Pairs, Factors, Pitch>(sums, multiplier, columns, rounding, to);
  });
}

// The bytes of a lane's two pixels of a tile Across wide, whose first is (top, start) and whose
// others lie the dilation apart, in an image at `out`, from the lane's own column on.
template <class Product, int Across, class Place, int Columns>
__device__ __forceinline__ void store_pixels(const Sums<1, Columns>& sums, const float* multiplier,
                                             int zero, Place top, Place start, int dilation,
                                             int height, int width, Byte* out, int out_pixel) {
  const Requantised<Columns / 2> requantised(multiplier);
  with_rounding(zero, [&](const auto& rounding) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = Product::row() + 8 * half + threadIdx.x % 32 / 4;
      const Place y = top + pixel / Across * Place{dilation};
      const Place z = start + pixel % Across * Place{dilation};
      if (y >= height || z >= width) continue;
      requantised.store(out + (int64_t{y} * width + z) * out_pixel, sums.v[0], half, rounding);
    }
  });
}

// Where a lane's part of the operands of a product begins, in bytes from the matrices' first.
__device__ __forceinline__ int own_left_bytes(int pitch) {
  const int lane = threadIdx.x % 32;
  return lane % 16 * pitch + lane / 16 * 16;
}
__device__ __forceinline__ int own_right_bytes(int pitch) {
  const int lane = threadIdx.x % 32;
  return (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 16;
}

// total += left (16 Rows, Depth) right (8 Columns, Depth)^T, factors and int8 in shared memory,
// from own_left_bytes() and own_right_bytes() on. Pitches are 0 where they are known only at
// run time.
template <int Depth, int LeftPitch, int RightPitch, int Rows, int Columns>
__device__ __forceinline__ void multiply_own(Sums<Rows, Columns>& total, const Byte* left,
                                             const Byte* right, int left_pitch = LeftPitch,
                                             int right_pitch = RightPitch) {
  static_assert(Depth % kTerms == 0);
  unrolled<Depth / kTerms>([&](auto step) {
    constexpr int k = step * kTerms;
    uint32_t a[Rows][4];
    unrolled<Rows>([&](auto i) {
      constexpr int at = 16 * i * LeftPitch + k;
      load_matrices<at>(a[i], LeftPitch ? left : left + 16 * i * left_pitch);
    });
    unrolled<divided_up(Columns, 2)>([&](auto pair) {
      constexpr int j = pair * 2, at = 8 * j * RightPitch + k;
      uint32_t b[j + 1 < Columns ? 4 : 2];
      load_matrices<at>(b, RightPitch ? right : right + 8 * j * right_pitch);
#pragma unroll
      for (int i = 0; i < Rows; ++i) {
        multiply_add_bytes(total.v[i][j], a[i], b[0], b[1]);
        if constexpr (j + 1 < Columns) multiply_add_bytes(total.v[i][j + 1], a[i], b[2], b[3]);
      }
    });
  });
}

// The same from the matrices' first elements.
template <int Depth, int LeftPitch, int RightPitch, int Rows, int Columns>
__device__ __forceinline__ void multiply(Sums<Rows, Columns>& total, const Byte* left,
                                         const Byte* right) {
  multiply_own<Depth, LeftPitch, RightPitch>(total, left + own_left_bytes(LeftPitch),
                                             right + own_right_bytes(RightPitch));
}

// Copies of `rows` x `bytes` of matrices in global memory to shared memory, zeros beyond them up to
// (Rows, Bytes); a block's Threads share them. With Pairs, in the rows that grouped() says. Pitch
// is 0 where it is known only at run time.
template <int Rows, int Bytes, int Pitch, int Threads, int Pairs>
class RowCopies {
 public:
  __device__ __forceinline__ RowCopies(Byte* to, const Byte* from, int from_pitch,
                                       int to_pitch = Pitch)
      : from_pitch_(from_pitch), to_pitch_(to_pitch) {
    to_ = to + (Pairs ? grouped<Pairs ? Pairs : 1>(row()) : row()) * to_pitch + byte();
    from_ = from + int64_t{row()} * from_pitch + byte();
  }

  // Queues those of the matrix that begins `move` bytes after the first.
  __device__ __forceinline__ void queue(int64_t move, int rows, int bytes) const {
    if (Rows < kPass && row() >= Rows) return;
    const bool whole = rows >= Rows && bytes >= Bytes;  // where it is known, nothing is asked
    const Byte* from = from_ + move;
    unrolled<divided_up(Rows, kPass)>([&](auto pass) {
      constexpr int first = pass * kPass;
      if (first + kPass > Rows && row() + first >= Rows) return;
      unrolled<kSteps>([&](auto step) {
        constexpr int along = step * kLanes * kVector;
        const bool exists = whole || (row() + first < rows && byte() + along < bytes);
        async_copy_16<first * Pitch + along>(Pitch ? to_ : to_ + first * to_pitch_, from + along,
                                             exists);
      });
      from += kPass * from_pitch_;
    });
  }

 private:
  static constexpr int kVectors = Bytes / kVector, kLanes = kVectors & -kVectors;
  static constexpr int kSteps = kVectors / kLanes, kPass = Threads / kLanes;
  static_assert(Bytes % kVector == 0 && kLanes * kPass == Threads);
  static constexpr int kGroup = Pairs ? 16 * Pairs : 1;
  static_assert(kPass % kGroup == 0 && Rows % kGroup == 0);

  __device__ static __forceinline__ int row() { return threadIdx.x / kLanes; }
  __device__ static __forceinline__ int byte() { return threadIdx.x % kLanes * kVector; }

  Byte* to_;
  const Byte* from_;
  int from_pitch_, to_pitch_;
};

// Of one matrix.
template <int Rows, int Bytes, int Pitch, int Threads, int Pairs>
__device__ __forceinline__ void copy_rows(Byte* to, const Byte* from, int from_pitch, int rows,
                                          int bytes, int to_pitch = Pitch) {
  RowCopies<Rows, Bytes, Pitch, Threads, Pairs>(to, from, from_pitch, to_pitch)
      .queue(0, rows, bytes);
}

}  // namespace fastscnn::cuda
