// The inner product in registers. What one step along K takes from A is 32 bits wide: a float, or
// two neighbouring bf16, which meet a pair of B's rows; `unit_any` as it may lie in A.
using sum = float;  // of a product, in registers and tiles; `vsum` a vector of them
using vsum = vf;
#if FASTSCNN_ARITHMETIC != FASTSCNN_BFLOAT16
typedef float unit, unit_any;
using units = vf;
FASTSCNN_INLINE vsum multiply_add(vf a, vf b, vsum s) { return fma(a, b, s); }
FASTSCNN_INLINE units broadcast(const unit_any* p) { return splat(*p); }
#else
typedef int32_t unit __attribute__((may_alias));
typedef int32_t unit_any __attribute__((may_alias, aligned(2)));
using units = vi;
#if FASTSCNN_BF16
FASTSCNN_INLINE vsum multiply_add(vi a, vi b, vsum s) {
  return _mm512_dpbf16_ps(s, (__m512bh)a, (__m512bh)b);
}
#else
FASTSCNN_INLINE vsum multiply_add(vi a, vi b, vsum s) {
  return fma(odd(a), odd(b), fma(even(a), even(b), s));
}
#endif
FASTSCNN_INLINE units broadcast(const unit_any* p) { return vi{} + *p; }
#endif
constexpr int kUnit = int(sizeof(unit) / sizeof(element));
