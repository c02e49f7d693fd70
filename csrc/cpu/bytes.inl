// Vectors of bytes and of what int8 computes with them, for 4 * LANES channels: four vectors of
// LANES int32 hold their sums, in the order in which unpacking takes bytes apart and packing puts
// them together again (place_in_block in layer.h). The arithmetic is program/integers.py's to the
// last bit: no fused multiply-adds.
template <int LANES>
struct Bytes;

#if FASTSCNN_LANES == 16
template <>
struct Bytes<16> {
  using ints = __m512i;  // of 8, 16 or 32 bits
  using floats = __m512;
  static constexpr int kChannels = 64;
  FASTSCNN_INLINE static ints load(const void* p) { return _mm512_loadu_si512(p); }
  FASTSCNN_INLINE static void store(void* p, ints v) { _mm512_storeu_si512(p, v); }
  FASTSCNN_INLINE static floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
  FASTSCNN_INLINE static void store_floats(float* p, floats v) { _mm512_storeu_ps(p, v); }
  FASTSCNN_INLINE static ints zero() { return _mm512_setzero_si512(); }
  FASTSCNN_INLINE static ints fours(int32_t v) { return _mm512_set1_epi32(v); }
  FASTSCNN_INLINE static ints twos(int v) { return _mm512_set1_epi16(short(v)); }
  FASTSCNN_INLINE static floats all(float v) { return _mm512_set1_ps(v); }
  // sums + a's four uint8 times b's four int8.
  FASTSCNN_INLINE static ints multiply_add(ints a, ints b, ints sums) {
#if FASTSCNN_VNNI || FASTSCNN_AMX
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));  // the intrinsic makes compilers copy
    return sums;
#else
    const ints even = _mm512_madd_epi16(_mm512_and_si512(a, twos(0xFF)),
                                        _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8));
    const ints odd = _mm512_madd_epi16(_mm512_srli_epi16(a, 8), _mm512_srai_epi16(b, 8));
    return _mm512_add_epi32(sums, _mm512_add_epi32(even, odd));
#endif
  }
  FASTSCNN_INLINE static ints add(ints a, ints b) { return _mm512_add_epi32(a, b); }
  FASTSCNN_INLINE static ints subtract(ints a, ints b) { return _mm512_sub_epi32(a, b); }
  FASTSCNN_INLINE static floats to_floats(ints v) { return _mm512_cvtepi32_ps(v); }
  FASTSCNN_INLINE static ints to_ints(floats v) { return _mm512_cvtps_epi32(v); }
  FASTSCNN_INLINE static floats multiply(floats a, floats b) {
    floats v = _mm512_mul_ps(a, b);
    asm("" : "+v"(v));  // or it would become part of a fused multiply-add
    return v;
  }
  FASTSCNN_INLINE static floats add(floats a, floats b) { return _mm512_add_ps(a, b); }
  // NaN becomes 0.
  FASTSCNN_INLINE static floats to_pixels(floats v) {
    return _mm512_min_ps(_mm512_max_ps(v, _mm512_setzero_ps()), all(255));
  }
  FASTSCNN_INLINE static ints unpack_low8(ints a, ints b) { return _mm512_unpacklo_epi8(a, b); }
  FASTSCNN_INLINE static ints unpack_high8(ints a, ints b) { return _mm512_unpackhi_epi8(a, b); }
  FASTSCNN_INLINE static ints unpack_low16(ints a, ints b) { return _mm512_unpacklo_epi16(a, b); }
  FASTSCNN_INLINE static ints unpack_high16(ints a, ints b) { return _mm512_unpackhi_epi16(a, b); }
  FASTSCNN_INLINE static ints pack32(ints a, ints b) { return _mm512_packs_epi32(a, b); }
  FASTSCNN_INLINE static ints pack16(ints a, ints b) { return _mm512_packus_epi16(a, b); }
  FASTSCNN_INLINE static ints add_saturated16(ints a, ints b) { return _mm512_adds_epi16(a, b); }
  FASTSCNN_INLINE static ints at_least8(ints a, ints b) { return _mm512_max_epu8(a, b); }
  FASTSCNN_INLINE static ints bytes(int v) { return _mm512_set1_epi8(char(v)); }
  // a + (b - a) * share / 2^15 to nearest, of 16 bits.
  FASTSCNN_INLINE static ints between(ints a, ints b, ints share) {
    return _mm512_add_epi16(a, _mm512_mulhrs_epi16(_mm512_sub_epi16(b, a), share));
  }
  FASTSCNN_INLINE static ints shift_left16(ints v, int by) { return _mm512_slli_epi16(v, by); }
  FASTSCNN_INLINE static ints shift_right16(ints v, int by) { return _mm512_srli_epi16(v, by); }
  FASTSCNN_INLINE static ints add16(ints a, ints b) { return _mm512_add_epi16(a, b); }
};
#endif

#if FASTSCNN_LANES >= 8
template <>
struct Bytes<8> {
  using ints = __m256i;
  using floats = __m256;
  static constexpr int kChannels = 32;
  FASTSCNN_INLINE static ints load(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  FASTSCNN_INLINE static void store(void* p, ints v) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), v);
  }
  FASTSCNN_INLINE static floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
  FASTSCNN_INLINE static void store_floats(float* p, floats v) { _mm256_storeu_ps(p, v); }
  FASTSCNN_INLINE static ints zero() { return _mm256_setzero_si256(); }
  FASTSCNN_INLINE static ints fours(int32_t v) { return _mm256_set1_epi32(v); }
  FASTSCNN_INLINE static ints twos(int v) { return _mm256_set1_epi16(short(v)); }
  FASTSCNN_INLINE static floats all(float v) { return _mm256_set1_ps(v); }
  FASTSCNN_INLINE static ints multiply_add(ints a, ints b, ints sums) {
#if (FASTSCNN_VNNI || FASTSCNN_AMX) && FASTSCNN_LANES == 16
    return _mm256_dpbusd_epi32(sums, a, b);
#elif FASTSCNN_VNNI
    return _mm256_dpbusd_avx_epi32(sums, a, b);
#else
    const ints even = _mm256_madd_epi16(_mm256_and_si256(a, twos(0xFF)),
                                        _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
    const ints odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
    return _mm256_add_epi32(sums, _mm256_add_epi32(even, odd));
#endif
  }
  FASTSCNN_INLINE static ints add(ints a, ints b) { return _mm256_add_epi32(a, b); }
  FASTSCNN_INLINE static ints subtract(ints a, ints b) { return _mm256_sub_epi32(a, b); }
  FASTSCNN_INLINE static floats to_floats(ints v) { return _mm256_cvtepi32_ps(v); }
  FASTSCNN_INLINE static ints to_ints(floats v) { return _mm256_cvtps_epi32(v); }
  FASTSCNN_INLINE static floats multiply(floats a, floats b) {
    floats v = _mm256_mul_ps(a, b);
    asm("" : "+x"(v));
    return v;
  }
  FASTSCNN_INLINE static floats add(floats a, floats b) { return _mm256_add_ps(a, b); }
  FASTSCNN_INLINE static floats to_pixels(floats v) {
    return _mm256_min_ps(_mm256_max_ps(v, _mm256_setzero_ps()), all(255));
  }
  FASTSCNN_INLINE static ints unpack_low8(ints a, ints b) { return _mm256_unpacklo_epi8(a, b); }
  FASTSCNN_INLINE static ints unpack_high8(ints a, ints b) { return _mm256_unpackhi_epi8(a, b); }
  FASTSCNN_INLINE static ints unpack_low16(ints a, ints b) { return _mm256_unpacklo_epi16(a, b); }
  FASTSCNN_INLINE static ints unpack_high16(ints a, ints b) { return _mm256_unpackhi_epi16(a, b); }
  FASTSCNN_INLINE static ints pack32(ints a, ints b) { return _mm256_packs_epi32(a, b); }
  FASTSCNN_INLINE static ints pack16(ints a, ints b) { return _mm256_packus_epi16(a, b); }
  FASTSCNN_INLINE static ints add_saturated16(ints a, ints b) { return _mm256_adds_epi16(a, b); }
  FASTSCNN_INLINE static ints at_least8(ints a, ints b) { return _mm256_max_epu8(a, b); }
  FASTSCNN_INLINE static ints bytes(int v) { return _mm256_set1_epi8(char(v)); }
  FASTSCNN_INLINE static ints between(ints a, ints b, ints share) {
    return _mm256_add_epi16(a, _mm256_mulhrs_epi16(_mm256_sub_epi16(b, a), share));
  }
  FASTSCNN_INLINE static ints shift_left16(ints v, int by) { return _mm256_slli_epi16(v, by); }
  FASTSCNN_INLINE static ints shift_right16(ints v, int by) { return _mm256_srli_epi16(v, by); }
  FASTSCNN_INLINE static ints add16(ints a, ints b) { return _mm256_add_epi16(a, b); }
};
#endif

#if FASTSCNN_LANES == 4
template <>
struct Bytes<4> {
  typedef int32_t ints __attribute__((vector_size(16)));
  typedef float floats __attribute__((vector_size(16)));
  typedef int16_t words __attribute__((vector_size(16)));
  typedef uint16_t positive_words __attribute__((vector_size(16)));
  typedef uint8_t octets __attribute__((vector_size(16)));
  typedef int8_t signed_octets __attribute__((vector_size(16)));
  static constexpr int kChannels = 16;
  FASTSCNN_INLINE static ints load(const void* p) {
    ints v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  FASTSCNN_INLINE static void store(void* p, ints v) { __builtin_memcpy(p, &v, sizeof v); }
  FASTSCNN_INLINE static floats load_floats(const float* p) { return (floats)load(p); }
  FASTSCNN_INLINE static void store_floats(float* p, floats v) { store(p, (ints)v); }
  FASTSCNN_INLINE static ints zero() { return ints{}; }
  FASTSCNN_INLINE static ints fours(int32_t v) { return ints{} + v; }
  FASTSCNN_INLINE static ints twos(int v) { return (ints)(words{} + int16_t(v)); }
  FASTSCNN_INLINE static floats all(float v) { return v - floats{}; }
  FASTSCNN_INLINE static ints multiply_add(ints a, ints b, ints sums) {
    // Products of bytes fit 16 bits.
    const words low = (words)(a & 0x00FF00FF) * (((words)b << 8) >> 8);
    const words high = (words)((positive_words)a >> 8) * ((words)b >> 8);
    sums += (((ints)low << 16) >> 16) + ((ints)low >> 16);
    sums += (((ints)high << 16) >> 16) + ((ints)high >> 16);
    return sums;
  }
  FASTSCNN_INLINE static ints add(ints a, ints b) { return a + b; }
  FASTSCNN_INLINE static ints subtract(ints a, ints b) { return a - b; }
  FASTSCNN_INLINE static floats to_floats(ints v) {
    floats f;
    for (int i = 0; i < 4; i++) f[i] = float(v[i]);
    return f;
  }
  // To nearest, ties to even, of what is clamped first, far beyond all that has 8 bits.
  FASTSCNN_INLINE static ints to_ints(floats v) {
    const floats most = all(4096), magic = all(12582912.0f);  // 1.5 * 2^23
    v = v < -most ? -most : v > most ? most : v;
    return (ints)(v + magic) - fours(0x4B400000);
  }
  FASTSCNN_INLINE static floats multiply(floats a, floats b) {
    floats v = a * b;
    asm("" : "+m"(v));
    return v;
  }
  FASTSCNN_INLINE static floats add(floats a, floats b) { return a + b; }
  FASTSCNN_INLINE static floats to_pixels(floats v) {
    v = v > floats{} ? v : floats{};
    return v < all(255) ? v : all(255);
  }
  FASTSCNN_INLINE static ints unpack_low8(ints a, ints b) {
    octets v;
    for (int i = 0; i < 8; i++) v[2 * i] = ((octets)a)[i], v[2 * i + 1] = ((octets)b)[i];
    return (ints)v;
  }
  FASTSCNN_INLINE static ints unpack_high8(ints a, ints b) {
    octets v;
    for (int i = 0; i < 8; i++) v[2 * i] = ((octets)a)[8 + i], v[2 * i + 1] = ((octets)b)[8 + i];
    return (ints)v;
  }
  FASTSCNN_INLINE static ints unpack_low16(ints a, ints b) {
    words v;
    for (int i = 0; i < 4; i++) v[2 * i] = ((words)a)[i], v[2 * i + 1] = ((words)b)[i];
    return (ints)v;
  }
  FASTSCNN_INLINE static ints unpack_high16(ints a, ints b) {
    words v;
    for (int i = 0; i < 4; i++) v[2 * i] = ((words)a)[4 + i], v[2 * i + 1] = ((words)b)[4 + i];
    return (ints)v;
  }
  static int16_t saturated16(int32_t v) {
    return int16_t(v < -32768 ? -32768 : v > 32767 ? 32767 : v);
  }
  FASTSCNN_INLINE static ints pack32(ints a, ints b) {
    words v;
    for (int i = 0; i < 4; i++) v[i] = saturated16(a[i]), v[4 + i] = saturated16(b[i]);
    return (ints)v;
  }
  FASTSCNN_INLINE static ints pack16(ints a, ints b) {
    octets v;
    for (int i = 0; i < 8; i++) {
      const int16_t x = ((words)a)[i], y = ((words)b)[i];
      v[i] = uint8_t(x < 0     ? 0
                     : x > 255 ? 255
                               : x),
      v[8 + i] = uint8_t(y < 0     ? 0
                         : y > 255 ? 255
                                   : y);
    }
    return (ints)v;
  }
  FASTSCNN_INLINE static ints add_saturated16(ints a, ints b) {
    words v;
    for (int i = 0; i < 8; i++) v[i] = saturated16(int32_t(((words)a)[i]) + ((words)b)[i]);
    return (ints)v;
  }
  FASTSCNN_INLINE static ints at_least8(ints a, ints b) {
    return (ints)((octets)a > (octets)b ? (octets)a : (octets)b);
  }
  FASTSCNN_INLINE static ints bytes(int v) { return (ints)(octets{} + uint8_t(v)); }
  FASTSCNN_INLINE static ints between(ints a, ints b, ints share) {
    words v;
    for (int i = 0; i < 8; i++) {
      const int32_t x = ((words)a)[i], y = ((words)b)[i], w = ((words)share)[i];
      v[i] = int16_t(x + (((y - x) * w + (1 << 14)) >> 15));
    }
    return (ints)v;
  }
  FASTSCNN_INLINE static ints shift_left16(ints v, int by) { return (ints)((words)v << by); }
  FASTSCNN_INLINE static ints shift_right16(ints v, int by) {
    return (ints)((positive_words)v >> by);
  }
  FASTSCNN_INLINE static ints add16(ints a, ints b) { return (ints)((words)a + (words)b); }
};
#endif

// 32 channels in two panels, as 16, 8 or 4 at a time of each: where their sums become bytes.
#if FASTSCNN_LANES == 16
struct Tail {
  using B = Bytes<16>;
  static constexpr int kVectors = 2, kColumns = 32;
  FASTSCNN_INLINE static void widen(const uint8_t* p, B::ints (&fours)[2]) {
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    const __m256i x = _mm256_permutevar8x32_epi32(Bytes<8>::load(p), order);
    fours[0] = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(x));
    fours[1] = _mm512_cvtepu8_epi32(_mm256_extracti128_si256(x, 1));
  }
  // Those of two pixels.
  FASTSCNN_INLINE static B::ints narrow(const B::floats (&a)[2], const B::floats (&b)[2],
                                        B::ints zeros16) {
    const auto first = B::add_saturated16(B::pack32(B::to_ints(a[0]), B::to_ints(a[1])), zeros16);
    const auto second = B::add_saturated16(B::pack32(B::to_ints(b[0]), B::to_ints(b[1])), zeros16);
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7),
                                    B::pack16(first, second));
  }
};
#else
struct Tail {
  using B = Bytes<FASTSCNN_LANES>;
  static constexpr int kVectors = 4, kColumns = 4 * FASTSCNN_LANES;
#if FASTSCNN_LANES == 8
  FASTSCNN_INLINE static void widen(const uint8_t* p, B::ints (&fours)[4]) {
    for (int half = 0; half < 2; half++) {
      __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * half));
      x = _mm_shuffle_epi32(x, _MM_SHUFFLE(3, 1, 2, 0));
      fours[2 * half] = _mm256_cvtepu8_epi32(x);
      fours[2 * half + 1] = _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(x, x));
    }
  }
  FASTSCNN_INLINE static B::ints in_order(B::ints v) {
    return _mm256_permute4x64_epi64(v, _MM_SHUFFLE(3, 1, 2, 0));
  }
#else
  FASTSCNN_INLINE static void widen(const uint8_t* p, B::ints (&fours)[4]) {
    for (int v = 0; v < 4; v++)
      for (int i = 0; i < 4; i++) fours[v][i] = p[4 * v + i];
  }
  FASTSCNN_INLINE static B::ints in_order(B::ints v) { return v; }
#endif
};
#endif

using WideBytes = Bytes<kLanes>;
using NarrowBytes = Bytes<(kLanes > 8 ? 8 : kLanes)>;

// run(Bytes, first channel) over all channels, a multiple of 32.
template <class Run>
FASTSCNN_INLINE void for_channels(int channels, Run run) {
  int c = 0;
  for (; c + WideBytes::kChannels <= channels; c += WideBytes::kChannels) run(WideBytes{}, c);
  for (; c < channels; c += NarrowBytes::kChannels) run(NarrowBytes{}, c);
}

// Bytes of three rows of the same channels (and zeros) side by side, as four vectors of fours.
template <class B>
FASTSCNN_INLINE void interleave(typename B::ints a, typename B::ints b, typename B::ints c,
                                typename B::ints (&fours)[4]) {
  const auto zero = B::zero();
  const auto ab_low = B::unpack_low8(a, b), ab_high = B::unpack_high8(a, b);
  const auto c_low = B::unpack_low8(c, zero), c_high = B::unpack_high8(c, zero);
  fours[0] = B::unpack_low16(ab_low, c_low), fours[1] = B::unpack_high16(ab_low, c_low);
  fours[2] = B::unpack_low16(ab_high, c_high), fours[3] = B::unpack_high16(ab_high, c_high);
}
// Bytes as int32.
template <class B>
FASTSCNN_INLINE void widen(typename B::ints bytes, typename B::ints (&fours)[4]) {
  interleave<B>(bytes, B::zero(), B::zero(), fours);
}
// clamp(rint(values) + zero, 0, 255): saturation does the same as the clamp.
template <class B>
FASTSCNN_INLINE typename B::ints narrow(const typename B::floats (&values)[4],
                                        typename B::ints zeros16) {
  const auto low = B::pack32(B::to_ints(values[0]), B::to_ints(values[1]));
  const auto high = B::pack32(B::to_ints(values[2]), B::to_ints(values[3]));
  return B::pack16(B::add_saturated16(low, zeros16), B::add_saturated16(high, zeros16));
}
