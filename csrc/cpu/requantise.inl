// What becomes of int8's sums: bytes again, or the float logits of the last product (program/integers.py). Activations need
// nothing: saturation at 0 and 255 is theirs.
struct Clamp {
  int low;  // of bytes
};
FASTSCNN_INLINE Clamp clamp_of(Activation) { return {0}; }
// What feature_fusion does after its resize.
FASTSCNN_INLINE Clamp refined_clamp(const Layer& l, const Weights& w) {
  return {l.dense ? *w.expand.zero : 0};
}

#if FASTSCNN_LANES == 16
FASTSCNN_INLINE Bytes<16> bytes_of_sums(const __m512i&) { return {}; }
#endif
#if FASTSCNN_LANES >= 8
FASTSCNN_INLINE Bytes<8> bytes_of_sums(const __m256i&) { return {}; }
#else
FASTSCNN_INLINE Bytes<4> bytes_of_sums(const Bytes<4>::ints&) { return {}; }
#endif

// The sums of a vector of bytes times their multipliers.
template <class B>
FASTSCNN_INLINE void scale(const typename B::ints (&sums)[4], const float* multiplier,
                           typename B::floats (&values)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    values[i] =
        B::multiply(B::to_floats(sums[i]), B::load_floats(multiplier + i * kPanel));
}

template <class Out, bool ADD>
struct Finish {
  const Gemm* b;
  const element* add;
  size_t ld_add;
  Out* out;
  size_t ld_out;

  // The columns of one pixel that become a vector of bytes.
  template <class S>
  FASTSCNN_INLINE void vectors(const S (&sums)[4], int pixel, int column) const {
    using B = decltype(bytes_of_sums(sums[0]));
    typename B::floats values[4];
    scale<B>(sums, b->multiplier + place_of(column), values);
    if constexpr (ADD) {
      typename B::ints x[4];
      widen<B>(B::load(add + pixel * ld_add + column), x);
      const auto zero = B::fours(*b->add_zero);
      const auto multiplier = B::all(*b->add_multiplier);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++)
        values[i] = B::add(values[i],
                           B::multiply(B::to_floats(B::subtract(x[i], zero)), multiplier));
    }
    Out* to = out + pixel * ld_out + column;
    if constexpr (__is_same(Out, element)) {
      B::store(to, narrow<B>(values, B::twos(*b->zero)));
    } else {  // as many of four as the pixel has
      constexpr int kFours = B::kChannels / 16;
      for (int i = 0; i < 4; i++) {
        float four[4 * kFours];
        B::store_floats(four, values[i]);
        for (int f = 0; f < kFours; f++)
          if (size_t(column + 16 * f + 4 * i) < ld_out)
            __builtin_memcpy(to + 16 * f + 4 * i, four + 4 * f, 4 * sizeof(float));
      }
    }
  }
};

template <class Out>
struct Epilogue {
  const Gemm* b;
  Out* out;
  size_t ld_out;         // elements from pixel to pixel
  const element* add;    // null, or added before rounding
  size_t ld_add;

  // run(Finish), its choices made.
  template <class Run>
  FASTSCNN_INLINE void apply(Run run) const {
    if constexpr (__is_same(Out, element))
      if (add) return run(Finish<Out, true>{b, add, ld_add, out, ld_out});
    run(Finish<Out, false>{b, nullptr, 0, out, ld_out});
  }
};
