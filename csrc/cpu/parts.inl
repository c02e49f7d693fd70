// A row in parts whose depthwise result, a buffer in L1, is multiplied before the next part is
// made. The last part takes what is left over, so that it is no shorter than the others.
struct Parts {
  int width, size;

  Parts() = default;
  Parts(int width_, int channels) : width(width_) {
    // Whole blocks of the depthwise, whole tiles of the product.
    constexpr int kWhole = kTileRows % kDepthwisePixels ? 4 * kTileRows : kTileRows;
    constexpr size_t kBuffer = 20 << 10;
    const int fitting = int(kBuffer / (channels * sizeof(element))) / kWhole * kWhole;
    size = max_of(fitting, kWhole);
  }
  size_t longest() const { return size_t(min_of(width, 2 * size - 1)); }
  template <class Run>
  FASTSCNN_INLINE void for_each(Run run) const {
    const int count = max_of(width / size, 1);
    for (int i = 0; i < count; i++) run(Range{i * size, i + 1 == count ? width : (i + 1) * size});
  }
};
