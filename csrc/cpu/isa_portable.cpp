// Any processor: vectors of four floats, by compiler vector extensions.
#define FASTSCNN_ISA portable
#define FASTSCNN_TABLE kPortable
#define FASTSCNN_LANES 4
#define FASTSCNN_BF16 0
#define FASTSCNN_AMX 0
#define FASTSCNN_VNNI 0
#include "isa.inl"
