// Bilinear resizing as torch.nn.functional.interpolate defines it, in integers: exact until one
// division.
#pragma once

#include "elements.cuh"

namespace fastscnn::cuda {

// Output i samples the input at max((i * scale + shift) / divisor, 0).
struct Resize {
  int64_t scale, shift, divisor;
};

inline Resize resize_of(int64_t size, int64_t out, bool align_corners) {
  if (align_corners) return {size - 1, 0, out > 1 ? out - 1 : 1};
  return {2 * size, size - out, 2 * out};
}

// The low index that an output samples, the one above it (or the last again), and that one's
// weight.
struct Sample {
  int low, high;
  float weight;
};

__device__ __forceinline__ Sample sample(int i, const Resize& resize, int size) {
  int64_t at = i * resize.scale + resize.shift;
  at = at < 0 ? 0 : at;
  const int64_t low = at / resize.divisor;
  const float weight = float(at - low * resize.divisor) / float(resize.divisor);
  const int last = size - 1, below = low < last ? int(low) : last;
  return {below, below < last ? below + 1 : last, weight};
}

// a (1 - weight) + b weight, infinite and NaN where torch's is.
__device__ __forceinline__ float blended(float a, float b, float weight) {
  return fmaf(a, 1 - weight, b * weight);
}

// The same with rest = 1 - weight.
__device__ __forceinline__ float2 blended(float2 a, float2 b, float weight, float rest) {
  return {fmaf(a.x, rest, b.x * weight), fmaf(a.y, rest, b.y * weight)};
}

}  // namespace fastscnn::cuda
