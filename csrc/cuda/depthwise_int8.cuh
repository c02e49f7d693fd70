// The depthwise 3x3 of bytes, from a halo in shared memory, on tensor cores: a warp sums up 16
// channels of its pixels.
//
// A product has a depth of two taps: 16 pixels x (16 channels of a tap, then of another), as they
// lie in the halo, by the diagonal matrices of the two taps' weights of 8 of the channels, one
// below the other. The tiles' columns are those of a grouped matrix (integers.cuh), so that a lane
// holds four adjacent channels of a pixel; and of both tiles the same lanes have what is not zero.
#pragma once

#include "depthwise.cuh"
#include "integers.cuh"

namespace fastscnn::cuda {

// Where in a word of PerWord taps a lane's part of a tap's diagonal matrix lies, by tile: in one
// byte of it, or nowhere, which byte 4 is, a zero.
template <int PerWord>
struct ByteSelect {
  uint32_t of[2][PerWord];

  __device__ __forceinline__ ByteSelect() {
    const int lane = threadIdx.x % 32;
    const uint32_t place = lane % 4 == lane / 8 ? 1 << lane / 4 % 2 * 4 : 0;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int tap = 0; tap < PerWord; ++tap) of[j][tap] = 0x4444 - (4 - tap) * (place << 8 * j);
    }
  }
};

// Sixteen channels' weights of nine taps in words of PerWord taps, as a lane needs them.
template <int PerWord>
class ByteFilter {
 public:
  // The channels of whose weights a lane makes its part: 4 (lane / 8) + lane / 4 % 2, and two
  // further.
  __device__ static __forceinline__ int own() {
    const int lane = threadIdx.x % 32;
    return lane / 8 * 4 + lane / 4 % 2;
  }

  // `own` points to the first word of the one, `other` words before that of the other; words of a
  // channel lie `pitch` words apart.
  __device__ __forceinline__ ByteFilter(const uint32_t* own, int other, int pitch) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int word = 0; word < divided_up(9, PerWord); ++word) {
        words_[j][word] = own[j * other + word * pitch];
      }
    }
  }

  // The lane's part of a tap's diagonal matrix of the j-th tile: one byte, or none.
  __device__ __forceinline__ uint32_t diagonal(const ByteSelect<PerWord>& select, int j,
                                               int tap) const {
    return permuted(words_[j][tap / PerWord], 0, select.of[j][tap % PerWord]);
  }

 private:
  uint32_t words_[2][divided_up(9, PerWord)];
};

// What a lane needs of a warp's sixteen channels from `first` on, of `terms` packed by fours
// (lower/gpu_int8.py), and of weights packed in the channels' order, `pitch` words a row of taps.
struct ByFours {
  ByteFilter<4> filter;
  int4 bias;
  float4 multiplier;

  __device__ __forceinline__ ByFours(const uint32_t* weight, const int* biases,
                                     const float* multipliers, int terms, int first)
      : filter(
            weight + first / 4 + ByteFilter<4>::own() / 4 + ByteFilter<4>::own() % 4 * (terms / 4),
            terms / 2, terms) {
    const int at = first / 4 + threadIdx.x % 4, words = terms / 4;
    bias =
        make_int4(biases[at], biases[at + words], biases[at + 2 * words], biases[at + 3 * words]);
    multiplier = make_float4(multipliers[at], multipliers[at + words], multipliers[at + 2 * words],
                             multipliers[at + 3 * words]);
  }
};

struct InOrder {
  ByteFilter<3> filter;
  int4 bias;
  float4 multiplier;

  // Each at the first of the channels.
  __device__ __forceinline__ InOrder(const uint32_t* weight, const int* biases,
                                     const float* multipliers, int pitch)
      : filter(weight + ByteFilter<3>::own(), 2, pitch),
        bias(reinterpret_cast<const int4*>(biases)[threadIdx.x % 4]),
        multiplier(reinterpret_cast<const float4*>(multipliers)[threadIdx.x % 4]) {}
};

// A tile's windows one tap after the other, each a tile of its own: of any stride and dilation.
template <int Pixels, int Across, int Pitch>
struct Windows {
  __device__ static __forceinline__ int2 position(int at) { return {at / Across, at % Across}; }

  __device__ __forceinline__ int window(int pixel) const { return pixel * Pitch; }
  __host__ __device__ static constexpr int known(int tap) { return tap * Pixels * Pitch; }
  __device__ __forceinline__ int moved(int) const { return 0; }
};

// The factors of 16 Rows pixels from `first` on, to `left`; `memory`, in which the halo is, and
// `left` at the first of the 16 channels, of which the lane has its `own`, ByFours or InOrder.
// `left` may be the halo: what another warp reads is not written to.
template <int Rows, int LeftPitch, int PerWord, class Halo, class Own>
__device__ __forceinline__ void depthwise(const Halo& halo, const Byte* memory, Byte* left,
                                          int first, const Own& own,
                                          const ByteSelect<PerWord>& select, int zero) {
  const ByteFilter<PerWord>& filter = own.filter;
  Sums<Rows, 2> sums;
  sums.fill(0, own.bias.x, own.bias.y);
  sums.fill(1, own.bias.z, own.bias.w);
  const auto distance = [&](int from, int to) {
    return Halo::known(to) + halo.moved(to) - Halo::known(from) - halo.moved(from);
  };
  const int lane = threadIdx.x % 32;
  const bool second = lane >= 16;  // whether the lane points to pixels of the second tap
  const Byte* windows[Rows];
#pragma unroll
  for (int i = 0; i < Rows; ++i) {
    windows[i] = memory + halo.window(first + 16 * i + lane % 16) + (second ? distance(0, 1) : 0);
  }
  const auto pair = [&](auto tap, auto other, int move) {
    const uint32_t even[2]{filter.diagonal(select, 0, tap), filter.diagonal(select, 0, other)};
    const uint32_t odd[2]{filter.diagonal(select, 1, tap), filter.diagonal(select, 1, other)};
#pragma unroll
    for (int i = 0; i < Rows; ++i) {
      uint32_t a[4];
      load_matrices<Halo::known(tap)>(a, windows[i] + halo.moved(tap) + move);
      multiply_add_bytes<true>(sums.v[i][0], a, even[0], even[1]);
      multiply_add_bytes<true>(sums.v[i][1], a, odd[0], odd[1]);
    }
  };
  pair(Constant<0>{}, Constant<1>{}, 0);
  pair(Constant<3>{}, Constant<4>{}, 0);
  pair(Constant<6>{}, Constant<7>{}, 0);
  pair(Constant<2>{}, Constant<5>{}, second ? distance(2, 5) - distance(0, 1) : 0);
  const uint32_t even = filter.diagonal(select, 0, 8), odd = filter.diagonal(select, 1, 8);
#pragma unroll
  for (int i = 0; i < Rows; ++i) {
    uint32_t a[2];
    load_matrices<Halo::known(8)>(a, windows[i] + halo.moved(8));
    multiply_add_bytes<true>(sums.v[i][0], a[0], a[1], even);
    multiply_add_bytes<true>(sums.v[i][1], a[0], a[1], odd);
  }
  sync_warp();
  left += (first + lane / 4) * LeftPitch + lane % 4 * 4;
  with_rounding(zero, [&](const auto& rounding) {
#pragma unroll
    for (int i = 0; i < 2 * Rows; ++i) {
      *reinterpret_cast<uint32_t*>(left + 8 * i * LeftPitch) =
          factors(requantised(sums.four(i, 0), own.multiplier, rounding));
    }
  });
}

}  // namespace fastscnn::cuda
