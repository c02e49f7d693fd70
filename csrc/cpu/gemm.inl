// C[m][n] = act(bias + sum over segments of A_s[m][k] * B_s[k][n] (+ add[m][n])).
// A's rows are pixels. Several segments are several inputs, or the taps of a convolution, whose
// products are summed before anything is stored. B's layout: layer.h, Gemm.

struct Segment {
  const float* a;  // null: an all-zero input, skipped
  size_t lda;      // floats from pixel to pixel
  int k;
  int first;  // first row of B
};

// Rows (pixels) and vectors of the register tile: the accumulators, one row of B and one broadcast
// fill the 32 (AVX-512) or 16 registers.
constexpr int kTileRows = kLanes == 16 ? 14 : 6;
constexpr int kTileVectors = 2;
constexpr int kTileColumns = kTileVectors * kLanes;

template <int MR, int NV>
FASTSCNN_INLINE void accumulate(const Segment& s, size_t row, const float* b, size_t panel,
                                vf (&acc)[MR][NV]) {
  // Three rows share a base pointer, so that 14 rows need 5 address registers.
  const float* a[(MR + 2) / 3];
#pragma GCC unroll 5
  for (int i = 0; i < (MR + 2) / 3; i++) a[i] = s.a + (row + 3 * i) * s.lda;
  const size_t lda = s.lda;
  b += size_t(s.first) * kBlock;
#pragma GCC unroll 4
  for (int k = 0; k < s.k; k++) {
    vf bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++)
      bv[v] = load(b + v * kLanes / kBlock * panel + v * kLanes % kBlock);
#pragma GCC unroll 14
    for (int m = 0; m < MR; m++) {
      const vf x = splat(a[m / 3][m % 3 * lda + k]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) acc[m][v] = fma(x, bv[v], acc[m][v]);
    }
    b += kBlock;
  }
}

struct Product {
  const Segment* segments;
  int segment_count;
  const Gemm* b;
  Clamp clamp;
  const float* add;  // null, or added before the clamp
  size_t ld_add;
  float* c;
  size_t ldc;
};

template <int MR, int NV>
void tile(const Product& p, int row, int column) {
  vf acc[MR][NV];
  const size_t panel = size_t(p.b->k) * kBlock;
  const float* b = p.b->panels + column / kBlock * panel + column % kBlock;
#pragma GCC unroll 14
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++)
      acc[m][v] = p.b->bias ? load(p.b->bias + column + v * kLanes) : vf{};
  for (int s = 0; s < p.segment_count; s++)
    if (p.segments[s].a) accumulate<MR, NV>(p.segments[s], row, b, panel, acc);
  if (p.add) {
    const float* add = p.add + row * p.ld_add + column;
#pragma GCC unroll 14
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) acc[m][v] += load(add + m * p.ld_add + v * kLanes);
  }
  float* c = p.c + row * p.ldc + column;
#pragma GCC unroll 14
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) store(c + m * p.ldc + v * kLanes, p.clamp(acc[m][v]));
}

using Tile = void (*)(const Product&, int row, int column);
template <int NV>
FASTSCNN_INLINE Tile tile_of(int rows) {
#if FASTSCNN_LANES == 16
  static constexpr Tile tiles[] = {tile<1, NV>,  tile<2, NV>,  tile<3, NV>,  tile<4, NV>,
                                   tile<5, NV>,  tile<6, NV>,  tile<7, NV>,  tile<8, NV>,
                                   tile<9, NV>,  tile<10, NV>, tile<11, NV>, tile<12, NV>,
                                   tile<13, NV>, tile<14, NV>};
#else
  static constexpr Tile tiles[] = {tile<1, NV>, tile<2, NV>, tile<3, NV>,
                                   tile<4, NV>, tile<5, NV>, tile<6, NV>};
#endif
  return tiles[rows - 1];
}

// B's panels stay in L1 while K is small: columns outside. Else A's tile stays and B streams from
// L2.
constexpr int kSmallK = 224;

static void multiply(const Product& p, int m) {
  const int n = p.b->n, tiles = (m + kTileRows - 1) / kTileRows;
  const int rows = m / tiles, longer = m % tiles;  // balanced: no short last tile
  auto columns_of = [&](int column, int row, int count) {
    if (n - column >= kTileColumns)
      tile_of<kTileVectors>(count)(p, row, column);
    else
      tile_of<kTileVectors / 2>(count)(p, row, column);
  };
  if (p.b->k <= kSmallK) {
    for (int column = 0; column < n; column += kTileColumns)
      for (int i = 0, row = 0, count; i < tiles; i++, row += count)
        columns_of(column, row, count = rows + (i < longer));
  } else {
    for (int i = 0, row = 0, count; i < tiles; i++, row += count) {
      count = rows + (i < longer);
      for (int column = 0; column < n; column += kTileColumns) columns_of(column, row, count);
    }
  }
}

// A 1x1 convolution of m pixels.
FASTSCNN_INLINE void pointwise(const Gemm& b, const float* a, size_t lda, int m, Clamp clamp,
                               float* c, size_t ldc, const float* add = nullptr,
                               size_t ld_add = 0) {
  const Segment segment{a, lda, b.k, 0};
  multiply({&segment, 1, &b, clamp, add, ld_add, c, ldc}, m);
}
