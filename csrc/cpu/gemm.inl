// The product in registers: inner_product.inl over tiles of pixels and columns.

// Rows (pixels) and vectors of the register tile: the accumulators, one row of B and one broadcast
// fill the 32 (AVX-512) or 16 registers.
constexpr int kRegisterRows = kLanes == 16 ? 14 : 6;
constexpr int kRegisterVectors = 2;
constexpr int kRegisterColumns = kRegisterVectors * kLanes;

template <int MR, int NV>
FASTSCNN_INLINE void accumulate(const Segment& s, size_t row, const unit* b, size_t panel,
                                vsum (&acc)[MR][NV]) {
  // Three rows share a base pointer, so that 14 rows need 5 address registers.
  const size_t lda = s.lda / kUnit;
  const unit_any* a[(MR + 2) / 3];
#pragma GCC unroll 5
  for (int i = 0; i < (MR + 2) / 3; i++)
    a[i] = reinterpret_cast<const unit_any*>(s.a) + (row + 3 * i) * lda;
  b += size_t(s.first) / kUnit * kPanel;
#pragma GCC unroll 4
  for (int k = 0; k < s.k / kUnit; k++) {
    units bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++)
      bv[v] = load(b + v * kLanes / kPanel * panel + v * kLanes % kPanel);
#pragma GCC unroll 14
    for (int m = 0; m < MR; m++) {
      const units x = broadcast(&a[m / 3][m % 3 * lda + k]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) acc[m][v] = multiply_add(x, bv[v], acc[m][v]);
    }
    b += kPanel;
  }
}

template <int MR, int NV, class P>
FASTSCNN_INLINE void tile(const P& p, int row, int column) {
  vsum acc[MR][NV];
  const size_t panel = size_t(p.b->k) / kUnit * kPanel;
  const unit* b = static_cast<const unit*>(p.b->panels) + column / kPanel * panel + column % kPanel;
#pragma GCC unroll 14
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++)
      acc[m][v] = p.b->bias ? load(p.b->bias + column + v * kLanes) : vsum{};
  for (int s = 0; s < p.segment_count; s++)
    if (p.segments[s].a) accumulate<MR, NV>(p.segments[s], row, b, panel, acc);
  p.epilogue.apply([&](auto finish) {
#pragma GCC unroll 14
    for (int m = 0; m < MR; m++) finish.vectors(acc[m], row + m, column);
  });
}

// B's panels stay in L1 while K is small: columns outside. Else A's tile stays and B streams from
// L2.
constexpr int kSmallK = 224 * kUnit;

// Rows and columns that are whole tiles.
template <int MR, int NV, class P>
void tiles(const P& p, Range rows, Range columns) {
  constexpr int kColumns = NV * kLanes;
  if (p.b->k <= kSmallK) {
    for (int column = columns.begin; column < columns.end; column += kColumns)
      for (int row = rows.begin; row < rows.end; row += MR) tile<MR, NV>(p, row, column);
  } else {
    for (int row = rows.begin; row < rows.end; row += MR)
      for (int column = columns.begin; column < columns.end; column += kColumns)
        tile<MR, NV>(p, row, column);
  }
}

template <int NV, class P>
FASTSCNN_INLINE void tiles_of(int count, const P& p, Range rows, Range columns) {
  using Tiles = void (*)(const P&, Range, Range);
#if FASTSCNN_LANES == 16
  static constexpr Tiles table[] = {
      tiles<1, NV, P>,  tiles<2, NV, P>,  tiles<3, NV, P>,  tiles<4, NV, P>, tiles<5, NV, P>,
      tiles<6, NV, P>,  tiles<7, NV, P>,  tiles<8, NV, P>,  tiles<9, NV, P>, tiles<10, NV, P>,
      tiles<11, NV, P>, tiles<12, NV, P>, tiles<13, NV, P>, tiles<14, NV, P>};
#else
  static constexpr Tiles table[] = {tiles<1, NV, P>, tiles<2, NV, P>, tiles<3, NV, P>,
                                    tiles<4, NV, P>, tiles<5, NV, P>, tiles<6, NV, P>};
#endif
  table[count - 1](p, rows, columns);
}

template <class E>
static void multiply_in_registers(const Product<E>& p, int m) {
  const int n = p.b->n, whole = n / kRegisterColumns * kRegisterColumns;
  const int tiles = (m + kRegisterRows - 1) / kRegisterRows;
  const int rows = m / tiles, longer = m % tiles;  // balanced: no short last tile
  auto part = [&](int count, Range range) {
    if (range.begin == range.end) return;
    tiles_of<kRegisterVectors>(count, p, range, {0, whole});
    if (whole < n) tiles_of<kRegisterVectors / 2>(count, p, range, {whole, n});
  };
  const int split = longer * (rows + 1);
  part(rows + 1, {0, split});
  part(rows, {split, m});
}
