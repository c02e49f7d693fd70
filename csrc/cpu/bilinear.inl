// Bilinear resizing of whole rows; where each column reads: sample.inl.

// Source: rows of x resized to height x width, then clamped.
struct ResizedRows {
  Plane x;
  int channels, height, width;
  bool align_corners;
  Clamp clamp;
  Sample* columns;
  float* blended;  // the row before its columns are resized

  void place(Bump& scratch) {
    columns = scratch.take<Sample>(width);
    blended = scratch.take<float>(size_t(x.w) * channels);
  }
  void start(int) { samples(columns, x.w, width, align_corners); }
  void row(int y, element* out) {
    const Sample s = sample(y, x.h, height, align_corners);
    blend(row_of(x, s.low, channels), row_of(x, s.high, channels), s.low_weight, s.high_weight,
          size_t(x.w) * channels, blended);
    for (int i = 0; i < width; i++, out += channels) {
      const float* a = blended + size_t(columns[i].low) * channels;
      const float* b = blended + size_t(columns[i].high) * channels;
      const vf wa = splat(columns[i].low_weight), wb = splat(columns[i].high_weight);
      for (int c = 0; c < channels; c += kLanes)
        store(out + c, clamp(fma(load(b + c), wb, load(a + c) * wa)));
    }
  }
};
