// Part of a row of a depthwise 3x3 in int8. The bytes of a column of three pixels are put side by
// side, channel by channel, and one instruction multiplies and adds them; three columns make an
// output, and wait in registers for the outputs beside it. Outside the image are zeros, the input's
// zero point.
constexpr int kDepthwisePixels = 1;  // nothing is made in blocks

template <class B>
struct DepthwiseChannels {
  using ints = typename B::ints;
  const element* rows[3];  // at pixel 0, the first channel
  ptrdiff_t steps[3];      // from pixel to pixel, 0: a row of zeros
  const element* weight;
  const int32_t* bias;
  const float* multiplier;
  int zero;
  element* out;
  ptrdiff_t channels;

  // The columns from pixel x on, `step` pixels apart.
  struct Columns {
    const element *a, *b, *c;
    ptrdiff_t a_step, b_step, c_step;
    FASTSCNN_INLINE void next(ints (&column)[4]) {
      interleave<B>(B::load(a), B::load(b), B::load(c), column);
      a += a_step, b += b_step, c += c_step;
    }
  };
  FASTSCNN_INLINE Columns columns(ptrdiff_t x, ptrdiff_t step) const {
    return {rows[0] + x * steps[0], rows[1] + x * steps[1], rows[2] + x * steps[2],
            step * steps[0],        step * steps[1],        step * steps[2]};
  }

  // Outputs [begin, end) of the row; out is that of `begin`. What is read in the loops is copied
  // out of the members, which stores of bytes might change as far as a compiler knows.
  template <int STRIDE>
  void run(int begin, int end, int dilation) const {
    const int32_t* const biases = bias;
    const float* const multipliers = multiplier;
    const auto zeros = B::twos(zero);
    ints w[3][4];
#pragma GCC unroll 3
    for (int kx = 0; kx < 3; kx++)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) w[kx][i] = B::load(weight + (kx * kByteBlock + i * kPanel) * 4);
    auto make = [&](element* to, const ints(&a)[4], const ints(&b)[4], const ints(&c)[4]) {
      typename B::floats values[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        ints sums = B::multiply_add(a[i], w[0][i], B::load(biases + i * kPanel));
        sums = B::multiply_add(b[i], w[1][i], sums);
        sums = B::multiply_add(c[i], w[2][i], sums);
        values[i] = B::multiply(B::to_floats(sums), B::load_floats(multipliers + i * kPanel));
      }
      B::store(to, narrow<B>(values, zeros));
    };
    if constexpr (STRIDE == 1) {
      const ptrdiff_t step = channels * dilation;
      for (int phase = 0; phase < min_of(dilation, end - begin); phase++) {
        int left = (end - begin - phase + dilation - 1) / dilation;
        element* to = out + phase * channels;
        Columns in = columns(begin + phase - dilation, dilation);
        ints u[3][4];
        in.next(u[0]);
        in.next(u[1]);
        for (; left >= 3; left -= 3)
#pragma GCC unroll 3
          for (int k = 0; k < 3; k++, to += step) {
            in.next(u[(k + 2) % 3]);
            make(to, u[k], u[(k + 1) % 3], u[(k + 2) % 3]);
          }
        if (left == 0) continue;
        in.next(u[2]);
        make(to, u[0], u[1], u[2]);
        if (left == 1) continue;
        in.next(u[0]);
        make(to + step, u[1], u[2], u[0]);
      }
    } else if (dilation == 1) {
      const ptrdiff_t step = channels;
      int left = end - begin;
      element* to = out;
      Columns in = columns(begin * STRIDE - 1, 1);
      ints u[3][4];
      in.next(u[0]);
      for (; left >= 2; left -= 2, to += 2 * step) {
        in.next(u[1]);
        in.next(u[2]);
        make(to, u[0], u[1], u[2]);
        in.next(u[1]);
        in.next(u[0]);
        make(to + step, u[2], u[1], u[0]);
      }
      if (left == 0) return;
      in.next(u[1]);
      in.next(u[2]);
      make(to, u[0], u[1], u[2]);
    } else {
      element* to = out;
      for (int x = begin; x < end; x++, to += channels) {
        Columns in = columns(ptrdiff_t(x) * STRIDE - dilation, dilation);
        ints u[3][4];
        for (auto& column : u) in.next(column);
        make(to, u[0], u[1], u[2]);
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
