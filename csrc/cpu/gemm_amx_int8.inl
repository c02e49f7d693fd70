// The product of int8 in AMX tiles of 16 rows of 64 bytes. A block is up to 16 pixels and four
// panels, a whole vector of bytes a pixel: sums in tiles 0 to 3, A's pixels in 4, B in 6; 5 and 7
// take the 32 bytes that K may have left over. As in gemm_amx.inl a finished block waits in memory
// while the tiles compute the next one.

constexpr int kTile = 16;
constexpr int kTileRows = kTile;
constexpr int kTileBytes = 64, kRest = 32;

static void shape_tiles(int pixels) {
  TileShapes shapes;
  for (int i = 0; i < 5; i++) shapes.set(i, pixels, kTileBytes);
  shapes.set(5, pixels, kRest);
  shapes.set(6, kTile, kTileBytes);
  shapes.set(7, kRest / 4, kTileBytes);
  shapes.load();
}
#include "tiles.inl"

// Two blocks' sums in turn, and which one still waits. N: panels.
template <int N>
struct Sums {
  alignas(64) sum block[2][kTile][N * kTile];
  int turn = 0, row = 0, column = 0, rows = 0;

  template <class E>
  FASTSCNN_INLINE void finish(const Product<E>& p) {
    if (rows == 0) return;
    p.epilogue.apply([&](auto finish) {
      const sum* waiting = block[turn][0];
      const int first = row, count = rows, column_from = column;  // stores might change the members
#pragma GCC unroll 2
      for (int i = 0; i < count; i++, waiting += N * kTile) {
        WideBytes::ints v[N];
        for (int n = 0; n < N; n++) v[n] = WideBytes::load(waiting + n * kTile);
        finish.vectors(v, first + i, column_from);
      }
    });
    rows = 0;
  }
  template <class E>
  FASTSCNN_INLINE void take(const Product<E>& p, int row_, int column_, int rows_) {
    finish(p);
    turn ^= 1, row = row_, column = column_, rows = rows_;
    constexpr int pitch = N * kTile * sizeof(sum);
    _tile_stored(0, block[turn][0], pitch);
    _tile_stored(1, block[turn][0] + kTile, pitch);
    if (N == 4) {
      _tile_stored(2, block[turn][0] + 2 * kTile, pitch);
      _tile_stored(3, block[turn][0] + 3 * kTile, pitch);
    }
    settle();
  }
};

// One step along K, of N panels in turn: whole tiles, or the rest of K. Tiles are numbers in the
// instructions.
template <int N>
FASTSCNN_INLINE void step(const element* a, size_t lda, const int8_t* b, size_t panel) {
  _tile_loadd(4, a, lda);
  _tile_loadd(6, b, kTileBytes);
  _tile_dpbusd(0, 4, 6);
  _tile_loadd(6, b + panel, kTileBytes);
  _tile_dpbusd(1, 4, 6);
  if (N == 4) {
    _tile_loadd(6, b + 2 * panel, kTileBytes);
    _tile_dpbusd(2, 4, 6);
    _tile_loadd(6, b + 3 * panel, kTileBytes);
    _tile_dpbusd(3, 4, 6);
  }
}
template <int N>
FASTSCNN_INLINE void last_step(const element* a, size_t lda, const int8_t* b, size_t panel) {
  _tile_loadd(5, a, lda);
  _tile_loadd(7, b, kTileBytes);
  _tile_dpbusd(0, 5, 7);
  _tile_loadd(7, b + panel, kTileBytes);
  _tile_dpbusd(1, 5, 7);
  if (N == 4) {
    _tile_loadd(7, b + 2 * panel, kTileBytes);
    _tile_dpbusd(2, 5, 7);
    _tile_loadd(7, b + 3 * panel, kTileBytes);
    _tile_dpbusd(3, 5, 7);
  }
}

template <int N, class E>
FASTSCNN_INLINE void block(const Product<E>& p, Sums<N>& sums, int row, int column, int rows) {
  const size_t panel = size_t(p.b->k) * kPanel;
  const int8_t* b = static_cast<const int8_t*>(p.b->panels) + column / kPanel * panel;
  const sum* bias = biases_of(*p.b) + column;
  settle();
  _tile_loadd(0, bias, 0);
  _tile_loadd(1, bias + kTile, 0);
  if (N == 4) {
    _tile_loadd(2, bias + 2 * kTile, 0);
    _tile_loadd(3, bias + 3 * kTile, 0);
  }
  for (int i = 0; i < p.segment_count; i++) {
    const Segment& s = p.segments[i];
    if (!s.a) continue;
    const element* a = s.a + row * s.lda;
    const int8_t* rows_of_b = b + size_t(s.first) * kPanel;
    int k = 0;
    for (; k + kTileBytes <= s.k; k += kTileBytes)
      step<N>(a + k, s.lda, rows_of_b + size_t(k) * kPanel, panel);
    if (k < s.k) last_step<N>(a + k, s.lda, rows_of_b + size_t(k) * kPanel, panel);
  }
  sums.take(p, row, column, rows);
}

template <int N, class E>
FASTSCNN_INLINE void multiply_panels(const Product<E>& p, int m, Range columns) {
  if (columns.begin == columns.end) return;
  Sums<N> sums;
  for (int column = columns.begin; column < columns.end; column += N * kTile) {
    if (m < kTile) block<N>(p, sums, 0, column, m);
    for (int row = 0; row < m && m >= kTile; row += kTile) {
      row = min_of(row, m - kTile);  // the last tile overlaps its neighbour: same values
      block<N>(p, sums, row, column, kTile);
    }
  }
  sums.finish(p);
}

// Every product but the stem's, whose K is no multiple of 32.
template <class E>
static void multiply(const Product<E>& p, int m) {
  const int n = p.b->n, whole = E::kBytes ? n / kByteBlock * kByteBlock : 0;
  if (m < kTile) shape_tiles(m);
  if constexpr (E::kBytes) multiply_panels<4>(p, m, {0, whole});
  multiply_panels<2>(p, m, {whole, n});
  if (m < kTile) shape_tiles(kTile);
}
