// Bilinear resizing of bytes in fixed point, as program/integers.py specifies: first along y, to
// 7 bits more, then along x.
//
// Blends are (low (2^15 - share) + high share + half) >> bits. Those along y are dot products of
// two bytes; along x a shift that rounds to 7 bits more and the one that takes those away are one,
// and the sums are four times as large, so that the result is a word's highest byte.
#pragma once

#include "integers.cuh"

namespace fastscnn::cuda {

// The index below a position, the one above it (or the last again), and the shares of both.
struct alignas(16) FixedSample {
  int low, high;
  uint32_t shares;  // of 2^15, 16 bits each

  __device__ __forceinline__ uint32_t low_share() const { return shares & 0xffff; }
  __device__ __forceinline__ uint32_t high_share() const { return shares >> 16; }
};

// Where output i of `out` samples `size` values.
__device__ __forceinline__ FixedSample fixed_sample(int i, int size, int out, bool align_corners) {
  constexpr int64_t kOne = 1 << 15;
  int64_t over, unit;
  if (align_corners) {
    over = int64_t{i} * (size - 1), unit = out > 1 ? out - 1 : 1;
  } else {
    over = (2 * int64_t{i} + 1) * size - out, unit = 2 * int64_t{out};
    over = over < 0 ? 0 : over;
  }
  const int64_t last = size - 1, below = over / unit, low = below < last ? below : last;
  const int64_t nearest = ((over - low * unit) * kOne + unit / 2) / unit;
  const int64_t share = nearest < kOne ? nearest : kOne - 1;
  return {int(low), int(low < last ? low + 1 : last), uint32_t((kOne - share) | share << 16)};
}

// A word of two rows, blended along y.
struct BlendedWord {
  uint32_t v[4];

  BlendedWord() = default;
  __device__ __forceinline__ BlendedWord(uint32_t above, uint32_t below, uint32_t shares) {
    constexpr uint32_t kHalf = 1 << 7;
    const uint32_t low = permuted<0x5140>(above, below), high = permuted<0x7362>(above, below);
    v[0] = add_dot2<0>(shares, low, kHalf) >> 8;
    v[1] = add_dot2<1>(shares, low, kHalf) >> 8;
    v[2] = add_dot2<0>(shares, high, kHalf) >> 8;
    v[3] = add_dot2<1>(shares, high, kHalf) >> 8;
  }
};

// Two columns blended along x: bytes.
__device__ __forceinline__ uint32_t blended(const BlendedWord& left, const BlendedWord& right,
                                            FixedSample along) {
  constexpr uint32_t kHalves = (1 << 16) + (1 << 23);
  const uint32_t of_left = 4 * along.low_share(), of_right = 4 * along.high_share();
  uint32_t sums[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sums[i] = multiply_add(left.v[i], of_left, multiply_add(right.v[i], of_right, kHalves));
  }
  return permuted<0x5410>(permuted<0x73>(sums[0], sums[1]), permuted<0x73>(sums[2], sums[3]));
}
// Sixteen channels at a position of rows of `width` pixels, `pixel` bytes each.
__device__ __forceinline__ uint4 resized(const Byte* channels, FixedSample down, FixedSample along,
                                         int width, int pixel) {
  const Byte* const above = channels + int64_t{down.low} * width * pixel;
  const Byte* const below = channels + int64_t{down.high} * width * pixel;
  const auto load = [&](const Byte* row, int column) {
    return *reinterpret_cast<const uint4*>(row + int64_t{column} * pixel);
  };
  const uint4 a = load(above, along.low), b = load(above, along.high);
  const uint4 c = load(below, along.low), d = load(below, along.high);
  const auto word = [&](uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return blended(BlendedWord(a, c, down.shares), BlendedWord(b, d, down.shares), along);
  };
  return make_uint4(word(a.x, b.x, c.x, d.x), word(a.y, b.y, c.y, d.y), word(a.z, b.z, c.z, d.z),
                    word(a.w, b.w, c.w, d.w));
}

}  // namespace fastscnn::cuda
