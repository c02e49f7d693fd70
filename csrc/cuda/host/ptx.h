// What ptx.cuh does with PTX, in C++ on the emulation's fibers.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "emulation.h"

namespace fastscnn::cuda {

using std::min;

inline unsigned char* shared_memory() { return emulation::shared_memory(); }

template <int Offset = 0>
void async_copy_16(void* shared, const void* global, bool exists) {
  shared = static_cast<unsigned char*>(shared) + Offset;
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16) {
    emulation::fail("an asynchronous copy must be aligned to 16 bytes");
  }
  emulation::copy_16({shared, exists ? global : nullptr});
}

inline void wait_for_launches_before() { emulation::wait_for_launches_before(); }

inline int kept(int v) { return v; }

inline float2 unpacked(__half2 v) { return __half22float2(v); }

inline void async_commit() { emulation::commit(); }

template <int Pending>
inline void async_wait() {
  emulation::wait(Pending);
}

namespace detail {

struct MatrixRow {
  uint32_t* r;
  const void* row;
};

template <bool Transposed, int Matrices>
void load_matrices(void* const* lanes) {
  for (int matrix = 0; matrix < Matrices; ++matrix) {
    uint16_t m[8][8];
    unsigned banks = 0;  // eight groups of four, each of which gives 16 bytes at a time
    for (int row = 0; row < 8; ++row) {
      const void* from = static_cast<MatrixRow*>(lanes[8 * matrix + row])->row;
      std::memcpy(m[row], from, sizeof m[row]);
      banks |= 1u << reinterpret_cast<uintptr_t>(from) / 16 % 8;
    }
    if (banks != 0xff) emulation::fail("a matrix's rows must be in different banks");
    for (int lane = 0; lane < 32; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      const uint16_t low = Transposed ? m[j][i] : m[i][j];
      const uint16_t high = Transposed ? m[j + 1][i] : m[i][j + 1];
      static_cast<MatrixRow*>(lanes[lane])->r[matrix] = low | uint32_t{high} << 16;
    }
  }
}

template <bool Transposed, int Matrices>
void load_matrices(uint32_t (&r)[Matrices], const void* row, int offset) {
  row = static_cast<const unsigned char*>(row) + offset;
  if (reinterpret_cast<uintptr_t>(row) % 16) {
    emulation::fail("a matrix's row must be aligned to 16 bytes");
  }
  MatrixRow argument{r, row};
  emulation::collective(&argument, load_matrices<Transposed, Matrices>);
}

template <class T>
float element(uint32_t pair, int which) {
  T values[2];
  std::memcpy(static_cast<void*>(values), &pair, sizeof pair);
  return static_cast<float>(values[which]);
}

// Of a product of depth Depth: a's and b's fragments in registers of 16 columns and 8 rows.
struct Product {
  float* d;
  uint32_t a[4], b[2];
};

template <class T, int Depth>
void multiply_add(void* const* lanes) {
  float a[16][Depth], b[Depth][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& p = *static_cast<const Product*>(lanes[lane]);
    const int group = lane / 4, within = lane % 4 * 2;
    for (int i = 0; i < Depth / 2; ++i) {
      a[group + i / 2 % 2 * 8][within + i % 2 + i / 4 * 8] = element<T>(p.a[i / 2], i % 2);
    }
    for (int i = 0; i < Depth / 4; ++i)
      b[within + i % 2 + i / 2 * 8][group] = element<T>(p.b[i / 2], i % 2);
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto& p = *static_cast<Product*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double sum = p.d[i];
      for (int k = 0; k < Depth; ++k) sum += double{a[row][k]} * b[k][column];
      p.d[i] = static_cast<float>(sum);
    }
  }
}

// Of bytes, fragments in registers of 16 rows or columns and 8 columns.
struct ByteProduct {
  int* d;
  uint32_t a[4], b[2];
};

template <class A>
int byte_of(uint32_t word, int which) {
  return static_cast<A>(word >> 8 * which & 255);
}

template <class A, int Depth>
void multiply_add_bytes(void* const* lanes) {
  int a[16][Depth], b[Depth][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& p = *static_cast<const ByteProduct*>(lanes[lane]);
    const int group = lane / 4, within = lane % 4 * 4;
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < Depth / 16; ++half) {
        const int k = 16 * half + within + i;
        a[group][k] = byte_of<A>(p.a[2 * half], i);
        a[group + 8][k] = byte_of<A>(p.a[2 * half + 1], i);
        b[k][group] = byte_of<int8_t>(p.b[half], i);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto& p = *static_cast<ByteProduct*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      uint32_t sum = p.d[i];
      for (int k = 0; k < Depth; ++k) sum += a[row][k] * b[k][column];
      p.d[i] = static_cast<int>(sum);
    }
  }
}

}  // namespace detail

template <int Offset = 0, int Matrices>
void load_matrices(uint32_t (&r)[Matrices], const void* row) {
  detail::load_matrices<false>(r, row, Offset);
}

template <int Offset = 0, int Matrices>
void load_matrices_transposed(uint32_t (&r)[Matrices], const void* row) {
  detail::load_matrices<true>(r, row, Offset);
}

template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  detail::Product argument{d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulation::collective(&argument, detail::multiply_add<T, 16>);
}

template <class T>
void multiply_add(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  detail::Product argument{d, {a0, a1, 0, 0}, {b, 0}};
  emulation::collective(&argument, detail::multiply_add<T, 8>);
}

template <bool Unsigned = false>
void multiply_add_bytes(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using A = std::conditional_t<Unsigned, uint8_t, int8_t>;
  detail::ByteProduct argument{d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulation::collective(&argument, detail::multiply_add_bytes<A, 32>);
}

template <bool Unsigned = false>
void multiply_add_bytes(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  using A = std::conditional_t<Unsigned, uint8_t, int8_t>;
  detail::ByteProduct argument{d, {a0, a1, 0, 0}, {b, 0}};
  emulation::collective(&argument, detail::multiply_add_bytes<A, 16>);
}

inline uint32_t saturated(int a, int b, int c = 0, int d = 0) {
  const int all[4]{a, b, c, d};
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) word |= uint32_t(std::clamp(all[i], 0, 255)) << 8 * i;
  return word;
}

inline uint32_t permuted(uint32_t a, uint32_t b, uint32_t select) {
  const uint64_t both = a | uint64_t{b} << 32;
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) {
    word |= uint32_t(both >> 8 * (select >> 4 * i & 7) & 255) << 8 * i;
  }
  return word;
}

template <uint32_t Select>
uint32_t permuted(uint32_t a, uint32_t b) {
  return permuted(a, b, Select);
}

inline uint32_t shifted(uint32_t low, uint32_t high, int bits) {
  return uint32_t((low | uint64_t{high} << 32) >> bits % 32);
}

inline uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) { return a * b + c; }

inline uint32_t larger_bytes(uint32_t a, uint32_t b) {
  uint32_t word = 0;
  for (int i = 0; i < 32; i += 8) word |= std::max(a >> i & 255, b >> i & 255) << i;
  return word;
}

inline int add_dot4(int a, int b, int total) {
  uint32_t sum = total;
  for (int i = 0; i < 4; ++i) {
    sum += detail::byte_of<int8_t>(a, i) * detail::byte_of<int8_t>(b, i);
  }
  return int(sum);
}
inline uint32_t add_dot4(uint32_t a, uint32_t b, uint32_t total) {
  for (int i = 0; i < 32; i += 8) total += (a >> i & 255) * (b >> i & 255);
  return total;
}

template <int Half>
uint32_t add_dot2(uint32_t halves, uint32_t bytes, uint32_t total) {
  bytes >>= 16 * Half;
  return total + (halves & 0xffff) * (bytes & 255) + (halves >> 16) * (bytes >> 8 & 255);
}

// As CUDA's: each rounded by itself.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __int2float_rn(int v) { return static_cast<float>(v); }

inline int bits_of(float v) {
  int bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
inline int bits_of_multiply_add(float a, float b, float c) { return bits_of(fmaf(a, b, c)); }
inline int bits_of_sum(float a, float b) { return bits_of(a + b); }

inline void sync_warp() {
  emulation::collective(nullptr, [](void* const*) {});
}

inline bool any_of_warp(bool holds) {
  emulation::collective(&holds, [](void* const* lanes) {
    bool any = false;
    for (int lane = 0; lane < 32; ++lane) any |= *static_cast<bool*>(lanes[lane]);
    for (int lane = 0; lane < 32; ++lane) *static_cast<bool*>(lanes[lane]) = any;
  });
  return holds;
}

template <class Four>
void store_for_others(Four* to, Four v) {
  float4 bits;
  std::memcpy(&bits, &v, sizeof bits);
  emulation::store_for_others(reinterpret_cast<float4*>(to), bits);
}
template <class Four>
Four load_from_others(const Four* from) {
  const float4 bits = emulation::load_from_others(reinterpret_cast<const float4*>(from));
  Four v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
inline void publish() { emulation::publish(); }
inline int arrive(int* counter) { return emulation::arrive(counter); }

}  // namespace fastscnn::cuda
