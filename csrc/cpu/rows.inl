// Rows of an activation that flow from the op that makes them to the op that needs them, without
// the whole activation ever being written.

// The last few rows of an activation, each with `pad` zero pixels on both sides. Row y is in slot
// y % slots. Rows above and below the image do not exist: at() is null there.
struct Ring {
  float* rows;
  size_t pitch;  // floats per slot
  int slots, pad, channels, width, height;
  int next;  // first row not made yet

  void place(Bump& scratch, int slots_, int pad_, int channels_, int width_, int height_) {
    slots = slots_, pad = pad_, channels = channels_, width = width_, height = height_;
    pitch = (size_t(width + 2 * pad) * channels + 15) / 16 * 16;
    rows = scratch.take<float>(pitch * slots);
  }
  float* slot(int y) const { return rows + pitch * (y % slots) + pad * channels; }
  const float* at(int y) const { return y < 0 || y >= height ? nullptr : slot(y); }
  void start(int first) {
    next = max_of(first, 0);
    for (int y = 0; y < slots; y++) {
      float* row = slot(y);
      for (int i = 0; i < pad * channels; i++)
        row[i - pad * channels] = row[size_t(width) * channels + i] = 0;
    }
  }
  // Makes all rows up to and including `last` that exist.
  template <class Source>
  FASTSCNN_INLINE void pull(Source& source, int last) {
    for (; next <= min_of(last, height - 1); next++) source.row(next, slot(next));
  }
};

struct Range {
  int begin, end;
};
FASTSCNN_INLINE Range share(int n, const Team& team) {
  return {int(int64_t(n) * team.rank / team.size), int(int64_t(n) * (team.rank + 1) / team.size)};
}

// Runs a stage over this thread's rows of `out`.
template <class Stage>
FASTSCNN_INLINE void run_rows(Stage& stage, Plane out, int channels, const Team& team) {
  const Range rows = share(out.h, team);
  if (rows.begin == rows.end) return;
  stage.start(rows.begin);
  for (int y = rows.begin; y < rows.end; y++) stage.row(y, out.data + size_t(y) * out.w * channels);
}

// Source: rows of a dense activation, copied so that they gain their zero pixels.
struct CopyRows {
  Plane x;
  int channels;
  void start(int) {}
  void row(int y, float* out) {
    const size_t floats = size_t(x.w) * channels;
    __builtin_memcpy(out, x.data + y * floats, floats * sizeof(float));
  }
};
