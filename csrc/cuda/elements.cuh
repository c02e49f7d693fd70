// Elements of the three types, two at a time, and what is done to them.
#pragma once

#include <cmath>
#include <type_traits>
#include <utility>

#include "launch.h"
#include "ptx.cuh"

namespace fastscnn::cuda {

constexpr int kVector = 16;  // bytes of the widest access

template <class T>
constexpr int kPerVector = kVector / int(sizeof(T));

// Adjacent elements that move together.
template <class T, int Size>
struct alignas(Size * sizeof(T)) Vector {
  T v[Size];
};

template <class Size>
__host__ __device__ constexpr Size divided_up(Size a, int b) {
  return (a + b - 1) / b;
}
__host__ __device__ constexpr int rounded_up(int a, int multiple) {
  return int(divided_up(unsigned(a), multiple)) * multiple;
}
__host__ __device__ constexpr int power_of_two(int at_least) {
  int power = 1;
  while (power < at_least) power *= 2;
  return power;
}

// Channels of an activation, and columns of a product's right matrix, as lower/gpu.py pads
// them.
__host__ __device__ constexpr int computed_channels(int channels) {
  return rounded_up(channels, 16);
}
constexpr int kMostColumns = 128;
__host__ __device__ constexpr int padded_columns(int channels) {
  const int power = power_of_two(computed_channels(channels));
  return rounded_up(channels, power < kMostColumns ? power : kMostColumns);
}

// Two adjacent elements, as they lie in memory, and as floats.
__device__ __forceinline__ float2 packed(float2 v, float) { return v; }
__device__ __forceinline__ __half2 packed(float2 v, __half) { return __floats2half2_rn(v.x, v.y); }
__device__ __forceinline__ __nv_bfloat162 packed(float2 v, __nv_bfloat16) {
  return __floats2bfloat162_rn(v.x, v.y);
}
template <class T>
using Pair = decltype(packed(float2{}, T{}));

__device__ __forceinline__ float2 unpacked(float2 v) { return v; }
__device__ __forceinline__ float2 unpacked(__nv_bfloat162 v) { return __bfloat1622float2(v); }

template <class T>
__device__ __forceinline__ float2 load_pair(const T* p) {
  return unpacked(*reinterpret_cast<const Pair<T>*>(p));
}

template <class T>
__device__ __forceinline__ void put(T* p, Pair<T> pair) {
  *reinterpret_cast<Pair<T>*>(p) = pair;
}

template <class T>
__device__ __forceinline__ void store_pair(T* p, float2 v) {
  put(p, packed(v, T{}));
}

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

// Rounded to nearest even.
template <class T>
__device__ __forceinline__ T rounded(float v) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return v;
  } else {
    return static_cast<T>(v);
  }
}

// As elements of their own type: of a local array that is read as another, a compiler need not have
// written what it holds.
template <class T>
__device__ __forceinline__ void copy_16(T* to, const T* from) {
  using V = Vector<T, kPerVector<T>>;
  *reinterpret_cast<V*>(to) = *reinterpret_cast<const V*>(from);
}

// p + elements; what a loop adds to it is a part of its instructions.
template <class T>
__device__ __forceinline__ T* kept_at(T* p, int elements) {
  const int bytes = kept(elements * int(sizeof(T)));
  using Byte = std::conditional_t<std::is_const_v<T>, const unsigned char, unsigned char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(p) + bytes);
}

__device__ __forceinline__ float2 multiply_add(float2 a, float2 b, float2 c) {
  return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)};
}

// An activation as bounds of what it lets through; NaN stays NaN, as in torch.
struct Bounds {
  float low, high;
};

inline Bounds bounds_of(int activation) {
  require(activation >= FASTSCNN_NONE && activation <= FASTSCNN_RELU6,
          "an activation must be none, relu or relu6", activation);
  return {activation == FASTSCNN_NONE ? -INFINITY : 0.0f,
          activation == FASTSCNN_RELU6 ? 6.0f : INFINITY};
}

__device__ __forceinline__ float bounded(float v, float low, float high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

__device__ __forceinline__ float2 bounded(float2 v, float low, float high) {
  return {bounded(v.x, low, high), bounded(v.y, low, high)};
}

// Pairs of T, rounded, between two bounds that T has exactly: rounding does not change an order.
template <class T>
struct Clamp {
  Pair<T> low, high;

  __device__ Clamp(float least, float most)
      : low(packed({least, least}, T{})), high(packed({most, most}, T{})) {}

  __device__ __forceinline__ Pair<T> operator()(float2 v) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return bounded(v, low.x, high.x);
    } else {
      return __hmin2_nan(__hmax2_nan(packed(v, T{}), low), high);
    }
  }
};

// The pair where the mask has all bits set, zero where it has none.
template <class V>
__device__ __forceinline__ V masked(V pair, uint32_t mask) {
  uint32_t words[sizeof pair / sizeof(uint32_t)];
  std::memcpy(words, static_cast<const void*>(&pair), sizeof pair);
  for (uint32_t& word : words) word &= mask;
  std::memcpy(static_cast<void*>(&pair), words, sizeof pair);
  return pair;
}

// A number that is a type: what is computed of it is a part of the instruction.
template <int Value>
struct Constant {
  __host__ __device__ constexpr operator int() const { return Value; }
};

// Calls `f(Constant<i>)` for i = 0 .. Count - 1.
template <class F, int... I>
__device__ __forceinline__ void unrolled(F& f, std::integer_sequence<int, I...>) {
  (f(Constant<I>{}), ...);
}
template <int Count, class F>
__device__ __forceinline__ void unrolled(F f) {
  unrolled(f, std::make_integer_sequence<int, Count>{});
}

// Calls `run` with an element of the type.
template <class F>
void with_type(int type, F&& run) {
  require(type >= FASTSCNN_FLOAT32 && type <= FASTSCNN_FLOAT16,
          "a type must be float32, bfloat16 or float16", type);
  if (type == FASTSCNN_FLOAT32) return run(float{});
  if (type == FASTSCNN_BFLOAT16) return run(__nv_bfloat16{});
  return run(__half{});
}

}  // namespace fastscnn::cuda
