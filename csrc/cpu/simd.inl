// Vectors of kLanes floats. FASTSCNN_LANES is 4 (any compiler with vector extensions), 8 (AVX2 +
// FMA) or 16 (AVX-512). Clamping and comparing keep NaN, as torch does.
#define FASTSCNN_INLINE inline __attribute__((always_inline))

constexpr int kLanes = FASTSCNN_LANES;
typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef float vf_any __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t vi_any __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

FASTSCNN_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
FASTSCNN_INLINE vi load(const int32_t* p) { return *reinterpret_cast<const vi_any*>(p); }
FASTSCNN_INLINE void store(float* p, vf v) { *reinterpret_cast<vf_any*>(p) = v; }

#if FASTSCNN_LANES == 16
FASTSCNN_INLINE vf splat(float x) { return _mm512_set1_ps(x); }
FASTSCNN_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
FASTSCNN_INLINE vf at_least(vf low, vf v) { return _mm512_max_ps(low, v); }
FASTSCNN_INLINE vf at_most(vf high, vf v) { return _mm512_min_ps(high, v); }
FASTSCNN_INLINE void stream(float* p, vf v) { _mm512_stream_ps(p, v); }
FASTSCNN_INLINE vf lookup(const float* window, vi index) {
  return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(index), load(window));
}
// Where v > best (or, if NAN_WINS, v is the first NaN): best = v, label = candidate.
template <bool NAN_WINS>
FASTSCNN_INLINE void keep_larger(vf v, vi candidate, vf& best, vi& label) {
  __mmask16 take = _mm512_cmp_ps_mask(v, best, NAN_WINS ? _CMP_NLE_UQ : _CMP_GT_OQ);
  if (NAN_WINS) take = _kand_mask16(take, _mm512_cmp_ps_mask(best, best, _CMP_ORD_Q));
  best = _mm512_mask_mov_ps(best, take, v);
  label = (vi)_mm512_mask_mov_epi32((__m512i)label, take, (__m512i)candidate);
}
FASTSCNN_INLINE void store_bytes(uint8_t* p, vi v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)v));
}
#elif FASTSCNN_LANES == 8
FASTSCNN_INLINE vf splat(float x) { return _mm256_set1_ps(x); }
FASTSCNN_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
FASTSCNN_INLINE vf at_least(vf low, vf v) { return _mm256_max_ps(low, v); }
FASTSCNN_INLINE vf at_most(vf high, vf v) { return _mm256_min_ps(high, v); }
FASTSCNN_INLINE void stream(float* p, vf v) { _mm256_stream_ps(p, v); }
FASTSCNN_INLINE vf lookup(const float* window, vi index) {
  return _mm256_permutevar8x32_ps(load(window), (__m256i)index);
}
#else
FASTSCNN_INLINE vf splat(float x) { return x - vf{}; }
FASTSCNN_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
FASTSCNN_INLINE vf at_least(vf low, vf v) { return v < low ? low : v; }
FASTSCNN_INLINE vf at_most(vf high, vf v) { return v > high ? high : v; }
FASTSCNN_INLINE void stream(float* p, vf v) { *reinterpret_cast<vf*>(p) = v; }
FASTSCNN_INLINE vf lookup(const float* window, vi index) {
  vf v;
  for (int i = 0; i < kLanes; i++) v[i] = window[index[i]];
  return v;
}
#endif
#if FASTSCNN_LANES != 16
template <bool NAN_WINS>
FASTSCNN_INLINE void keep_larger(vf v, vi candidate, vf& best, vi& label) {
  const vi take = NAN_WINS ? ~(v <= best) & (best == best) : v > best;
  best = take ? v : best;
  label = take ? candidate : label;
}
FASTSCNN_INLINE void store_bytes(uint8_t* p, vi v) {
  for (int i = 0; i < kLanes; i++) p[i] = uint8_t(v[i]);
}
#endif
// Orders streamed stores before whatever tells another thread that they are done.
FASTSCNN_INLINE void stream_fence() {
#if FASTSCNN_LANES != 4
  _mm_sfence();
#endif
}

FASTSCNN_INLINE int min_of(int a, int b) { return a < b ? a : b; }
FASTSCNN_INLINE int max_of(int a, int b) { return a > b ? a : b; }
FASTSCNN_INLINE size_t largest(size_t a, size_t b) { return a > b ? a : b; }

// An activation as a clamp; none has infinite bounds.
struct Clamp {
  float low, high;
  FASTSCNN_INLINE vf operator()(vf v) const {
    return at_most(splat(high), at_least(splat(low), v));
  }
};
FASTSCNN_INLINE Clamp clamp_of(Activation a) {
  const float inf = __builtin_inff();
  return {a == Activation::none ? -inf : 0.0f, a == Activation::relu6 ? 6.0f : inf};
}

// exp(x) for x <= 0 to 2 ulp; NaN stays NaN (Cephes' polynomial).
FASTSCNN_INLINE vf exp_negative(vf x) {
  x = at_least(splat(-87.0f), x);
  const vf magic =
      splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const vf shifted = fma(x, splat(1.44269504088896341f), magic);
  const vf n = shifted - magic;
  vf r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  vf p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + splat(1.0f));
  const vi exponent = ((vi)shifted + (127 - 0x4B400000)) << 23;
  return p * (vf)exponent;
}
