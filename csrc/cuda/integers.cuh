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
// Of floats below 2^-126 the bits are an integer, in units of 2^-149; so the product with that unit
// rounds to an integer, ties to even, and one that is negative or large stays so as a number of
// bits. Denormals must not be flushed; nvcc does not where nobody asks for it.
class Rounding {
 public:
  __device__ __forceinline__ explicit Rounding(int zero)
      : zero_(__fmul_rn(__int2float_rn(zero), kUnit)) {}

  __device__ __forceinline__ int operator()(float v) const {
    return __float_as_int(__fadd_rn(__fmul_rn(v, kUnit), zero_));
  }

 private:
  static constexpr float kUnit = 0x1p-149f;
  float zero_;
};

// Bytes and factors of each other, four at once.
__device__ __forceinline__ uint32_t factors(uint32_t bytes) { return bytes ^ 0x80808080u; }

// Sums of four adjacent columns as a word of bytes.
__device__ __forceinline__ uint32_t requantised(const int4& sums, const float4& multiplier,
                                                const Rounding& rounding) {
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
  // `multiplier` is that of the first of them.
  __device__ __forceinline__ Requantised(const float* multiplier, int zero) : rounding_(zero) {
#pragma unroll
    for (int pair = 0; pair < Pairs; ++pair) {
      multiplier_[pair] = reinterpret_cast<const float4*>(multiplier)[pair];
    }
  }

  // Of a row of tiles the lane's first row, or the second `half` below it.
  __device__ __forceinline__ void store(Byte* to, const int (&sums)[2 * Pairs][4], int half) const {
    Vector<uint32_t, Pairs> words;
#pragma unroll
    for (int pair = 0; pair < Pairs; ++pair) {
      const int (&even)[4] = sums[2 * pair], (&odd)[4] = sums[2 * pair + 1];
      const int four[4]{even[2 * half], even[2 * half + 1], odd[2 * half], odd[2 * half + 1]};
      words.v[pair] = requantised(four, multiplier_[pair], rounding_);
    }
    *reinterpret_cast<Vector<uint32_t, Pairs>*>(to) = words;
  }

 private:
  float4 multiplier_[Pairs];
  Rounding rounding_;
};

// Of one value a column, the lane's four from `column` on of a product by a grouped matrix.
__device__ __forceinline__ float4 load_four(const float* values, int column) {
  return *reinterpret_cast<const float4*>(values + column + threadIdx.x % 4 * 4);
}

// The bytes, or factors, of all sums to `to`, of which the lane's warp has the first (16 Rows, 8
// Columns) in rows Pitch bytes apart; `multiplier` ends after `columns`.
template <bool Grouped, bool Factors, int Pitch, int Rows, int Columns>
__device__ __forceinline__ void store_bytes(const Sums<Rows, Columns>& sums,
                                            const float* multiplier, int columns,
                                            const Rounding& rounding, Byte* to) {
  constexpr int kWord = Grouped ? 4 : 2;  // adjacent columns of a lane
  to += threadIdx.x % 32 / 4 * Pitch;
#pragma unroll
  for (int j = 0; j < Columns; j += kWord / 2) {
    const int column = 8 * j + threadIdx.x % 4 * kWord;
    Vector<float, kWord> by{};
    if (column < columns) by = *reinterpret_cast<const Vector<float, kWord>*>(multiplier + column);
#pragma unroll
    for (int i = 0; i < 2 * Rows; ++i) {
      int q[kWord];
#pragma unroll
      for (int k = 0; k < kWord; ++k) {
        q[k] = rounding(scaled(sums.v[i / 2][j + k / 2][i % 2 * 2 + k % 2], by.v[k]));
      }
      Byte* const at = to + 8 * i * Pitch + column;
      if constexpr (Grouped) {
        const uint32_t word = saturated(q[0], q[1], q[2], q[3]);
        *reinterpret_cast<uint32_t*>(at) = Factors ? factors(word) : word;
      } else {
        const uint32_t word = saturated(q[0], q[1]);
        *reinterpret_cast<uint16_t*>(at) = uint16_t(Factors ? factors(word) : word);
      }
    }
  }
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

// Queues copies of `rows` x `bytes` of a matrix in global memory to shared memory, zeros beyond
// them up to (Rows, Bytes); a block's Threads share them. With Pairs, in the rows that grouped()
// says. Pitch is 0 where it is known only at run time.
template <int Rows, int Bytes, int Pitch, int Threads, int Pairs>
__device__ __forceinline__ void copy_rows(Byte* to, const Byte* from, int from_pitch, int rows,
                                          int bytes, int to_pitch = Pitch) {
  constexpr int kVectors = Bytes / kVector, kLanes = kVectors & -kVectors;
  constexpr int kSteps = kVectors / kLanes, kPass = Threads / kLanes;
  static_assert(Bytes % kVector == 0 && kLanes * kPass == Threads);
  static_assert(Pairs == 0 || (kPass % (16 * Pairs) == 0 && Rows % (16 * Pairs) == 0));
  const int row = threadIdx.x / kLanes, byte = threadIdx.x % kLanes * kVector;
  if (Rows < kPass && row >= Rows) return;
  const bool whole = rows >= Rows && bytes >= Bytes;  // where it is known, nothing is asked
  to += (Pairs ? grouped<Pairs ? Pairs : 1>(row) : row) * to_pitch + byte;
  from += int64_t{row} * from_pitch + byte;
  unrolled<divided_up(Rows, kPass)>([&](auto pass) {
    constexpr int first = pass * kPass;
    if (first + kPass > Rows && row + first >= Rows) return;
    unrolled<kSteps>([&](auto step) {
      constexpr int along = step * kLanes * kVector;
      const bool exists = whole || (row + first < rows && byte + along < bytes);
      async_copy_16<first * Pitch + along>(Pitch ? to : to + first * to_pitch, from + along,
                                           exists);
    });
    from += kPass * from_pitch;
  });
}

}  // namespace fastscnn::cuda
