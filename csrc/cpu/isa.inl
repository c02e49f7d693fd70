// The kernels of one instruction set, with these defined:
//   FASTSCNN_ISA, FASTSCNN_TABLE  the name, also of a namespace; the table that comes out
//   FASTSCNN_TARGET               what compilers call it; undefined: what they compile for anyway
//   FASTSCNN_LANES                floats in a vector
//   FASTSCNN_BF16, FASTSCNN_AMX   1 where there are instructions for bf16, and tiles
//   FASTSCNN_VNNI                 1 where there are instructions for products of bytes
// Every standard header comes before the target pragma, and nothing after it may call an inline
// function of the standard library: the linker would keep one copy of it for all processors.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "training.h"

#define FASTSCNN_PRAGMA_(x) _Pragma(#x)
#define FASTSCNN_PRAGMA(x) FASTSCNN_PRAGMA_(x)
#if defined(FASTSCNN_TARGET) && defined(__clang__)
FASTSCNN_PRAGMA(clang attribute push(__attribute__((target(FASTSCNN_TARGET))), apply_to = function))
#elif defined(FASTSCNN_TARGET)
#pragma GCC push_options
FASTSCNN_PRAGMA(GCC target(FASTSCNN_TARGET))
#endif

#define FASTSCNN_FLOAT32 0
#define FASTSCNN_BFLOAT16 1
#define FASTSCNN_HIGH 2
#define FASTSCNN_INT8 3
namespace fastscnn {
namespace FASTSCNN_ISA {
#include "simd.inl"
#include "sample.inl"

// Of what a set adds nothing to, the next lesser one's kernels are as good: instructions for bf16
// serve bfloat16 alone (and tiles "high"), those for products of bytes int8 alone.
#if FASTSCNN_VNNI
constexpr const Ops* kBfloat16 = nullptr;
#else
namespace bfloat16 {
#define FASTSCNN_ARITHMETIC FASTSCNN_BFLOAT16
#include "ops.inl"
#undef FASTSCNN_ARITHMETIC
}  // namespace bfloat16
constexpr const Ops* kBfloat16 = &bfloat16::kOps;
#endif

#if FASTSCNN_AMX
namespace high {
#define FASTSCNN_ARITHMETIC FASTSCNN_HIGH
#include "ops.inl"
#undef FASTSCNN_ARITHMETIC
}  // namespace high
constexpr const Ops* kHigh = &high::kOps;
#else
constexpr const Ops* kHigh = nullptr;
#endif

#if !FASTSCNN_BF16 || FASTSCNN_AMX
namespace int8 {
#define FASTSCNN_ARITHMETIC FASTSCNN_INT8
#include "ops.inl"
#undef FASTSCNN_ARITHMETIC
}  // namespace int8
constexpr const Ops* kInt8 = &int8::kOps;
#else
constexpr const Ops* kInt8 = nullptr;
#endif

#if !FASTSCNN_BF16 && !FASTSCNN_VNNI
namespace float32 {
#define FASTSCNN_ARITHMETIC FASTSCNN_FLOAT32
#include "ops.inl"
#undef FASTSCNN_ARITHMETIC
#include "training.inl"
}  // namespace float32
constexpr const Ops* kFloat32 = &float32::kOps;
constexpr const TrainingKernels* kTrainingKernels = &float32::kTraining;
#else
constexpr const Ops* kFloat32 = nullptr;
constexpr const TrainingKernels* kTrainingKernels = nullptr;
#endif
}  // namespace FASTSCNN_ISA

#define FASTSCNN_STRING_(x) #x
#define FASTSCNN_STRING(x) FASTSCNN_STRING_(x)
const Kernels FASTSCNN_TABLE = {
    FASTSCNN_STRING(FASTSCNN_ISA),
    {FASTSCNN_ISA::kFloat32, FASTSCNN_ISA::kBfloat16, FASTSCNN_ISA::kHigh, FASTSCNN_ISA::kInt8},
    FASTSCNN_ISA::kTrainingKernels};
}  // namespace fastscnn

#if defined(FASTSCNN_TARGET) && defined(__clang__)
#pragma clang attribute pop
#elif defined(FASTSCNN_TARGET)
#pragma GCC pop_options
#endif
