// C[m][n] = epilogue(bias + sum over segments of A_s[m][k] * B_s[k][n]): epilogue.inl.
// A's rows are pixels. Several segments are several inputs, or the taps of a convolution, whose
// products are summed before anything is stored. B's layout: layer.h, Gemm. How it is computed:
// gemm.inl, gemm_amx.inl or gemm_amx_int8.inl.

struct Segment {
  const element* a;  // null: an all-zero input, skipped
  size_t lda;        // elements from pixel to pixel
  int k;
  int first;  // first row of B
};

template <class E>
struct Product {
  const Segment* segments;
  int segment_count;
  const Gemm* b;
  E epilogue;
};

template <class E>
FASTSCNN_INLINE Product<E> product_of(const Segment* segments, int count, const Gemm& b,
                                      const E& epilogue) {
  return {segments, count, &b, epilogue};
}

#if FASTSCNN_ARITHMETIC == FASTSCNN_INT8
template <class Out>
FASTSCNN_INLINE Product<Epilogue<Out>> sum_of(const Segment* segments, int count, const Gemm& b,
                                              Clamp, Out* c, const Out* add = nullptr,
                                              int pitch = 0) {
  const size_t ld = pitch ? pitch : b.n;
  if constexpr (__is_same(Out, element))
    return {segments, count, &b, {&b, c, ld, add, ld}};
  else
    return {segments, count, &b, {&b, c, ld, nullptr, 0}};
}
#else
template <class Out, class Add = Out>  // with or without add the same code
FASTSCNN_INLINE Product<Epilogue<Out, Add>> sum_of(const Segment* segments, int count,
                                                   const Gemm& b, Clamp clamp, Out* c,
                                                   const Add* add = nullptr, int = 0) {
  return {segments, count, &b, {clamp, c, size_t(b.n), add, size_t(b.n)}};
}
#endif
// A 1x1 convolution of m pixels, each of `channels` elements; `pitch`: from pixel to pixel of the
// result where it is not the product's n.
template <class Out, class Add = Out>
FASTSCNN_INLINE auto pointwise(const Segment& a, const Gemm& b, Clamp clamp, Out* c,
                               const Add* add = nullptr, int pitch = 0) {
  return sum_of(&a, 1, b, clamp, c, add, pitch);
}
