// Bilinear resizing of whole rows of bytes in fixed point: program/integers.py, sample and resize.
constexpr int kFraction = 15, kGuard = 7;

struct FixedSample {
  int low, high, share;  // share: the upper one's, of 2^kFraction
};
static FixedSample fixed_sample(int i, int in, int out, bool align_corners) {
  int64_t over = int64_t(i) * (in - 1), unit = max_of(out - 1, 1);
  if (!align_corners) {
    over = int64_t(2 * int64_t(i) + 1) * in - out, unit = 2 * int64_t(out);
    if (over < 0) over = 0;
  }
  const int low = min_of(int(over / unit), in - 1);
  const int64_t rest = over - low * unit;
  const int64_t share = ((rest << kFraction) + unit / 2) / unit;
  return {low, min_of(low + 1, in - 1), min_of(int(share), (1 << kFraction) - 1)};
}

// Source: rows of x resized to height x width, then clamped.
struct ResizedRows {
  Plane x;
  int channels, height, width;
  bool align_corners;
  Clamp clamp;
  FixedSample* columns;
  int16_t* blended;  // the row before its columns are resized

  void place(Bump& scratch) {
    columns = scratch.take<FixedSample>(width);
    blended = scratch.take<int16_t>(size_t(x.w) * channels);
  }
  void start(int) {
    for (int i = 0; i < width; i++) columns[i] = fixed_sample(i, x.w, width, align_corners);
  }
  void row(int y, element* out) { row(y, out, channels); }
  // `pitch`: from pixel to pixel of the result.
  void row(int y, element* out, int pitch) {
    const FixedSample s = fixed_sample(y, x.h, height, align_corners);
    const element *low = row_of(x, s.low, channels), *high = row_of(x, s.high, channels);
    for (int i = 0; i < x.w; i++)
      for_channels(channels, [&](auto bytes, int c) {
        using B = decltype(bytes);
        const size_t at = size_t(i) * channels + c;
        const auto a = B::load(low + at), b = B::load(high + at), share = B::twos(s.share);
        const auto none = B::zero();
        auto blend = [&](auto u, auto v) {
          return B::between(B::shift_left16(u, kGuard), B::shift_left16(v, kGuard), share);
        };
        B::store(blended + at, blend(B::unpack_low8(a, none), B::unpack_low8(b, none)));
        B::store(blended + at + B::kChannels / 2,
                 blend(B::unpack_high8(a, none), B::unpack_high8(b, none)));
      });
    for (int i = 0; i < width; i++, out += pitch) {
      const int16_t* a = blended + size_t(columns[i].low) * channels;
      const int16_t* b = blended + size_t(columns[i].high) * channels;
      for_channels(channels, [&](auto bytes, int c) {
        using B = decltype(bytes);
        constexpr int kHalf = B::kChannels / 2;
        const auto share = B::twos(columns[i].share), half = B::twos(1 << (kGuard - 1));
        auto rounded = [&](int at) {
          const auto v = B::between(B::load(a + at), B::load(b + at), share);
          return B::shift_right16(B::add16(v, half), kGuard);
        };
        const auto v = B::pack16(rounded(c), rounded(c + kHalf));
        B::store(out + c, B::at_least8(v, B::bytes(clamp.low)));
      });
    }
  }
};
