// One row of a depthwise 3x3: rows[ky] points at pixel 0 of the input row of tap ky (null: outside
// the image) and is padded with `dilation` zero pixels. The columns that neighbouring outputs share
// are loaded once per block of kDepthwisePixels outputs.
constexpr int kDepthwisePixels = 8;

// DILATION 0: known at run time only.
template <int STRIDE, int DILATION, int PIXELS>
FASTSCNN_INLINE void depthwise_block(const float* const (&rows)[3], int x, int dilation,
                                     const Depthwise& d, Clamp clamp, float* out) {
  const size_t channels = d.channels;
  for (size_t c = 0; c < channels; c += kLanes) {
    vf acc[PIXELS];
    const vf bias = load(d.bias + c);
#pragma GCC unroll 8
    for (int i = 0; i < PIXELS; i++) acc[i] = bias;
#pragma GCC unroll 3
    for (int ky = 0; ky < 3; ky++) {
      if (!rows[ky]) continue;
      vf w[3];
#pragma GCC unroll 3
      for (int kx = 0; kx < 3; kx++) w[kx] = load(d.weight + (ky * 3 + kx) * channels + c);
      if constexpr (DILATION == 0) {
        for (int kx = 0; kx < 3; kx++) {
          const float* p = rows[ky] + (ptrdiff_t(x) * STRIDE + (kx - 1) * dilation) * channels + c;
#pragma GCC unroll 8
          for (int i = 0; i < PIXELS; i++)
            acc[i] = fma(load(p + i * STRIDE * channels), w[kx], acc[i]);
        }
      } else {
        const float* p = rows[ky] + (ptrdiff_t(x) * STRIDE - DILATION) * channels + c;
#pragma GCC unroll 32
        for (int j = 0; j <= (PIXELS - 1) * STRIDE + 2 * DILATION; j++) {
          // Input column j serves output i through tap kx where i * STRIDE + kx * DILATION == j.
          bool needed = false;
#pragma GCC unroll 3
          for (int kx = 0; kx < 3; kx++) {
            const int i = j - kx * DILATION;
            needed |= i >= 0 && i % STRIDE == 0 && i / STRIDE < PIXELS;
          }
          if (!needed) continue;
          const vf v = load(p + j * channels);
#pragma GCC unroll 3
          for (int kx = 0; kx < 3; kx++) {
            const int i = j - kx * DILATION;
            if (i >= 0 && i % STRIDE == 0 && i / STRIDE < PIXELS)
              acc[i / STRIDE] = fma(v, w[kx], acc[i / STRIDE]);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < PIXELS; i++) store(out + (x + i) * channels + c, clamp(acc[i]));
  }
}

template <int STRIDE, int DILATION>
void depthwise_row(const float* const (&rows)[3], int width, int dilation, const Depthwise& d,
                   Clamp clamp, float* out) {
  constexpr int P = kDepthwisePixels;
  int x = 0;
  for (; x + P <= width; x += P)
    depthwise_block<STRIDE, DILATION, P>(rows, x, dilation, d, clamp, out);
  if (x == width) return;
  if (width >= P)  // the last block overlaps its neighbour: same values, no tail code
    depthwise_block<STRIDE, DILATION, P>(rows, width - P, dilation, d, clamp, out);
  else
    for (; x < width; x++) depthwise_block<STRIDE, DILATION, 1>(rows, x, dilation, d, clamp, out);
}

// `width` outputs of row y of a depthwise convolution over `in`, which holds the rows it needs.
static void depthwise(const Ring& in, int y, int stride, int dilation, int width,
                      const Depthwise& d, Clamp clamp, float* out) {
  const int middle = y * stride;
  const float* const rows[3] = {in.at(middle - dilation), in.at(middle), in.at(middle + dilation)};
  if (dilation == 1)
    (stride == 1 ? depthwise_row<1, 1> : depthwise_row<2, 1>)(rows, width, 1, d, clamp, out);
  else if (dilation == 4 && stride == 1)
    depthwise_row<1, 4>(rows, width, 4, d, clamp, out);
  else
    (stride == 1 ? depthwise_row<1, 0> : depthwise_row<2, 0>)(rows, width, dilation, d, clamp, out);
}
