// bf16 in memory, floats in registers; rounded to nearest even, NaN stays NaN.
#pragma once
#include <cstdint>

// Where files for several processors include a function, the linker must not keep one copy for all.
#define FASTSCNN_INLINE inline __attribute__((always_inline))

namespace fastscnn {

using bf16 = uint16_t;

FASTSCNN_INLINE float to_float(float x) { return x; }
FASTSCNN_INLINE float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
FASTSCNN_INLINE bf16 to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return x == x ? bf16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) : bf16(0x7FC0);
}

}  // namespace fastscnn
