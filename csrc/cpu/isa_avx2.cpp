#if defined(__x86_64__)
#define FASTSCNN_ISA avx2
#define FASTSCNN_TABLE kAvx2
#define FASTSCNN_TARGET "avx2,fma"
#define FASTSCNN_LANES 8
#define FASTSCNN_BF16 0
#define FASTSCNN_AMX 0
#define FASTSCNN_VNNI 0
#include "isa.inl"
#endif
