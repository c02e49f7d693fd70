#include "kernels.h"
#if FASTSCNN_KNOWS_VNNI
#define FASTSCNN_ISA avx512_vnni
#define FASTSCNN_TABLE kAvx512Vnni
#define FASTSCNN_TARGET "avx512f,avx512bw,avx512dq,avx512vl,fma,avx512vnni"
#define FASTSCNN_LANES 16
#define FASTSCNN_BF16 0
#define FASTSCNN_AMX 0
#define FASTSCNN_VNNI 1
#include "isa.inl"
#endif
