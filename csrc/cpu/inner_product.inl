// The inner product in registers. What one step along K takes from A is 32 bits wide: a float,
// two neighbouring bf16 or four bytes, which meet as many of B's rows; `unit_any` as it may lie in
// A.
#if FASTSCNN_ARITHMETIC == FASTSCNN_INT8
using sum = int32_t;
typedef int32_t unit __attribute__((may_alias));
typedef int32_t unit_any __attribute__((may_alias, aligned(1)));

// The vectors of sums of a register tile's columns. Offsets are in places, of which a panel has 16,
// `panel` apart.
template <class B>
struct IntegerColumns {
  using vsum = typename B::ints;
  FASTSCNN_INLINE static vsum none() { return B::zero(); }
  FASTSCNN_INLINE static vsum load_sums(const sum* p) { return B::load(p); }
  FASTSCNN_INLINE static vsum load_units(const unit* p) { return B::load(p); }
  FASTSCNN_INLINE static vsum broadcast(const unit_any* p) { return B::fours(*p); }
  FASTSCNN_INLINE static vsum multiply_add(vsum a, vsum b, vsum s) {
    return B::multiply_add(a, b, s);
  }
};
// Of whole blocks: as many as become one vector of bytes.
struct WideColumns : IntegerColumns<WideBytes> {
  static constexpr int kVectors = 4, kColumns = WideBytes::kChannels, kRows = kLanes == 16 ? 6 : 3;
  FASTSCNN_INLINE static int place(int column) { return place_in_block(column); }
  FASTSCNN_INLINE static size_t next(int v, size_t panel) { return v * panel; }
};
struct TailColumns : IntegerColumns<WideBytes> {
  static constexpr int kVectors = Tail::kVectors, kColumns = Tail::kColumns,
                       kRows = kLanes == 16 ? 14 : 3;
  FASTSCNN_INLINE static int place(int column) { return column / 32 * 32 + column % 32 / 8 * 4; }
  FASTSCNN_INLINE static size_t next(int v, size_t panel) { return v % 2 * panel + v / 2 * kLanes; }
};
// Whose sums become floats.
struct LogitColumns : IntegerColumns<WideBytes> {
  static constexpr int kVectors = 2, kColumns = 2 * kLanes, kRows = kLanes == 16 ? 14 : 6;
  FASTSCNN_INLINE static int place(int column) { return column; }
  FASTSCNN_INLINE static size_t next(int v, size_t panel) {
    return v * kLanes / kPanel * panel + v * kLanes % kPanel;
  }
};
#else
using sum = float;  // of a product, in registers and tiles; `vsum` a vector of them
using vsum = vf;
#if FASTSCNN_ARITHMETIC != FASTSCNN_BFLOAT16
typedef float unit, unit_any;
using units = vf;
FASTSCNN_INLINE vsum multiply_add_units(vf a, vf b, vsum s) { return fma(a, b, s); }
FASTSCNN_INLINE units broadcast_unit(const unit_any* p) { return splat(*p); }
#else
typedef int32_t unit __attribute__((may_alias));
typedef int32_t unit_any __attribute__((may_alias, aligned(2)));
using units = vi;
#if FASTSCNN_BF16
FASTSCNN_INLINE vsum multiply_add_units(vi a, vi b, vsum s) {
  return _mm512_dpbf16_ps(s, (__m512bh)a, (__m512bh)b);
}
#else
FASTSCNN_INLINE vsum multiply_add_units(vi a, vi b, vsum s) {
  return fma(odd(a), odd(b), fma(even(a), even(b), s));
}
#endif
FASTSCNN_INLINE units broadcast_unit(const unit_any* p) { return vi{} + *p; }
#endif

// The vectors of a register tile's columns.
template <int NV>
struct Columns {
  using vsum = vf;
  static constexpr int kVectors = NV, kColumns = NV * kLanes, kRows = kLanes == 16 ? 14 : 6;
  FASTSCNN_INLINE static int place(int column) { return column; }
  FASTSCNN_INLINE static size_t next(int v, size_t panel) {
    return v * kLanes / kPanel * panel + v * kLanes % kPanel;
  }
  FASTSCNN_INLINE static vsum none() { return vsum{}; }
  FASTSCNN_INLINE static vsum load_sums(const sum* p) { return load(p); }
  FASTSCNN_INLINE static auto load_units(const unit* p) { return load(p); }
  FASTSCNN_INLINE static auto broadcast(const unit_any* p) { return broadcast_unit(p); }
  template <class U>
  FASTSCNN_INLINE static vsum multiply_add(U a, U b, vsum s) {
    return multiply_add_units(a, b, s);
  }
};
using WideColumns = Columns<2>;
using NarrowColumns = Columns<1>;
#endif
FASTSCNN_INLINE const sum* biases_of(const Gemm& b) { return static_cast<const sum*>(b.bias); }
constexpr int kUnit = int(sizeof(unit) / sizeof(element));
// The most pixels of a register tile.
constexpr int kRegisterRows = WideColumns::kRows;
