// Any processor: vectors of four floats, by compiler vector extensions.
#include <cstddef>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"
#include "training.h"
#define FASTSCNN_LANES 4
#define FASTSCNN_BF16 0
#define FASTSCNN_AMX 0
#define FASTSCNN_ISA portable
#define FASTSCNN_TABLE kPortable
#include "isa.inl"
