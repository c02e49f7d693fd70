// What becomes of sums in registers before they are memory: act(sums [+ add]), converted to the
// result's elements. Products, in registers or in tiles, and the depthwise all end here, those of
// int8 in requantise.inl. Pixels and columns are those of the result.

// An activation as a clamp; none has infinite bounds.
struct Floor {
  float low;
  FASTSCNN_INLINE vf operator()(vf v) const { return at_least(splat(low), v); }
};
struct Clamp {
  float low, high;
  FASTSCNN_INLINE vf operator()(vf v) const {
    return at_most(splat(high), at_least(splat(low), v));
  }
  // Runs what takes a clamp without its upper bound, which costs as much as an FMA, where there is
  // none.
  template <class Run>
  FASTSCNN_INLINE void apply(Run run) const {
    if (high == __builtin_inff())
      run(Floor{low});
    else
      run(*this);
  }
};
FASTSCNN_INLINE Clamp clamp_of(Activation a) {
  const float inf = __builtin_inff();
  return {a == Activation::none ? -inf : 0.0f, a == Activation::relu6 ? 6.0f : inf};
}

// What feature_fusion does after its resize: a dense 1x1's ReLU comes there.
FASTSCNN_INLINE Clamp refined_clamp(const Layer& l, const Weights&) {
  return clamp_of(l.dense ? Activation::relu : Activation::none);
}

FASTSCNN_INLINE void store_vectors(float* p, const vf (&v)[1]) { store(p, v[0]); }
FASTSCNN_INLINE void store_vectors(bf16* p, const vf (&v)[1]) { store(p, v[0]); }
FASTSCNN_INLINE void store_vectors(float* p, const vf (&v)[2]) {
  store(p, v[0]);
  store(p + kLanes, v[1]);
}
FASTSCNN_INLINE void store_vectors(bf16* p, const vf (&v)[2]) {
  store(reinterpret_cast<int32_t*>(p), pack(v[0], v[1]));
}

// An epilogue whose choices are types, so that loops need not ask: ADD, and Bound, how to clamp.
template <class Out, class Add, bool ADD, class Bound>
struct Finish {
  Bound clamp;
  const Add* add;
  size_t ld_add;
  Out* out;
  size_t ld_out;

  // Neighbouring columns of one pixel, NV vectors of them.
  template <int NV>
  FASTSCNN_INLINE void vectors(const vf (&sums)[NV], int pixel, int column) const {
    vf v[NV];
#pragma GCC unroll 2
    for (int i = 0; i < NV; i++) {
      v[i] = sums[i];
      if constexpr (ADD) v[i] += load(add + pixel * ld_add + column + i * kLanes);
      v[i] = clamp(v[i]);
    }
    store_vectors(out + pixel * ld_out + column, v);
  }
  // The same of one vector whose even and odd columns lie apart.
  FASTSCNN_INLINE void parts(const vf (&sums)[2], int pixel, int column) const {
    static_assert(!ADD);
    store(reinterpret_cast<int32_t*>(out + pixel * ld_out + column),
          pairs(clamp(sums[0]), clamp(sums[1])));
  }
  FASTSCNN_INLINE void parts(const vf (&sums)[1], int pixel, int column) const {
    vectors(sums, pixel, column);
  }
};

constexpr bool kPaired = false;  // whether two pixels' sums are finished together

// With Add void nothing is ever added.
template <class Out, class Add = void>
struct Epilogue {
  using Wide = WideColumns;
  using Narrow = NarrowColumns;
  static constexpr int kWhole = Wide::kColumns;
  Clamp clamp;
  Out* out;
  size_t ld_out;             // elements from pixel to pixel
  const Add* add = nullptr;  // null, or added before the clamp
  size_t ld_add = 0;

  // run(Finish), its choices made.
  template <class Run>
  FASTSCNN_INLINE void apply(Run run) const {
    clamp.apply([&](auto bound) {
      using Bound = decltype(bound);
      if constexpr (!__is_same(Add, void))
        if (add) return run(Finish<Out, Add, true, Bound>{bound, add, ld_add, out, ld_out});
      run(Finish<Out, Add, false, Bound>{bound, add, ld_add, out, ld_out});
    });
  }

  // Sums in parts: what comes before the last part is stored as it is, and the next part adds to
  // it.
  Epilogue unfinished() const { return {clamp_of(Activation::none), out, ld_out, add, ld_add}; }
  Epilogue<Out, Out> continued() const { return {clamp, out, ld_out, out, ld_out}; }
};
