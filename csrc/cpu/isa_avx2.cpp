#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "training.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define FASTSCNN_LANES 8
#define FASTSCNN_BF16 0
#define FASTSCNN_AMX 0
#define FASTSCNN_ISA avx2
#define FASTSCNN_TABLE kAvx2
#include "isa.inl"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
