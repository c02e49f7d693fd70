// Bilinear sampling positions as torch.nn.functional.interpolate defines them, in double so that
// the weights are right to the last bit of a float.
struct Sample {
  int low, high;
  float low_weight, high_weight;
};
static Sample sample(int i, int in, int out, bool align_corners) {
  double position;
  if (align_corners)
    position = out > 1 ? double(in - 1) / (out - 1) * i : 0;
  else {
    position = (i + 0.5) * in / out - 0.5;
    if (position < 0) position = 0;
  }
  const int low = min_of(int(position), in - 1), high = min_of(low + 1, in - 1);
  const double weight = position - low;
  return {low, high, float(1 - weight), float(weight)};
}

static void samples(Sample* table, int in, int out, bool align_corners) {
  for (int i = 0; i < out; i++) table[i] = sample(i, in, out, align_corners);
}

// out = low_weight * a + high_weight * b over n floats, a multiple of kLanes.
FASTSCNN_INLINE void blend(const float* a, const float* b, float low_weight, float high_weight,
                           size_t n, float* out) {
  const vf wa = splat(low_weight), wb = splat(high_weight);
  for (size_t i = 0; i < n; i += kLanes) store(out + i, fma(load(b + i), wb, load(a + i) * wa));
}

// Source: rows of x resized to height x width, then clamped.
struct ResizedRows {
  Plane x;
  int channels, height, width;
  bool align_corners;
  Clamp clamp;
  Sample* columns;
  float* blended;

  void place(Bump& scratch) {
    columns = scratch.take<Sample>(width);
    blended = scratch.take<float>(size_t(x.w) * channels);
  }
  void start(int) { samples(columns, x.w, width, align_corners); }
  void row(int y, float* out) {
    const Sample s = sample(y, x.h, height, align_corners);
    const size_t floats = size_t(x.w) * channels;
    blend(x.data + s.low * floats, x.data + s.high * floats, s.low_weight, s.high_weight, floats,
          blended);
    for (int i = 0; i < width; i++, out += channels) {
      const float* a = blended + size_t(columns[i].low) * channels;
      const float* b = blended + size_t(columns[i].high) * channels;
      const vf wa = splat(columns[i].low_weight), wb = splat(columns[i].high_weight);
      for (int c = 0; c < channels; c += kLanes)
        store(out + c, clamp(fma(load(b + c), wb, load(a + c) * wa)));
    }
  }
};
