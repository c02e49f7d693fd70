#include "kernels.h"
#if FASTSCNN_KNOWS_BF16
#define FASTSCNN_ISA amx
#define FASTSCNN_TABLE kAmx
#define FASTSCNN_TARGET \
  "avx512f,avx512bw,avx512dq,avx512vl,fma,avx512bf16,avx512vnni,amx-tile,amx-bf16,amx-int8"
#define FASTSCNN_LANES 16
#define FASTSCNN_BF16 1
#define FASTSCNN_AMX 1
#define FASTSCNN_VNNI 0
#include "isa.inl"
#endif
