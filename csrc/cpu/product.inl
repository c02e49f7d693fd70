// C[m][n] = act(bias + sum over segments of A_s[m][k] * B_s[k][n] (+ add[m][n])).
// A's rows are pixels. Several segments are several inputs, or the taps of a convolution, whose
// products are summed before anything is stored. B's layout: layer.h, Gemm. How it is computed:
// gemm.inl or gemm_amx.inl.

struct Segment {
  const element* a;  // null: an all-zero input, skipped
  size_t lda;        // elements from pixel to pixel
  int k;
  int first;  // first row of B
};

template <class Out, class Add>
struct Product {
  const Segment* segments;
  int segment_count;
  const Gemm* b;
  Clamp clamp;
  const Add* add;  // null, or added before the clamp
  size_t ld_add;
  Out* c;
  size_t ldc;
};

// A 1x1 convolution of m pixels, each of `channels` elements.
template <class Out, class Add = Out>
FASTSCNN_INLINE Product<Out, Add> pointwise(const Segment& a, const Gemm& b, Clamp clamp, Out* c,
                                            const Add* add = nullptr) {
  return {&a, 1, &b, clamp, add, size_t(b.n), c, size_t(b.n)};
}
