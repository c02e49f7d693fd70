#if defined(__x86_64__)
#define FASTSCNN_ISA avx512
#define FASTSCNN_TABLE kAvx512
#define FASTSCNN_TARGET "avx512f,avx512bw,avx512dq,avx512vl,fma"
#define FASTSCNN_LANES 16
#define FASTSCNN_BF16 0
#define FASTSCNN_AMX 0
#define FASTSCNN_VNNI 0
#include "isa.inl"
#endif
