// Runs kernels on the host: one fiber a CUDA thread, a block's fibers on one thread of the
// processor.
//
// What a GPU would forgive by chance fails here: shared memory and locals are poisoned with NaN,
// the former between guard zones, asynchronous copies arrive as late or as early as they may, warps
// run in an order of one's choice, and a barrier or a collective of the warp that not all threads
// reach is an error. See README.md.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_types.h>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __launch_bounds__
#undef __forceinline__
#undef __noinline__
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __noinline__
#define __restrict__ __restrict

namespace fastscnn::cuda::emulation {

struct Copy {
  void* to;
  const void* from;  // null: zeros
};

// Runs `kernel` once for each thread of each block of the grid (blocks, rows); throws
// std::runtime_error where it breaks a rule.
void launch(unsigned blocks, unsigned rows, unsigned threads, size_t shared,
            const std::function<void()>& kernel);

// Of the launches that follow. 0: each warp runs until it must wait for others, in order; 1: in
// reverse; 2 and above: a step of each warp in turns, in other orders. Asynchronous copies arrive
// when they are waited for in even orders, at once in odd ones. Blocks begin in order, in reverse,
// and from 2 on in other orders.
void set_warp_order(unsigned order);

// Memory, addresses and bytes, that launches before use until the launches which follow on this
// thread have waited for them: the first block of each begins earlier and finds poison there.
void set_in_flight(const std::vector<std::pair<uintptr_t, size_t>>& memory);

// What follows is called by kernels.
[[noreturn]] void fail(const char* rule);
uint3 thread_index();
uint3 block_index();
dim3 block_size();
dim3 grid_size();
unsigned char* shared_memory();
void barrier(int line);
void wait_for_launches_before();
void copy_16(const Copy& copy);
void commit();
void wait(int pending);
// What blocks give each other. A stored value is in memory once its thread has published it.
void store_for_others(float4* to, float4 v);
float4 load_from_others(const float4* from);
void publish();
int arrive(int* counter);
// Calls `act` with all 32 lanes' `argument`s once the warp is there.
void collective(void* argument, void (*act)(void* const* lanes));

}  // namespace fastscnn::cuda::emulation

#define threadIdx (::fastscnn::cuda::emulation::thread_index())
#define blockIdx (::fastscnn::cuda::emulation::block_index())
#define blockDim (::fastscnn::cuda::emulation::block_size())
#define gridDim (::fastscnn::cuda::emulation::grid_size())
#define __syncthreads() (::fastscnn::cuda::emulation::barrier(__LINE__))
