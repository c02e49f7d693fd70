#include "kernels.h"
#if FASTSCNN_KNOWS_VNNI
#define FASTSCNN_ISA avx_vnni
#define FASTSCNN_TABLE kAvxVnni
#define FASTSCNN_TARGET "avx2,fma,avxvnni"
#define FASTSCNN_LANES 8
#define FASTSCNN_BF16 0
#define FASTSCNN_AMX 0
#define FASTSCNN_VNNI 1
#include "isa.inl"
#endif
