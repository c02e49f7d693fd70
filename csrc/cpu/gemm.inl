// The product in registers: inner_product.inl over tiles of pixels and columns.

// A register tile is V::kRows pixels of V's columns, two vectors of floats, up to four of int8: the
// accumulators, one row of B and one broadcast fill the 32 (AVX-512) or 16 registers.

template <int MR, class V>
FASTSCNN_INLINE void accumulate(const Segment& s, size_t row, const unit* b, size_t panel,
                                typename V::vsum (&acc)[MR][V::kVectors]) {
  constexpr int NV = V::kVectors;
  // Three rows share a base pointer, so that 14 rows need 5 address registers.
  const size_t lda = s.lda * sizeof(element);
  const char* a[(MR + 2) / 3];
#pragma GCC unroll 5
  for (int i = 0; i < (MR + 2) / 3; i++)
    a[i] = reinterpret_cast<const char*>(s.a) + (row + 3 * i) * lda;
  b += size_t(s.first) / kUnit * kPanel;
#if FASTSCNN_ARITHMETIC == FASTSCNN_INT8
#pragma GCC unroll 1  // or accumulators leave their registers
#else
#pragma GCC unroll 4
#endif
  for (int k = 0; k < s.k / kUnit; k++) {
    decltype(V::load_units(b)) bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) bv[v] = V::load_units(b + V::next(v, panel));
#pragma GCC unroll 14
    for (int m = 0; m < MR; m++) {
      const auto x = V::broadcast(
          reinterpret_cast<const unit_any*>(a[m / 3] + m % 3 * lda + k * sizeof(unit)));
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) acc[m][v] = V::multiply_add(x, bv[v], acc[m][v]);
    }
    b += kPanel;
  }
}

template <int MR, class V, class P>
FASTSCNN_INLINE void tile(const P& p, int row, int column) {
  constexpr int NV = V::kVectors;
  typename V::vsum acc[MR][NV];
  const size_t panel = size_t(p.b->k) / kUnit * kPanel, place = V::place(column);
  const unit* b = static_cast<const unit*>(p.b->panels) + place / kPanel * panel + place % kPanel;
  const sum* bias = biases_of(*p.b);
#pragma GCC unroll 14
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++)
      acc[m][v] = bias ? V::load_sums(bias + place + V::next(v, kPanel)) : V::none();
  for (int s = 0; s < p.segment_count; s++)
    if (p.segments[s].a) accumulate<MR, V>(p.segments[s], row, b, panel, acc);
  p.epilogue.apply([&](auto finish) {
    if constexpr (kPaired && NV == 2 && MR > 1) {
#pragma GCC unroll 7
      for (int m = 0; m + 1 < MR; m += 2) finish.pair(acc[m], acc[m + 1], row + m, column);
      if constexpr (MR % 2) finish.vectors(acc[MR - 1], row + MR - 1, column);
    } else {
#pragma GCC unroll 14
      for (int m = 0; m < MR; m++) finish.vectors(acc[m], row + m, column);
    }
  });
}

// B's panels stay in L1 while K is small: columns outside. Else A's tile stays and B streams from
// L2.
template <class V>
constexpr int kSmallK = 224 * kUnit * 2 / V::kVectors;

// Rows and columns that are whole tiles.
template <int MR, class V, class P>
void tiles(const P& p, Range rows, Range columns) {
  constexpr int kColumns = V::kColumns;
  if (p.b->k <= kSmallK<V>) {
    for (int column = columns.begin; column < columns.end; column += kColumns)
      for (int row = rows.begin; row < rows.end; row += MR) tile<MR, V>(p, row, column);
  } else {
    for (int row = rows.begin; row < rows.end; row += MR)
      for (int column = columns.begin; column < columns.end; column += kColumns)
        tile<MR, V>(p, row, column);
  }
}

// Tiles of `count` rows, MR at most.
template <class V, int MR, class P>
void tiles_of(int count, const P& p, Range rows, Range columns) {
  if (count == MR)
    tiles<MR, V>(p, rows, columns);
  else if constexpr (MR > 1)
    tiles_of<V, MR - 1>(count, p, rows, columns);
}

template <class V, class P>
FASTSCNN_INLINE void multiply_columns(const P& p, int m, Range columns) {
  if (columns.begin == columns.end) return;
  const int tiles = (m + V::kRows - 1) / V::kRows;
  const int rows = m / tiles, longer = m % tiles;  // balanced: no short last tile
  const int split = longer * (rows + 1);
  if (split > 0) tiles_of<V, V::kRows>(rows + 1, p, {0, split}, columns);
  if (split < m) tiles_of<V, V::kRows>(rows, p, {split, m}, columns);
}

template <class E>
static void multiply_in_registers(const Product<E>& p, int m) {
  const int n = p.b->n, whole = n / E::kWhole * E::kWhole;
  multiply_columns<typename E::Wide>(p, m, {0, whole});
  multiply_columns<typename E::Narrow>(p, m, {whole, n});
}
