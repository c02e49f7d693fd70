// The product in registers. What one step along K takes from A is 32 bits wide: a float, or two
// neighbouring bf16, which meet a pair of B's rows; `unit_any` as it may lie in A.
#if FASTSCNN_ARITHMETIC != FASTSCNN_BFLOAT16
typedef float unit, unit_any;
using units = vf;
FASTSCNN_INLINE vf multiply_add(vf a, vf b, vf sum) { return fma(a, b, sum); }
FASTSCNN_INLINE units broadcast(const unit_any* p) { return splat(*p); }
#else
typedef int32_t unit __attribute__((may_alias));
typedef int32_t unit_any __attribute__((may_alias, aligned(2)));
using units = vi;
#if FASTSCNN_BF16
FASTSCNN_INLINE vf multiply_add(vi a, vi b, vf sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
#else
FASTSCNN_INLINE vf multiply_add(vi a, vi b, vf sum) {
  return fma(odd(a), odd(b), fma(even(a), even(b), sum));
}
#endif
FASTSCNN_INLINE units broadcast(const unit_any* p) { return vi{} + *p; }
#endif
constexpr int kUnit = int(sizeof(unit) / sizeof(element));

// Rows (pixels) and vectors of the register tile: the accumulators, one row of B and one broadcast
// fill the 32 (AVX-512) or 16 registers.
constexpr int kRegisterRows = kLanes == 16 ? 14 : 6;
constexpr int kRegisterVectors = 2;
constexpr int kRegisterColumns = kRegisterVectors * kLanes;

template <int MR, int NV>
FASTSCNN_INLINE void accumulate(const Segment& s, size_t row, const unit* b, size_t panel,
                                vf (&acc)[MR][NV]) {
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
  vf acc[MR][NV];
  const size_t panel = size_t(p.b->k) / kUnit * kPanel;
  const unit* b = static_cast<const unit*>(p.b->panels) + column / kPanel * panel + column % kPanel;
#pragma GCC unroll 14
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++)
      acc[m][v] = p.b->bias ? load(p.b->bias + column + v * kLanes) : vf{};
  for (int s = 0; s < p.segment_count; s++)
    if (p.segments[s].a) accumulate<MR, NV>(p.segments[s], row, b, panel, acc);
  if (p.add) {
    const auto* add = p.add + row * p.ld_add + column;
#pragma GCC unroll 14
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) acc[m][v] += load(add + m * p.ld_add + v * kLanes);
  }
  auto* c = p.c + row * p.ldc + column;
  p.clamp.apply([&](auto clamp) {
#pragma GCC unroll 14
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) store(c + m * p.ldc + v * kLanes, clamp(acc[m][v]));
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

template <class Out, class Add>
static void multiply_in_registers(const Product<Out, Add>& p, int m) {
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
