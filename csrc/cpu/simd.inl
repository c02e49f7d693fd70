// Vectors of kLanes floats. FASTSCNN_LANES is 4 (any compiler with vector extensions), 8 (AVX2 +
// FMA) or 16 (AVX-512). Clamping and comparing keep NaN, as torch does.
constexpr int kLanes = FASTSCNN_LANES;
typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef float vf_any __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t vi_any __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

FASTSCNN_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
FASTSCNN_INLINE vi load(const int32_t* p) { return *reinterpret_cast<const vi_any*>(p); }
FASTSCNN_INLINE void store(float* p, vf v) { *reinterpret_cast<vf_any*>(p) = v; }
FASTSCNN_INLINE void store(int32_t* p, vi v) { *reinterpret_cast<vi_any*>(p) = v; }

// bf16: bf16.h.
typedef uint16_t vs __attribute__((vector_size(kLanes * 2)));
typedef uint16_t vs_any __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
// Compilers take __builtin_convertvector of narrow integers apart: one instruction each, by name.
#if FASTSCNN_LANES == 16
FASTSCNN_INLINE vf load(const bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
FASTSCNN_INLINE vf load(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}
#elif FASTSCNN_LANES == 8
FASTSCNN_INLINE vf load(const bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
}
FASTSCNN_INLINE vf load(const uint8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}
#else
FASTSCNN_INLINE vf load(const bf16* p) {
  vu bits;
  for (int i = 0; i < kLanes; i++) bits[i] = uint32_t(p[i]) << 16;
  return (vf)bits;
}
FASTSCNN_INLINE vf load(const uint8_t* p) {
  vf v;
  for (int i = 0; i < kLanes; i++) v[i] = float(p[i]);
  return v;
}
#endif
// The upper half of each lane is the nearest bf16.
FASTSCNN_INLINE vu rounded_to_bf16(vf v) {
  const vu bits = (vu)v;
  return (v == v) ? bits + 0x7FFF + ((bits >> 16) & 1) : (vu)((vi){} + 0x7FC00000);
}
// Neighbouring pairs, the even one in the lower half of its lane, as floats; and back.
FASTSCNN_INLINE vf even(vi pairs) { return (vf)(pairs << 16); }
FASTSCNN_INLINE vf odd(vi pairs) { return (vf)(pairs & (vi)((vu){} + 0xFFFF0000u)); }
// pack: two vectors one after the other.
#if FASTSCNN_BF16
FASTSCNN_INLINE void store(bf16* p, vf v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
}
FASTSCNN_INLINE vi pack(vf first, vf second) { return (vi)_mm512_cvtne2ps_pbh(second, first); }
FASTSCNN_INLINE vi pairs(vf even, vf odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (vi)_mm512_permutexvar_epi16(order, (__m512i)pack(even, odd));
}
#else
FASTSCNN_INLINE void store(bf16* p, vf v) {
  *reinterpret_cast<vs_any*>(p) = __builtin_convertvector(rounded_to_bf16(v) >> 16, vs);
}
FASTSCNN_INLINE vi pack(vf first, vf second) {
  const vs halves[2] = {__builtin_convertvector(rounded_to_bf16(first) >> 16, vs),
                        __builtin_convertvector(rounded_to_bf16(second) >> 16, vs)};
#if FASTSCNN_LANES == 16
  return (vi)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)halves[0]), (__m256i)halves[1], 1);
#elif FASTSCNN_LANES == 8
  return (vi)_mm256_set_m128i((__m128i)halves[1], (__m128i)halves[0]);
#else
  vi both;
  __builtin_memcpy(&both, halves, sizeof both);
  return both;
#endif
}
FASTSCNN_INLINE vi pairs(vf even, vf odd) {
  return (vi)(rounded_to_bf16(even) >> 16 | (rounded_to_bf16(odd) & 0xFFFF0000u));
}
#endif

#if FASTSCNN_LANES == 16
FASTSCNN_INLINE vf splat(float x) { return _mm512_set1_ps(x); }
FASTSCNN_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
FASTSCNN_INLINE vf at_least(vf low, vf v) { return _mm512_max_ps(low, v); }
FASTSCNN_INLINE vf at_most(vf high, vf v) { return _mm512_min_ps(high, v); }
FASTSCNN_INLINE void stream(float* p, vf v) { _mm512_stream_ps(p, v); }
FASTSCNN_INLINE vf permute(vf v, vi index) { return _mm512_permutexvar_ps((__m512i)index, v); }
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
FASTSCNN_INLINE vf permute(vf v, vi index) { return _mm256_permutevar8x32_ps(v, (__m256i)index); }
#else
FASTSCNN_INLINE vf splat(float x) { return x - vf{}; }
FASTSCNN_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
FASTSCNN_INLINE vf at_least(vf low, vf v) { return v < low ? low : v; }
FASTSCNN_INLINE vf at_most(vf high, vf v) { return v > high ? high : v; }
FASTSCNN_INLINE void stream(float* p, vf v) { *reinterpret_cast<vf*>(p) = v; }
FASTSCNN_INLINE vf permute(vf v, vi index) {
  vf permuted;
  for (int i = 0; i < kLanes; i++) permuted[i] = v[index[i]];
  return permuted;
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
// Three planes' vectors to pixels: part(0), part(1) and part(2) are their interleaved values.
struct Interleave3 {
  vi from[3], channel[3];
  Interleave3() {
    for (int i = 0; i < 3 * kLanes; i++) {
      from[i / kLanes][i % kLanes] = i / 3;
      channel[i / kLanes][i % kLanes] = i % 3;
    }
  }
  FASTSCNN_INLINE vf part(int i, const vf (&planes)[3]) const {
    const vf a = permute(planes[0], from[i]), b = permute(planes[1], from[i]),
             c = permute(planes[2], from[i]);
    return channel[i] == 0 ? a : channel[i] == 1 ? b : c;
  }
};

// Compilers else load a value anew for each FMA that takes it: as often as there are FMAs.
FASTSCNN_INLINE void keep_in_register(vf& v) {
#if FASTSCNN_LANES != 4
  asm("" : "+v"(v));
#else
  (void)v;
#endif
}
// Orders streamed stores before whatever tells another thread that they are done.
FASTSCNN_INLINE void stream_fence() {
#if FASTSCNN_LANES != 4
  _mm_sfence();
#endif
}

FASTSCNN_INLINE int min_of(int a, int b) { return a < b ? a : b; }
FASTSCNN_INLINE int max_of(int a, int b) { return a > b ? a : b; }
FASTSCNN_INLINE size_t largest(size_t a, size_t b) { return a > b ? a : b; }

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
#if FASTSCNN_AMX
#include "tile_shapes.inl"
#endif
