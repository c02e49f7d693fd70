// Part of a row of a depthwise 3x3: rows[ky] points at pixel 0 of the input row of tap ky (null:
// outside the image) and is padded with `dilation` zero pixels. The columns that neighbouring
// outputs share are loaded once per block of outputs.

// A step along the channels: a vector of floats, or of pairs of bf16 that are taken apart.
#if FASTSCNN_ARITHMETIC == FASTSCNN_BFLOAT16
constexpr int kParts = 2;
FASTSCNN_INLINE void load_parts(const bf16* p, vf (&v)[kParts]) {
  const vi both = load(reinterpret_cast<const int32_t*>(p));
  v[0] = even(both), v[1] = odd(both);
}
// Channels c, c + 2, ... and c + 1, c + 3, ... of a weight's floats: layer.h, Depthwise.
FASTSCNN_INLINE void load_weight_parts(const float* p, size_t c, vf (&v)[kParts]) {
  const float* block = p + c / kBlock * kBlock + c % kBlock / 2;
  v[0] = load(block), v[1] = load(block + kBlock / 2);
}
#else
constexpr int kParts = 1;
FASTSCNN_INLINE void load_parts(const float* p, vf (&v)[kParts]) { v[0] = load(p); }
FASTSCNN_INLINE void load_weight_parts(const float* p, size_t c, vf (&v)[kParts]) {
  v[0] = load(p + c);
}
#endif
constexpr int kPartLanes = kParts * kLanes;
constexpr int kDepthwisePixels = 8;
// Parts and vectors of channels in a block of outputs fill half the registers.
constexpr int kDepthwiseVectors = kLanes == 16 && kParts == 1 ? 2 : 1;
// As many channels at a time as keep the weights and the columns that blocks share in L1.
constexpr int kDepthwiseChannels = 8 * kBlock;

// NV vectors (of parts) of channels from c on; output x is the epilogue's `pixel`. DILATION 0:
// known at run time only.
template <int STRIDE, int DILATION, int PIXELS, int NV>
FASTSCNN_INLINE void depthwise_block(const element* const (&rows)[3], int x, size_t c, int dilation,
                                     const Depthwise& d, const Epilogue<element>& epilogue,
                                     int pixel) {
  constexpr int N = NV * kParts;
  const ptrdiff_t channels = d.channels;
  auto load_weights = [&](const float* p, vf(&w)[NV][kParts]) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) load_weight_parts(p, c + v * kPartLanes, w[v]);
  };
  vf acc[PIXELS][NV][kParts];
  {
    vf bias[NV][kParts];
    load_weights(static_cast<const float*>(d.bias), bias);
#pragma GCC unroll 8
    for (int i = 0; i < PIXELS; i++)
#pragma GCC unroll 2
      for (int n = 0; n < N; n++) acc[i][n / kParts][n % kParts] = bias[n / kParts][n % kParts];
  }
#pragma GCC unroll 3
  for (int ky = 0; ky < 3; ky++) {
    if (!rows[ky]) continue;
    vf w[3][NV][kParts];
#pragma GCC unroll 3
    for (int kx = 0; kx < 3; kx++)
      load_weights(static_cast<const float*>(d.weight) + (ky * 3 + kx) * channels, w[kx]);
    auto serve = [&](int i, int kx, int v, const vf(&column)[kParts]) {
#pragma GCC unroll 2
      for (int part = 0; part < kParts; part++)
        acc[i][v][part] = fma(column[part], w[kx][v][part], acc[i][v][part]);
    };
    auto load_column = [&](const element* p, vf(&column)[kParts]) {
      load_parts(p, column);
#pragma GCC unroll 2
      for (int part = 0; part < kParts; part++) keep_in_register(column[part]);
    };
    if constexpr (DILATION == 0) {
      for (int kx = 0; kx < 3; kx++) {
        const element* p = rows[ky] + (ptrdiff_t(x) * STRIDE + (kx - 1) * dilation) * channels + c;
#pragma GCC unroll 8
        for (int i = 0; i < PIXELS; i++, p += STRIDE * channels)
#pragma GCC unroll 2
          for (int v = 0; v < NV; v++) {
            vf column[kParts];
            load_column(p + v * kPartLanes, column);
            serve(i, kx, v, column);
          }
      }
    } else {
      const element* p = rows[ky] + (ptrdiff_t(x) * STRIDE - DILATION) * channels + c;
#pragma GCC unroll 32
      for (int j = 0; j <= (PIXELS - 1) * STRIDE + 2 * DILATION; j++, p += channels) {
        // Input column j serves output i through tap kx where i * STRIDE + kx * DILATION == j.
        bool needed = false;
#pragma GCC unroll 3
        for (int kx = 0; kx < 3; kx++) {
          const int i = j - kx * DILATION;
          needed |= i >= 0 && i % STRIDE == 0 && i / STRIDE < PIXELS;
        }
        if (!needed) continue;
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) {
          vf column[kParts];
          load_column(p + v * kPartLanes, column);
#pragma GCC unroll 3
          for (int kx = 0; kx < 3; kx++) {
            const int i = j - kx * DILATION;
            if (i >= 0 && i % STRIDE == 0 && i / STRIDE < PIXELS) serve(i / STRIDE, kx, v, column);
          }
        }
      }
    }
  }
  epilogue.apply([&](auto finish) {
#pragma GCC unroll 8
    for (int i = 0; i < PIXELS; i++)
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) finish.parts(acc[i][v], pixel + i, int(c) + v * kPartLanes);
  });
}

template <int STRIDE, int DILATION, int PIXELS>
void depthwise_columns(const element* const (&rows)[3], Range columns, int dilation,
                       const Depthwise& d, const Epilogue<element>& epilogue) {
  constexpr int kStep = kDepthwiseVectors * kPartLanes;
  for (int first = 0; first < d.channels; first += kDepthwiseChannels) {
    const int end = min_of(first + kDepthwiseChannels, d.channels);
    // The last block overlaps its neighbour: same values, no tail code.
    for (int x = columns.begin;; x = min_of(x + PIXELS, columns.end - PIXELS)) {
      const int pixel = x - columns.begin;
      int c = first;
      for (; c + kStep <= end; c += kStep)
        depthwise_block<STRIDE, DILATION, PIXELS, kDepthwiseVectors>(rows, x, c, dilation, d,
                                                                     epilogue, pixel);
      for (; c < end; c += kPartLanes)
        depthwise_block<STRIDE, DILATION, PIXELS, 1>(rows, x, c, dilation, d, epilogue, pixel);
      if (x + PIXELS == columns.end) break;
    }
  }
}

// Columns of row y of a depthwise convolution over `in`, which holds the rows it needs.
static void depthwise(const Ring& in, int y, int stride, int dilation, Range columns,
                      const Depthwise& d, Clamp activation, element* out) {
  const int middle = y * stride;
  const element* const rows[3] = {in.at(middle - dilation), in.at(middle),
                                  in.at(middle + dilation)};
  const Epilogue<element> epilogue{activation, out, size_t(d.channels)};
  auto run = [&](auto wide, auto narrow) {
    (columns.size() < kDepthwisePixels ? narrow : wide)(rows, columns, dilation, d, epilogue);
  };
  constexpr int P = kDepthwisePixels;
  if (dilation == 1 && stride == 1)
    run(depthwise_columns<1, 1, P>, depthwise_columns<1, 1, 1>);
  else if (dilation == 1)
    run(depthwise_columns<2, 1, P>, depthwise_columns<2, 1, 1>);
  else if (dilation == 4 && stride == 1)
    run(depthwise_columns<1, 4, P>, depthwise_columns<1, 4, 1>);
  else if (stride == 1)
    run(depthwise_columns<1, 0, P>, depthwise_columns<1, 0, 1>);
  else
    run(depthwise_columns<2, 0, P>, depthwise_columns<2, 0, 1>);
}
