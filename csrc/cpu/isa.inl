// The kernels of one instruction set: included after every standard header and after the target
// pragma, with these defined:
//   FASTSCNN_ISA, FASTSCNN_TABLE  the name, also of a namespace; the table that comes out
//   FASTSCNN_LANES                floats in a vector
//   FASTSCNN_BF16, FASTSCNN_AMX   1 where there are instructions for bf16, and tiles
// Nothing in here may call an inline function of the standard library: the linker would keep one
// copy of it for all processors.
#define FASTSCNN_FLOAT32 0
#define FASTSCNN_BFLOAT16 1
#define FASTSCNN_HIGH 2
namespace fastscnn {
namespace FASTSCNN_ISA {
#include "simd.inl"
#include "sample.inl"

namespace bfloat16 {
#define FASTSCNN_ARITHMETIC FASTSCNN_BFLOAT16
#include "ops.inl"
#undef FASTSCNN_ARITHMETIC
}  // namespace bfloat16

#if FASTSCNN_AMX
namespace high {
#define FASTSCNN_ARITHMETIC FASTSCNN_HIGH
#include "ops.inl"
#undef FASTSCNN_ARITHMETIC
}  // namespace high
#endif

#if !FASTSCNN_BF16  // instructions for bf16 change nothing else
namespace float32 {
#define FASTSCNN_ARITHMETIC FASTSCNN_FLOAT32
#include "ops.inl"
#undef FASTSCNN_ARITHMETIC
#include "training.inl"
}  // namespace float32
#endif
}  // namespace FASTSCNN_ISA

#define FASTSCNN_STRING_(x) #x
#define FASTSCNN_STRING(x) FASTSCNN_STRING_(x)
#define FASTSCNN_NAME FASTSCNN_STRING(FASTSCNN_ISA)
#if FASTSCNN_AMX
const Kernels FASTSCNN_TABLE = {
    FASTSCNN_NAME, {nullptr, &FASTSCNN_ISA::bfloat16::kOps, &FASTSCNN_ISA::high::kOps}, nullptr};
#elif FASTSCNN_BF16
const Kernels FASTSCNN_TABLE = {
    FASTSCNN_NAME, {nullptr, &FASTSCNN_ISA::bfloat16::kOps, nullptr}, nullptr};
#else
const Kernels FASTSCNN_TABLE = {
    FASTSCNN_NAME,
    {&FASTSCNN_ISA::float32::kOps, &FASTSCNN_ISA::bfloat16::kOps, nullptr},
    &FASTSCNN_ISA::float32::kTraining};
#endif
}  // namespace fastscnn
