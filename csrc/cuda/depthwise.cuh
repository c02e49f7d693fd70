// The depthwise 3x3 of a tile of pixels, from a halo in shared memory.
#pragma once

#include "elements.cuh"

namespace fastscnn::cuda {

// Where a halo's pixel lies: at stride 2 even columns first, so that neighbouring outputs read
// neighbouring memory.
template <int Stride, int HaloColumns>
__device__ __forceinline__ int slot(int row, int column) {
  if (Stride == 2) column = column / 2 + column % 2 * ((HaloColumns + 1) / 2);
  return row * HaloColumns + column;
}

// The depthwise sums of one chunk of channels, from the halo to `left`. A thread has two channels
// throughout and slides down strips of pixels, so that a pixel is read once for the up to three
// outputs that it is part of.
//
// Pixels that are read together lie in different banks: next to each other where the halo is dense,
// 64 bytes a pixel; four apart where its pixels are 80 bytes apart, as in a product's operand.
template <class T, class S, int Stride, int Threads>
__device__ __forceinline__ void depthwise(const T* halo, T* left, const float* weight,
                                          const float* bias, int channels, int first, float low,
                                          float high) {
  constexpr int kPairs = S::kChunk / 2;
  constexpr int kApart = S::kHaloPitch == S::kChunk ? 1 : 4;
  const int within = threadIdx.x % kPairs * 2;
  const bool exists = first + within < channels;
  float2 taps[9], start{0, 0};
#pragma unroll
  for (int tap = 0; tap < 9; ++tap) {
    taps[tap] = exists ? load_pair(weight + tap * channels + first + within) : float2{0, 0};
  }
  if (exists) start = load_pair(bias + first + within);
#pragma unroll 1
  for (int i = threadIdx.x / kPairs; i < S::kPixels / S::kStrip; i += Threads / kPairs) {
    const int along = i % S::kAcross, row = i / S::kAcross * S::kStrip;
    const int column = along / (2 * kApart) * 2 * kApart + along % 2 * kApart + along / 2 % kApart;
    float2 sums[S::kStrip];
#pragma unroll
    for (int r = 0; r < S::kStrip; ++r) sums[r] = start;
#pragma unroll
    for (int y = 0; y < (S::kStrip - 1) * Stride + 3; ++y) {
#pragma unroll
      for (int x = 0; x < 3; ++x) {
        const int at = slot<Stride, S::kHaloColumns>(row * Stride + y, column * Stride + x);
        const float2 value = load_pair(halo + at * S::kHaloPitch + within);
#pragma unroll
        for (int r = 0; r < S::kStrip; ++r) {
          const int tap = y - r * Stride;
          if (tap >= 0 && tap < 3) sums[r] = multiply_add(value, taps[3 * tap + x], sums[r]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < S::kStrip; ++r) {
      store_pair(left + ((row + r) * S::kAcross + column) * S::kLeftPitch + within,
                 bounded(sums[r], low, high));
    }
  }
}

}  // namespace fastscnn::cuda
