// The kernels of one instruction set, with these defined:
//   FASTSCNN_ISA, FASTSCNN_TABLE  the name, also of a namespace; the table that comes out
//   FASTSCNN_TARGET               what compilers call it; undefined: what they compile for anyway
//   FASTSCNN_LANES                floats in a vector
//   FASTSCNN_BF16, FASTSCNN_AMX   1 where there are instructions for bf16, and tiles
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
constexpr const Ops* kHigh = &high::kOps;
#else
constexpr const Ops* kHigh = nullptr;
#endif

#if !FASTSCNN_BF16  // instructions for bf16 change nothing else
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
    {FASTSCNN_ISA::kFloat32, &FASTSCNN_ISA::bfloat16::kOps, FASTSCNN_ISA::kHigh},
    FASTSCNN_ISA::kTrainingKernels};
}  // namespace fastscnn

#if defined(FASTSCNN_TARGET) && defined(__clang__)
#pragma clang attribute pop
#elif defined(FASTSCNN_TARGET)
#pragma GCC pop_options
#endif
