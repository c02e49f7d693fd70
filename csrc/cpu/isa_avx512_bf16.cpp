#include "kernels.h"
#if FASTSCNN_KNOWS_BF16
#define FASTSCNN_ISA avx512_bf16
#define FASTSCNN_TABLE kAvx512Bf16
#define FASTSCNN_TARGET "avx512f,avx512bw,avx512dq,avx512vl,fma,avx512bf16"
#define FASTSCNN_LANES 16
#define FASTSCNN_BF16 1
#define FASTSCNN_AMX 0
#define FASTSCNN_VNNI 0
#include "isa.inl"
#endif
