// What becomes of int8's sums: bytes again, or the float logits of the last product
// (program/integers.py). Activations need nothing: saturation at 0 and 255 is theirs.
struct Clamp {
  int low;  // of bytes
};
FASTSCNN_INLINE Clamp clamp_of(Activation) { return {0}; }
// What feature_fusion does after its resize.
FASTSCNN_INLINE Clamp refined_clamp(const Layer& l, const Weights& w) {
  return {l.dense ? *w.expand.zero : 0};
}

constexpr bool kPaired = kLanes == 16;  // whether two pixels' sums are finished together

template <class Out, bool ADD>
struct Finish {
  using B = WideBytes;
  using ints = typename B::ints;
  using floats = typename B::floats;
  // Copies: stores of bytes might change what they are copies of, as far as a compiler knows.
  const float* multipliers;
  int zero, whole, add_zero;
  float add_multiplier;
  const element* add;
  size_t ld_add;
  Out* out;
  size_t ld_out;

  Finish(const Gemm& b, const element* add_, size_t ld_add_, Out* out_, size_t ld_out_)
      : multipliers(b.multiplier),
        zero(b.zero ? *b.zero : 0),
        whole(b.n / kByteBlock * kByteBlock),
        add_zero(ADD ? *b.add_zero : 0),
        add_multiplier(ADD ? *b.add_multiplier : 0),
        add(add_),
        ld_add(ld_add_),
        out(out_),
        ld_out(ld_out_) {}

  // Sums of NV vectors times their multipliers, plus what is added.
  template <class V, int NV>
  FASTSCNN_INLINE void values(const ints (&sums)[NV], int pixel, int column,
                              floats (&v)[NV]) const {
    const float* multiplier = multipliers + V::place(column);
#pragma GCC unroll 4
    for (int i = 0; i < NV; i++)
      v[i] = B::multiply(B::to_floats(sums[i]), B::load_floats(multiplier + V::next(i, kPanel)));
    if constexpr (ADD) {
      const element* p = add + pixel * ld_add + column;
      ints x[NV];
      if constexpr (__is_same(V, WideColumns))
        widen<B>(B::load(p), x);
      else
        Tail::widen(p, x);
      const auto nothing = B::fours(add_zero);
      const auto own = B::all(add_multiplier);
#pragma GCC unroll 4
      for (int i = 0; i < NV; i++)
        v[i] = B::add(v[i], B::multiply(B::to_floats(B::subtract(x[i], nothing)), own));
    }
  }
  FASTSCNN_INLINE Out* at(int pixel, int column) const { return out + pixel * ld_out + column; }

  // The columns of one pixel.
  FASTSCNN_INLINE void vectors(const ints (&sums)[4], int pixel, int column) const {
    floats v[4];
    const auto zeros = B::twos(zero);
#if FASTSCNN_LANES != 16
    if (column >= whole) {
      values<TailColumns>(sums, pixel, column, v);
      return B::store(at(pixel, column), Tail::in_order(narrow<B>(v, zeros)));
    }
#endif
    values<WideColumns>(sums, pixel, column, v);
    B::store(at(pixel, column), narrow<B>(v, zeros));
  }
  FASTSCNN_INLINE void vectors(const ints (&sums)[2], int pixel, int column) const {
    floats v[2];
    if constexpr (__is_same(Out, float)) {
      values<LogitColumns>(sums, pixel, column, v);
      for (int i = 0; i < 2; i++)
        if (size_t(column + i * kLanes) < ld_out)
          B::store_floats(at(pixel, column) + i * kLanes, v[i]);
    } else {
#if FASTSCNN_LANES == 16
      values<TailColumns>(sums, pixel, column, v);
      const auto bytes = Tail::narrow(v, v, B::twos(zero));
      Bytes<8>::store(at(pixel, column), _mm512_castsi512_si256(bytes));
#endif
    }
  }
#if FASTSCNN_LANES == 16
  // Those of two.
  FASTSCNN_INLINE void pair(const ints (&first)[2], const ints (&second)[2], int pixel,
                            int column) const {
    if constexpr (__is_same(Out, float)) {
      vectors(first, pixel, column);
      vectors(second, pixel + 1, column);
    } else {
      floats a[2], c[2];
      values<TailColumns>(first, pixel, column, a);
      values<TailColumns>(second, pixel + 1, column, c);
      const auto bytes = Tail::narrow(a, c, B::twos(zero));
      Bytes<8>::store(at(pixel, column), _mm512_castsi512_si256(bytes));
      Bytes<8>::store(at(pixel + 1, column), _mm512_extracti64x4_epi64(bytes, 1));
    }
  }
#endif
};

template <class Out>
struct Epilogue {
  static constexpr bool kBytes = __is_same(Out, element);
  template <bool BYTES, class A, class C>
  struct Either {
    using type = A;
  };
  template <class A, class C>
  struct Either<false, A, C> {
    using type = C;
  };
  using Wide = typename Either<kBytes, WideColumns, LogitColumns>::type;
  using Narrow = typename Either<kBytes, TailColumns, LogitColumns>::type;
  static constexpr int kWhole = kBytes ? kByteBlock : Wide::kColumns;

  const Gemm* b;
  Out* out;
  size_t ld_out;       // elements from pixel to pixel
  const element* add;  // null, or added before rounding
  size_t ld_add;

  // run(Finish), its choices made.
  template <class Run>
  FASTSCNN_INLINE void apply(Run run) const {
    if constexpr (kBytes)
      if (add) return run(Finish<Out, true>(*b, add, ld_add, out, ld_out));
    run(Finish<Out, false>(*b, nullptr, 0, out, ld_out));
  }
};
