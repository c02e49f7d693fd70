// The product in AMX tiles of 16 rows of 64 bytes. A block is up to 32 pixels x 32 columns: sums in
// tiles 0 to 3, A's pixels in 4 and 5, B's columns in 6 and 7. A finished block waits in memory:
// its epilogue runs on the vector units while the tiles compute the next one.

constexpr int kTile = 16;
constexpr int kTileRows = 2 * kTile;

// Tiles 0 to 5 hold `pixels` pixels, 6 and 7 whole tiles of B.
static void shape_tiles(int pixels) {
  TileShapes shapes;
  for (int i = 0; i < 8; i++) shapes.set(i, i < 6 ? pixels : kTile, 64);
  shapes.load();
}
#include "tiles.inl"

// Two blocks' sums in turn, and which one still waits.
struct Sums {
  alignas(64) sum block[2][2 * kTile][2 * kTile];
  int turn = 0, row = 0, column = 0, rows = 0, columns = 0;

  template <class E>
  FASTSCNN_INLINE void finish(const Product<E>& p) {
    if (rows == 0) return;
    p.epilogue.apply([&](auto finish) {
      columns == 2 * kTile ? finish_rows<2>(finish) : finish_rows<1>(finish);
    });
    rows = 0;
  }
  template <int NV, class F>
  FASTSCNN_INLINE void finish_rows(const F& finish) const {
    const sum* waiting = block[turn][0];
    const int first = row, count = rows, columns_from = column;  // stores might change the members
#pragma GCC unroll 4
    for (int i = 0; i < count; i++, waiting += 2 * kTile) {
      vsum v[NV];
      for (int n = 0; n < NV; n++) v[n] = load(waiting + n * kTile);
      finish.vectors(v, first + i, columns_from);
    }
  }
  // Hands over the tiles' sums of a block, after the one before.
  template <int M, int N, class E>
  FASTSCNN_INLINE void take(const Product<E>& p, int row_, int column_, int rows_) {
    finish(p);
    turn ^= 1, row = row_, column = column_, rows = rows_, columns = N * kTile;
    constexpr int pitch = 2 * kTile * sizeof(sum);
    _tile_stored(0, block[turn][0], pitch);
    if (N == 2) _tile_stored(1, block[turn][0] + kTile, pitch);
    if (M == 2) _tile_stored(2, block[turn][kTile], pitch);
    if (M == 2 && N == 2) _tile_stored(3, block[turn][kTile] + kTile, pitch);
    settle();
  }
};

// The sums of M x N tiles begin with the bias, the same line for every pixel.
template <int M, int N>
FASTSCNN_INLINE void begin(const float* bias) {
  settle();
  if (bias) {
    _tile_loadd(0, bias, 0);
    if (N == 2) _tile_loadd(1, bias + kTile, 0);
    if (M == 2) _tile_loadd(2, bias, 0);
    if (M == 2 && N == 2) _tile_loadd(3, bias + kTile, 0);
  } else {
    _tile_zero(0);
    if (N == 2) _tile_zero(1);
    if (M == 2) _tile_zero(2);
    if (M == 2 && N == 2) _tile_zero(3);
  }
}
template <int M, int N>
FASTSCNN_INLINE void load_a(const bf16* a, size_t lda) {
  _tile_loadd(4, a, lda * sizeof(bf16));
  if (M == 2) _tile_loadd(5, a + kTile * lda, lda * sizeof(bf16));
}
template <int N>
FASTSCNN_INLINE void load_b(const bf16* b, size_t panel) {
  _tile_loadd(6, b, 64);
  if (N == 2) _tile_loadd(7, b + panel, 64);
}
template <int M, int N>
FASTSCNN_INLINE void multiply_add() {
  _tile_dpbf16ps(0, 4, 6);
  if (N == 2) _tile_dpbf16ps(1, 4, 7);
  if (M == 2) _tile_dpbf16ps(2, 5, 6);
  if (M == 2 && N == 2) _tile_dpbf16ps(3, 5, 7);
}
constexpr int kTileElements = kTileDepth * kTile;  // of one tile of B

#if FASTSCNN_ARITHMETIC == FASTSCNN_BFLOAT16

template <int M, class E>
FASTSCNN_INLINE void block(const Product<E>& p, Sums& sums, int row, int column, int rows) {
  const size_t panel = size_t(p.b->k) * kPanel;
  const bf16* b = static_cast<const bf16*>(p.b->panels) + column / kPanel * panel;
  begin<M, 2>(p.b->bias ? biases_of(*p.b) + column : nullptr);
  for (int i = 0; i < p.segment_count; i++) {
    const Segment& s = p.segments[i];
    if (!s.a) continue;
    const bf16* a = s.a + row * s.lda;
    const bf16* columns = b + size_t(s.first) * kPanel;
    for (int k = 0; k < s.k; k += kTileDepth, a += kTileDepth, columns += kTileElements) {
      load_a<M, 2>(a, s.lda);
      load_b<2>(columns, panel);
      multiply_add<M, 2>();
    }
  }
  sums.take<M, 2>(p, row, column, rows);
}

// DEPTH tiles of K are all there is: B's two columns of them stay in tiles 4 to 7 while the pixels
// pass through 2 and 3.
template <int DEPTH, class E>
static void multiply_shallow(const Product<E>& p, int m) {
  Sums sums;
  const Segment& s = p.segments[0];
  const size_t panel = size_t(p.b->k) * kPanel, lda = s.lda * sizeof(bf16);
  for (int column = 0; column < p.b->n; column += 2 * kTile) {
    const bf16* b = static_cast<const bf16*>(p.b->panels) + column / kPanel * panel;
    const float* bias = biases_of(*p.b) + column;
    settle();
    _tile_loadd(4, b, 64);
    _tile_loadd(5, b + panel, 64);
    if (DEPTH == 2) {
      _tile_loadd(6, b + kTileElements, 64);
      _tile_loadd(7, b + kTileElements + panel, 64);
    }
    for (int row = 0; row < m; row += kTile) {
      row = min_of(row, m - kTile);  // the last tile overlaps its neighbour: same values
      const bf16* a = s.a + row * s.lda;
      begin<1, 2>(bias);
      _tile_loadd(2, a, lda);
      _tile_dpbf16ps(0, 2, 4);
      _tile_dpbf16ps(1, 2, 5);
      if (DEPTH == 2) {
        _tile_loadd(3, a + kTileDepth, lda);
        _tile_dpbf16ps(0, 3, 6);
        _tile_dpbf16ps(1, 3, 7);
      }
      sums.take<1, 2>(p, row, column, kTile);
    }
  }
  sums.finish(p);
}

template <class E>
static void multiply(const Product<E>& p, int m) {
  if (m >= kTile && p.segment_count == 1 && p.b->bias && p.segments[0].a) {
    if (p.b->k == kTileDepth) return multiply_shallow<1>(p, m);
    if (p.b->k == 2 * kTileDepth) return multiply_shallow<2>(p, m);
  }
  Sums sums;
  if (m < kTile) shape_tiles(m);
  for (int column = 0; column < p.b->n; column += 2 * kTile) {
    if (m < kTile) block<1>(p, sums, 0, column, m);
    int row = 0;
    for (; m - row >= 2 * kTile; row += 2 * kTile) block<2>(p, sums, row, column, 2 * kTile);
    // What is left overlaps its neighbours: same values, no smaller tiles.
    if (m - row > kTile && m >= 2 * kTile) {
      block<2>(p, sums, m - 2 * kTile, column, 2 * kTile);
    } else if (row < m && m >= kTile) {
      if (m - row > kTile) block<1>(p, sums, row, column, kTile);
      block<1>(p, sums, m - kTile, column, kTile);
    }
  }
  sums.finish(p);
  if (m < kTile) shape_tiles(kTile);
}

#else  // high

// As much of K as is taken apart at a time; sums of a deeper product continue in C.
constexpr int kDepth = 768;
// Pixels apart in memory: an odd number of lines.
constexpr int kHalvesPitch = kDepth + kTileDepth;
struct Halves {
  alignas(64) bf16 upper[kTileRows][kHalvesPitch], lower[kTileRows][kHalvesPitch];
};

// Takes columns [first, last) of A's rows apart: a = upper + lower, up to 2^-17 of a. Zeros follow
// to the end of the tile. The lower half of infinity is NaN; without it infinity would meet lower
// halves of weights that are 0 or of the other sign, and become NaN all the same.
template <class E>
static void take_apart(const Product<E>& p, int row, int rows, int first, int last,
                       Halves& halves) {
  const int end = rounded_up(last - first, kTileDepth);
  for (int i = 0; i < rows; i++) {
    bf16 *upper = halves.upper[i], *lower = halves.lower[i];
    store(reinterpret_cast<int32_t*>(upper + end - kTileDepth), vi{});
    store(reinterpret_cast<int32_t*>(lower + end - kTileDepth), vi{});
    for (int j = 0; j < p.segment_count; j++) {
      const Segment& s = p.segments[j];
      const int from = max_of(first, s.first), to = min_of(last, s.first + s.k);
      for (int k = from; k < to; k += kLanes) {
        const vf a = s.a ? load(s.a + (row + i) * s.lda + k - s.first) : vf{};
        const __m256i half = (__m256i)_mm512_cvtneps_pbh((__m512)a);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(upper + k - first), half);
        store(lower + k - first, a - (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
      }
    }
  }
}

template <int M, int N, class E>
FASTSCNN_INLINE void block(const Product<E>& p, const Halves& halves, int first, int depth,
                           Sums& sums, int row, int column, int rows) {
  const size_t half = size_t(p.b->k) * kPanel, panel = 2 * half;
  const bf16* b =
      static_cast<const bf16*>(p.b->panels) + column / kPanel * panel + size_t(first) * kPanel;
  begin<M, N>(p.b->bias ? biases_of(*p.b) + column : nullptr);
  for (int k = 0; k < depth; k += kTileDepth, b += kTileElements) {
    load_a<M, N>(halves.lower[0] + k, kHalvesPitch);
    load_b<N>(b, panel);
    multiply_add<M, N>();
    load_a<M, N>(halves.upper[0] + k, kHalvesPitch);
    multiply_add<M, N>();
    load_b<N>(b + half, panel);
    multiply_add<M, N>();
  }
  sums.take<M, N>(p, row, column, rows);
}

// The part of K from `first` to `last`, in the frame of the whole.
template <class E>
static void multiply_part(const Product<E>& p, int m, int first, int last, Halves& halves,
                          Sums& sums) {
  const int depth = last - first;
  for (int row = 0; row < m; row += 2 * kTile) {
    const int rows = min_of(m - row, 2 * kTile);
    take_apart(p, row, rows, first, last, halves);
    for (int column = 0; column < p.b->n; column += 2 * kTile) {
      const bool two = p.b->n - column > kTile;
      if (rows > kTile)
        two ? block<2, 2>(p, halves, first, depth, sums, row, column, rows)
            : block<2, 1>(p, halves, first, depth, sums, row, column, rows);
      else
        two ? block<1, 2>(p, halves, first, depth, sums, row, column, rows)
            : block<1, 1>(p, halves, first, depth, sums, row, column, rows);
    }
  }
  sums.finish(p);
}

template <class E>
static void multiply(const Product<E>& p, int m) {
  Halves halves;
  Sums sums;
  int k = 0;
  for (int i = 0; i < p.segment_count; i++) k = max_of(k, p.segments[i].first + p.segments[i].k);
  Product<E> begun = p;
  if (k > kDepth) begun.epilogue = p.epilogue.unfinished();
  multiply_part(begun, m, 0, min_of(k, kDepth), halves, sums);
  Gemm unbiased = *p.b;
  unbiased.bias = nullptr;
  Product<decltype(p.epilogue.continued())> continued{p.segments, p.segment_count, &unbiased, {}};
  for (int first = kDepth; first < k; first += kDepth) {
    const int last = min_of(k, first + kDepth);
    continued.epilogue = p.epilogue.continued();
    if (last < k) continued.epilogue = continued.epilogue.unfinished();
    multiply_part(continued, m, first, last, halves, sums);
  }
}

#endif
