// The PTX that the kernels use, each instruction in a function; host/ptx.h has the same functions
// for the host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>

#ifdef FASTSCNN_CUDA_ON_HOST
#include "host/ptx.h"
#else

namespace fastscnn::cuda {

// The block's dynamic shared memory, aligned to 128 bytes.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char fastscnn_shared[];
  return fastscnn_shared;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes (zeros where they do not `exist`) to shared memory, Offset bytes on; they are
// there after async_wait() and a barrier. sm_75 copies through registers.
template <int Offset = 0>
__device__ __forceinline__ void async_copy_16(void* shared, const void* global, bool exists) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0+%1], [%2], 16, %3;" ::"r"(shared_address(shared)),
               "n"(Offset), "l"(global), "r"(exists ? 16 : 0));
#else
  *reinterpret_cast<uint4*>(static_cast<unsigned char*>(shared) + Offset) =
      exists ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
#endif
}

// Lets the launch after this one begin, and waits until all launches before it have ended and what
// they wrote is there: on sm_90 and later launches of a stream overlap (launch.h). Until it returns
// a thread reads nothing but weights and writes nothing but shared memory, which other launches may
// be using; every thread calls it, so that a launch's end says that all before it have ended too.
// What a launch before may have written is reached by pointers that are not __restrict__: through
// others the compiler might load early, or from what is cached as constant.
__device__ __forceinline__ void wait_for_launches_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The same number, which the compiler keeps in a register and does not compute anew.
__device__ __forceinline__ int kept(int v) {
  asm volatile("mov.b32 %0, %0;" : "+r"(v));
  return v;
}

// Both as floats.
__device__ __forceinline__ float2 unpacked(__half2 v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  float2 pair;
  asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
      : "=f"(pair.x), "=f"(pair.y)
      : "r"(bits));
  return pair;
}

// Ends a group of copies.
__device__ __forceinline__ void async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for this thread's groups but the last `Pending`.
template <int Pending>
__device__ __forceinline__ void async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// Four 8x8 matrices of 16-bit elements, whose rows lanes 0-7, 8-15, 16-23, 24-31 point to, Offset
// bytes on.
template <int Offset = 0>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4+%5];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)), "n"(Offset));
}

// Two, whose rows lanes 0-15 point to.
template <int Offset = 0>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2+%3];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row)), "n"(Offset));
}

template <int Offset = 0>
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4+%5];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)), "n"(Offset));
}

template <int Offset = 0>
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2+%3];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row)), "n"(Offset));
}

// d (16x8, float) += a (16x16) b (16x8).
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1);

template <>
__device__ __forceinline__ void multiply_add<__half>(float (&d)[4], const uint32_t (&a)[4],
                                                     uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(half ? b1 : b0));
  }
#endif
}

template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                            uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  __trap();  // sm_75 has no bfloat16; fastscnn_fast.backends does not choose it there
#endif
}

// d (16x8, float) += a (16x8) b (8x8).
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b);

template <>
__device__ __forceinline__ void multiply_add<__half>(float (&d)[4], uint32_t a0, uint32_t a1,
                                                     uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b));
}

template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&d)[4], uint32_t a0, uint32_t a1,
                                                            uint32_t b) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b));
#else
  __trap();
#endif
}

// d (16x8, int) += a (16x32 bytes) b (32x8, int8); a's are int8, or uint8.
template <bool Unsigned = false>
__device__ __forceinline__ void multiply_add_bytes(int (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                   uint32_t b1);
// The same of half the depth.
template <bool Unsigned = false>
__device__ __forceinline__ void multiply_add_bytes(int (&d)[4], uint32_t a0, uint32_t a1,
                                                   uint32_t b);

#if __CUDA_ARCH__ >= 800
#define FASTSCNN_MULTIPLY_BYTES(UNSIGNED, TYPE)                                             \
  template <>                                                                               \
  __device__ __forceinline__ void multiply_add_bytes<UNSIGNED>(                             \
      int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {                      \
    int r[4];                                                                               \
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32." TYPE                              \
                 ".s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"        \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(d[0]), \
                   "r"(d[1]), "r"(d[2]), "r"(d[3]));                                        \
    memcpy(d, r, sizeof r);                                                                 \
  }                                                                                         \
  template <>                                                                               \
  __device__ __forceinline__ void multiply_add_bytes<UNSIGNED>(int (&d)[4], uint32_t a0,    \
                                                               uint32_t a1, uint32_t b) {   \
    int r[4];                                                                               \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.s32." TYPE                              \
                 ".s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"                    \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                           \
                 : "r"(a0), "r"(a1), "r"(b), "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3]));   \
    memcpy(d, r, sizeof r);                                                                 \
  }
#else
// sm_75 has eight rows of half the depth.
#define FASTSCNN_MULTIPLY_BYTES(UNSIGNED, TYPE)                                           \
  template <>                                                                             \
  __device__ __forceinline__ void multiply_add_bytes<UNSIGNED>(int (&d)[4], uint32_t a0,  \
                                                               uint32_t a1, uint32_t b) { \
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32." TYPE                             \
                 ".s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"                                  \
                 : "+r"(d[0]), "+r"(d[1])                                                 \
                 : "r"(a0), "r"(b));                                                      \
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32." TYPE                             \
                 ".s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"                                  \
                 : "+r"(d[2]), "+r"(d[3])                                                 \
                 : "r"(a1), "r"(b));                                                      \
  }                                                                                       \
  template <>                                                                             \
  __device__ __forceinline__ void multiply_add_bytes<UNSIGNED>(                           \
      int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {                    \
    multiply_add_bytes<UNSIGNED>(d, a[0], a[1], b0);                                      \
    multiply_add_bytes<UNSIGNED>(d, a[2], a[3], b1);                                      \
  }
#endif
FASTSCNN_MULTIPLY_BYTES(false, "s8")
FASTSCNN_MULTIPLY_BYTES(true, "u8")
#undef FASTSCNN_MULTIPLY_BYTES

// Four integers as bytes of a word, the first the lowest, each the nearest to it from 0 to 255.
__device__ __forceinline__ uint32_t saturated(int a, int b, int c, int d) {
  uint32_t word;
  asm("{.reg .b32 high; cvt.pack.sat.u8.s32.b32 high, %4, %3, 0; "
      "cvt.pack.sat.u8.s32.b32 %0, %2, %1, high;}"
      : "=r"(word)
      : "r"(a), "r"(b), "r"(c), "r"(d));
  return word;
}
// Two, in the lower half.
__device__ __forceinline__ uint32_t saturated(int a, int b) {
  uint32_t word;
  asm("cvt.pack.sat.u8.s32.b32 %0, %2, %1, 0;" : "=r"(word) : "r"(a), "r"(b));
  return word;
}

// The word whose byte i is byte `select` >> 4 i of the words a, then b; all of those are below 8.
__device__ __forceinline__ uint32_t permuted(uint32_t a, uint32_t b, uint32_t select) {
  uint32_t word;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "r"(select));
  return word;
}
template <uint32_t Select>
__device__ __forceinline__ uint32_t permuted(uint32_t a, uint32_t b) {
  uint32_t word;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "n"(Select));
  return word;
}

// The bits of a b + c, rounded once, and of a + b.
__device__ __forceinline__ int bits_of_multiply_add(float a, float b, float c) {
  int bits;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=r"(bits) : "f"(a), "f"(b), "f"(c));
  return bits;
}
__device__ __forceinline__ int bits_of_sum(float a, float b) {
  int bits;
  asm("add.rn.f32 %0, %1, %2;" : "=r"(bits) : "f"(a), "f"(b));
  return bits;
}

// The word that is `bits` % 32 further on in the words low, then high.
__device__ __forceinline__ uint32_t shifted(uint32_t low, uint32_t high, int bits) {
  return __funnelshift_r(low, high, bits);
}

// a b + c, which compilers would reorder to an instruction more.
__device__ __forceinline__ uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// The larger of each byte.
__device__ __forceinline__ uint32_t larger_bytes(uint32_t a, uint32_t b) { return __vmaxu4(a, b); }

// total + the products of the four bytes of a and b, each int8 or uint8.
__device__ __forceinline__ int add_dot4(int a, int b, int total) { return __dp4a(a, b, total); }
__device__ __forceinline__ uint32_t add_dot4(uint32_t a, uint32_t b, uint32_t total) {
  return __dp4a(a, b, total);
}

// total + the products of two halves of a word and the Half-th two bytes of another.
template <int Half>
__device__ __forceinline__ uint32_t add_dot2(uint32_t halves, uint32_t bytes, uint32_t total) {
  return Half ? __dp2a_hi(halves, bytes, total) : __dp2a_lo(halves, bytes, total);
}

__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// Whether it holds for a lane of the warp.
__device__ __forceinline__ bool any_of_warp(bool holds) { return __any_sync(~0u, holds); }

// Global memory through which blocks give each other values: what a block's threads have stored
// is there for the block that arrives after them, if each of them publishes it, one of them
// arrives after a barrier, and those of the other block publish (which orders their loads too)
// after another.
template <class Four>
__device__ __forceinline__ void store_for_others(Four* to, Four v) {
  __stcg(to, v);
}
template <class Four>
__device__ __forceinline__ Four load_from_others(const Four* from) {
  return __ldcg(from);
}
__device__ __forceinline__ void publish() { __threadfence(); }

// How many have arrived before.
__device__ __forceinline__ int arrive(int* counter) { return atomicAdd(counter, 1); }

}  // namespace fastscnn::cuda

#endif
