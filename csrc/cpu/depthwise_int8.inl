// Part of a row of a depthwise 3x3 in int8. The bytes of a column of three pixels are put side by side, channel by channel,
// and one instruction multiplies and adds them; three columns make an output, and wait in registers for the outputs beside
// it. Outside the image are zeros, the input's zero point.
constexpr int kDepthwisePixels = 1;  // nothing is made in blocks

template <class B>
struct DepthwiseChannels {
  using ints = typename B::ints;
  const element* rows[3];  // at pixel 0, the first channel
  ptrdiff_t steps[3];      // from pixel to pixel, 0: a row of zeros
  const element* weight;
  const int32_t* bias;
  const float* multiplier;
  element* out;
  ptrdiff_t channels;
  int zero;

  FASTSCNN_INLINE void load(ptrdiff_t x, ints (&column)[4]) const {
    interleave<B>(B::load(rows[0] + x * steps[0]), B::load(rows[1] + x * steps[1]),
                  B::load(rows[2] + x * steps[2]), column);
  }
  FASTSCNN_INLINE void make(int pixel, const ints (&w)[3][4], const ints (&a)[4],
                            const ints (&b)[4], const ints (&c)[4]) const {
    ints sums[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      sums[i] = B::multiply_add(a[i], w[0][i], B::load(bias + i * kPanel));
      sums[i] = B::multiply_add(b[i], w[1][i], sums[i]);
      sums[i] = B::multiply_add(c[i], w[2][i], sums[i]);
    }
    typename B::floats values[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
      values[i] = B::multiply(B::to_floats(sums[i]), B::load_floats(multiplier + i * kPanel));
    B::store(out + pixel * channels, narrow<B>(values, B::twos(zero)));
  }
  // Outputs [begin, end) of the row; out is that of `begin`.
  template <int STRIDE>
  void run(int begin, int end, int dilation) const {
    ints w[3][4];
#pragma GCC unroll 3
    for (int kx = 0; kx < 3; kx++)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) w[kx][i] = B::load(weight + (kx * kByteBlock + i * kPanel) * 4);
    if constexpr (STRIDE == 1) {
      for (int phase = 0; phase < min_of(dilation, end - begin); phase++) {
        int x = begin + phase;
        ints u[3][4];
        load(x - dilation, u[0]);
        load(x, u[1]);
        for (; x + 2 * dilation < end; x += 3 * dilation)
#pragma GCC unroll 3
          for (int k = 0; k < 3; k++) {
            load(x + (k + 1) * dilation, u[(k + 2) % 3]);
            make(x + k * dilation - begin, w, u[k], u[(k + 1) % 3], u[(k + 2) % 3]);
          }
        if (x >= end) continue;
        load(x + dilation, u[2]);
        make(x - begin, w, u[0], u[1], u[2]);
        if ((x += dilation) >= end) continue;
        load(x + dilation, u[0]);
        make(x - begin, w, u[1], u[2], u[0]);
      }
    } else {
      ints u[3][4];
      load(begin * STRIDE - dilation, u[2]);
      for (int x = begin; x < end; x++) {
        if (dilation == 1)
#pragma GCC unroll 4
          for (int i = 0; i < 4; i++) u[0][i] = u[2][i];
        else
          load(x * STRIDE - dilation, u[0]);
        load(x * STRIDE, u[1]);
        load(x * STRIDE + dilation, u[2]);
        make(x - begin, w, u[0], u[1], u[2]);
      }
    }
  }
};

// Columns of row y of a depthwise convolution over `in`, which holds the rows it needs.
static void depthwise(const Ring& in, int y, int stride, int dilation, Range columns,
                      const Depthwise& d, Clamp, element* out) {
  alignas(64) static constexpr element zeros[WideBytes::kChannels] = {};
  const int middle = y * stride;
  const element* const rows[3] = {in.at(middle - dilation), in.at(middle),
                                  in.at(middle + dilation)};
  for_channels(d.channels, [&](auto bytes, int c) {
    const int place = place_in_block(c);
    DepthwiseChannels<decltype(bytes)> block;
    for (int ky = 0; ky < 3; ky++) {
      block.rows[ky] = rows[ky] ? rows[ky] + c : zeros;
      block.steps[ky] = rows[ky] ? d.channels : 0;
    }
    block.weight = static_cast<const element*>(d.weight) +
                   4 * (size_t(c / kByteBlock) * 3 * kByteBlock + place % kByteBlock);
    block.bias = static_cast<const int32_t*>(d.bias) + place;
    block.multiplier = d.multiplier + place;
    block.out = out + c;
    block.channels = d.channels;
    block.zero = *d.zero;
    stride == 1 ? block.template run<1>(columns.begin, columns.end, dilation)
                : block.template run<2>(columns.begin, columns.end, dilation);
  });
}
