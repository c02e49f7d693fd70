// upsample_classify: bilinear resize of low-resolution logits to full size, as logits, softmax or
// labels. Labels and softmax never see full-size logits. One class alone has the sigmoid in place
// of the softmax, and label 1 where its logit is above 0, else 0, also where it is NaN.

// Where each block of kLanes output columns reads: columns low and high, relative to the block's
// base.
struct ColumnBlocks {
  int32_t *base, *low, *high;
  float *low_weight, *high_weight;
  int blocks;
  bool windowed;  // every block reads within kLanes columns of its base, so that one load covers it

  void place(Bump& scratch, int width) {
    blocks = (width + kLanes - 1) / kLanes;
    base = scratch.take<int32_t>(blocks);
    low = scratch.take<int32_t>(size_t(blocks) * kLanes);
    high = scratch.take<int32_t>(size_t(blocks) * kLanes);
    low_weight = scratch.take<float>(size_t(blocks) * kLanes);
    high_weight = scratch.take<float>(size_t(blocks) * kLanes);
  }
  void fill(int in, int out, bool align_corners) {
    windowed = true;
    for (int i = 0; i < blocks * kLanes; i++) {
      const Sample s = sample(min_of(i, out - 1), in, out, align_corners);
      if (i % kLanes == 0) base[i / kLanes] = s.low;
      low[i] = s.low - base[i / kLanes];
      high[i] = s.high - base[i / kLanes];
      low_weight[i] = s.low_weight, high_weight[i] = s.high_weight;
      windowed &= high[i] < kLanes;
    }
  }
  template <bool WINDOWED>
  FASTSCNN_INLINE vf find(const float* row, int block, const int32_t* index) const {
    row += base[block];
    if (WINDOWED) return permute(load(row), load(index + block * kLanes));
    alignas(64) float v[kLanes];
    for (int i = 0; i < kLanes; i++) v[i] = row[index[block * kLanes + i]];
    return load(v);
  }
  template <bool WINDOWED>
  FASTSCNN_INLINE vf at(const float* row, int block) const {
    const vf a = find<WINDOWED>(row, block, low), b = find<WINDOWED>(row, block, high);
    return fma(b, load(high_weight + block * kLanes), a * load(low_weight + block * kLanes));
  }
};

// The last rows of the low-resolution logits, one row of columns per class, each row's own labels,
// and whether the row is finite throughout. Results of several are made at a time: each class has a
// plane of its own, and short turns at many planes are slower than long ones.
struct LowLogits {
  static constexpr int kRows = 32;
  int classes, h, w;
  size_t pitch;
  float* rows = nullptr;      // [kRows][classes][pitch]
  uint8_t* labels = nullptr;  // [kRows][pitch]
  bool finite[kRows];

  LowLogits(int classes_, int h_, int w_)
      : classes(classes_), h(h_), w(w_), pitch((size_t(w_) + 15) / 16 * 16 + 16) {}
  void place(Bump& scratch) {
    const size_t held = min_of(h, kRows);
    rows = scratch.take<float>(held * classes * pitch);
    labels = scratch.take<uint8_t>(held * pitch);
  }
  bool alone() const { return classes == 1; }
  // What a logit must be above to have a label at all, and the label of the first class.
  FASTSCNN_INLINE vf floor() const { return splat(alone() ? 0 : -__builtin_inff()); }
  int first() const { return alone(); }
  const float* row(int y, int c) const { return rows + (size_t(y % kRows) * classes + c) * pitch; }
  const uint8_t* labels_of(int y) const { return labels + (y % kRows) * pitch; }
  bool is_finite(int y) const { return finite[y % kRows]; }
  // Takes row y from (w, channels) logits, kLanes pixels at a time; the last pixel fills the last
  // vector.
  template <class T>
  void take_row(int y, const T* in, size_t channels) {
    float* planes = rows + size_t(y % kRows) * classes * pitch;
    vf sum{};  // of zeros: NaN where a logit, or a difference of two, may be infinite or NaN
    for (int x = 0; x < w; x += kLanes) {
      const T* pixel[kLanes];
      for (int i = 0; i < kLanes; i++) pixel[i] = in + min_of(x + i, w - 1) * channels;
      vf best = floor();
      vi label{};
      for (int c = 0; c < classes; c++) {
        vf v;
        for (int i = 0; i < kLanes; i++) v[i] = to_float(pixel[i][c]);
        store(planes + c * pitch + x, v);
        sum += v * splat(2.0f) * splat(0.0f);
        keep_larger<false>(v, vi{} + (c + first()), best, label);
      }
      store_bytes(labels + (y % kRows) * pitch + x, label);
    }
    bool zeros = true;
    for (int i = 0; i < kLanes; i++) zeros &= sum[i] == 0;
    finite[y % kRows] = zeros;
  }
};

// Output rows [begin, end) that read the same two low rows.
struct RowGroup {
  int begin, end, low, high;
};
static RowGroup row_group(int y, int end, int in, int out, bool align_corners) {
  const Sample first = sample(y, in, out, align_corners);
  RowGroup g{y, y + 1, first.low, first.high};
  while (g.end < end && sample(g.end, in, out, align_corners).low == first.low) g.end++;
  return g;
}

constexpr int kLogits = int(kLine / sizeof(logit));  // in a line

// Results of this size and more are written past the cache: nothing here reads them again.
constexpr size_t kStreamedBytes = 1 << 20;

// A whole, aligned cache line of results past the cache; value(i) is vector i of them.
template <class Value>
FASTSCNN_INLINE void stream_line(float* out, Value value) {
  for (int i = 0; i < int(kLine / sizeof(vf)); i++) stream(out + i * kLanes, value(i));
}
template <class Value>
FASTSCNN_INLINE void stream_line(bf16* out, Value value) {
  for (int i = 0; i < int(kLine / sizeof(vf)); i++)
    stream(reinterpret_cast<float*>(out) + i * kLanes, (vf)pack(value(2 * i), value(2 * i + 1)));
}
// The first n of a vector of results.
template <class T>
FASTSCNN_INLINE void store_some(T* out, vf v, int n) {
  T some[kLanes];
  store(some, v);
  __builtin_memcpy(out, some, n * sizeof(T));
}
// The same past the cache, where a whole vector of floats goes to its place: class planes of a
// power-of-two size share cache sets.
FASTSCNN_INLINE void stream_some(float* out, vf v, int n) {
  if (n == kLanes && reinterpret_cast<uintptr_t>(out) % sizeof(vf) == 0)
    stream(out, v);
  else
    store_some(out, v, n);
}
FASTSCNN_INLINE void stream_some(bf16* out, vf v, int n) { store_some(out, v, n); }

// out[i] = low_weight * a[i] + high_weight * b[i] for n elements; a and b are readable, out is not
// writable, to the end of the last vector. A streamed row's ends are stored plainly up to whole
// cache lines: a line written both ways would travel to memory and back.
static void write_row(const float* a, const float* b, Sample s, int n, bool streamed, logit* out) {
  const vf wa = splat(s.low_weight), wb = splat(s.high_weight);
  auto value = [&](int i) { return fma(load(b + i), wb, load(a + i) * wa); };
  auto plainly = [&](int begin, int end) {
    for (int i = begin; i < end; i += kLanes)
      store_some(out + i, value(i), min_of(kLanes, end - i));
  };
  const int before = int(-(reinterpret_cast<uintptr_t>(out) / sizeof(logit)) % kLogits);
  if (!streamed || n < before + kLogits) return plainly(0, n);
  const int end = n - (n - before) % kLogits;
  plainly(0, before);
  for (int i = before; i < end; i += kLogits)
    stream_line(out + i, [&](int v) { return value(i + v * kLanes); });
  plainly(end, n);
}

struct Upsample {
  const Layer* layer;
  const LowLogits* low;
  int h, w;
  ColumnBlocks columns;
  float* buffer;  // logits: two rows; probabilities: three vectors a class

  void place(Bump& scratch, Output output) {
    columns.place(scratch, w);
    size_t floats = 0;
    if (output == Output::logits) floats = 2 * wide();
    if (output == Output::probabilities) floats = size_t(3) * low->classes * kLanes;
    buffer = scratch.take<float>(floats);
  }
  // Floats of a widened row: a vector more than its blocks, so that a vector may be read at any
  // pixel.
  size_t wide() const { return size_t(columns.blocks + 1) * kLanes; }
  template <bool WINDOWED>
  void widen(const float* row, float* out) const {
    for (int i = 0; i < columns.blocks; i++) store(out + i * kLanes, columns.at<WINDOWED>(row, i));
  }

  template <bool WINDOWED>
  void logits(logit* out, Range rows) const {
    float *a = buffer, *b = buffer + wide();
    const bool streamed = size_t(low->classes) * h * w * sizeof(logit) >= kStreamedBytes;
    for (int c = 0; c < low->classes; c++) {
      int in_b = -1;  // the low row that b holds, widened
      for (int y = rows.begin; y < rows.end;) {
        const RowGroup g = row_group(y, rows.end, low->h, h, layer->align_corners);
        if (in_b == g.low) {
          float* swap = a;
          a = b, b = swap;
        } else {
          widen<WINDOWED>(low->row(g.low, c), a);
        }
        widen<WINDOWED>(low->row(g.high, c), b);
        in_b = g.high;
        for (; y < g.end; y++)
          write_row(a, b, sample(y, low->h, h, layer->align_corners), w, streamed,
                    out + (size_t(c) * h + y) * w);
      }
    }
  }

  template <bool WINDOWED>
  void probabilities(logit* out, Range rows) const {
    const int classes = low->classes;
    float *upper = buffer, *lower = upper + classes * kLanes, *value = lower + classes * kLanes;
    for (int y = rows.begin; y < rows.end;) {
      const RowGroup g = row_group(y, rows.end, low->h, h, layer->align_corners);
      for (int block = 0; block < columns.blocks; block++) {
        for (int c = 0; c < classes; c++) {
          store(upper + c * kLanes, columns.at<WINDOWED>(low->row(g.low, c), block));
          store(lower + c * kLanes, columns.at<WINDOWED>(low->row(g.high, c), block));
        }
        const int x = block * kLanes, count = min_of(kLanes, w - x);
        for (int row = g.begin; row < g.end; row++) {
          const Sample s = sample(row, low->h, h, layer->align_corners);
          blend(upper, lower, s.low_weight, s.high_weight, size_t(classes) * kLanes, value);
          if (low->alone())
            store(value, sigmoid(load(value)));
          else
            softmax(value, classes);
          for (int c = 0; c < classes; c++)
            stream_some(out + (size_t(c) * h + row) * w + x, load(value + c * kLanes), count);
        }
      }
      y = g.end;
    }
  }
  static vf sigmoid(vf v) {
    const vf zero = splat(0), one = splat(1.0f), e = exp_negative(v > zero ? zero - v : v);
    return (v > zero ? one : e) / (one + e);
  }
  static void softmax(float* value, int classes) {
    vf largest = load(value), sum = splat(0);
    for (int c = 1; c < classes; c++) largest = at_least(largest, load(value + c * kLanes));
    for (int c = 0; c < classes; c++) {
      const vf e = exp_negative(load(value + c * kLanes) - largest);
      store(value + c * kLanes, e);
      sum += e;
    }
    const vf scale = splat(1.0f) / sum;
    for (int c = 0; c < classes; c++) store(value + c * kLanes, load(value + c * kLanes) * scale);
  }

  // ROWS rows of one block of columns: the running maxima and labels stay in registers. With
  // NONFINITE the samples are weighed as torch weighs them and NaN counts as largest.
  template <bool WINDOWED, bool NONFINITE, int ROWS>
  void label_block(RowGroup g, const Sample* samples_of_rows, int block, uint8_t* out) const {
    vf best[ROWS];
    vi label[ROWS];
#pragma GCC unroll 9
    for (int i = 0; i < ROWS; i++) best[i] = low->floor(), label[i] = vi{};
    for (int c = 0; c < low->classes; c++) {
      const vf a = columns.at<WINDOWED>(low->row(g.low, c), block);
      const vf b = columns.at<WINDOWED>(low->row(g.high, c), block);
      const vf slope = b - a;
      const vi candidate = vi{} + (c + low->first());
#pragma GCC unroll 9
      for (int i = 0; i < ROWS; i++) {
        const Sample& s = samples_of_rows[i];
        const vf v = NONFINITE ? fma(b, splat(s.high_weight), a * splat(s.low_weight))
                               : fma(slope, splat(s.high_weight), a);
        keep_larger<NONFINITE>(v, candidate, best[i], label[i]);
      }
    }
    const int x = block * kLanes, count = min_of(kLanes, w - x);
#pragma GCC unroll 9
    for (int i = 0; i < ROWS; i++) {
      uint8_t bytes[kLanes];
      if (NONFINITE && low->alone()) label[i] &= best[i] == best[i];
      store_bytes(bytes, label[i]);
      __builtin_memcpy(out + size_t(i) * w + x, bytes, count);
    }
  }
  // The label that a block's corners agree on, else -1. A bilinear sample is a convex combination
  // of its corners, so what wins at all of them wins everywhere between.
  int common_label(RowGroup g, int block) const {
    const uint8_t* upper = low->labels_of(g.low) + columns.base[block];
    const uint8_t* lower = low->labels_of(g.high) + columns.base[block];
    const int last = columns.high[block * kLanes + kLanes - 1], label = upper[0];
    for (int i = 0; i <= last; i++)
      if (upper[i] != label || lower[i] != label) return -1;
    return label;
  }
  template <bool WINDOWED, bool NONFINITE>
  void label_group(RowGroup g, uint8_t* out) const {
    constexpr int kRows = kLanes == 16 ? 9 : 4;
    for (int y = g.begin; y < g.end; y += kRows) {
      const int count = min_of(kRows, g.end - y);
      Sample rows[kRows];
      for (int i = 0; i < count; i++) rows[i] = sample(y + i, low->h, h, layer->align_corners);
      uint8_t* first = out + size_t(y) * w;
      for (int block = 0; block < columns.blocks; block++) {
        const int common = NONFINITE ? -1 : common_label(g, block);
        if (common >= 0) {
          const int x = block * kLanes, n = min_of(kLanes, w - x);
          for (int i = 0; i < count; i++) __builtin_memset(first + size_t(i) * w + x, common, n);
        } else if (count == kRows) {
          label_block<WINDOWED, NONFINITE, kRows>(g, rows, block, first);
        } else if (kLanes == 16 && count == kRows - 1) {
          label_block<WINDOWED, NONFINITE, kRows - 1>(g, rows, block, first);
        } else {
          for (int i = 0; i < count; i++)
            label_block<WINDOWED, NONFINITE, 1>(g, rows + i, block, first + size_t(i) * w);
        }
      }
    }
  }
  template <bool WINDOWED>
  void labels(uint8_t* out, Range rows) const {
    for (int y = rows.begin; y < rows.end;) {
      const RowGroup g = row_group(y, rows.end, low->h, h, layer->align_corners);
      if (low->is_finite(g.low) && low->is_finite(g.high))
        label_group<WINDOWED, false>(g, out);
      else
        label_group<WINDOWED, true>(g, out);
      y = g.end;
    }
  }

  template <bool WINDOWED>
  void run(Output output, void* out, Range rows) const {
    if (output == Output::logits) logits<WINDOWED>(static_cast<logit*>(out), rows);
    if (output == Output::probabilities) probabilities<WINDOWED>(static_cast<logit*>(out), rows);
    if (output == Output::labels) labels<WINDOWED>(static_cast<uint8_t*>(out), rows);
  }
  // The first row of the result whose upper low row is `y` or below it.
  int first_row(int y) const {
    int begin = 0, end = h;
    while (begin < end) {
      const int middle = (begin + end) / 2;
      if (sample(middle, low->h, h, layer->align_corners).low < y)
        begin = middle + 1;
      else
        end = middle;
    }
    return begin;
  }
  // The rows of the result between the first and the last of low rows, and those below the very
  // last.
  void between(Range low_rows, Output output, void* out) const {
    const int last = low_rows.end - 1;
    const Range rows{first_row(low_rows.begin), last == low->h - 1 ? h : first_row(last)};
    if (columns.windowed)
      run<true>(output, out, rows);
    else
      run<false>(output, out, rows);
  }
};

// Rows of low-resolution logits, every few followed by the rows of the result that lie between
// them. Source: row(y) gives a row of pixels `pitch` apart.
template <class Source>
struct UpsampleRows {
  Source& source;
  LowLogits low;
  Upsample full;
  Output output;
  void* out;
  Range taken{0, 0};  // the low rows between which results are still to be made

  UpsampleRows(const Layer& l, Source& source_, int low_h, int low_w, int h, int w, Output output_,
               void* out_)
      : source(source_),
        low(l.in, low_h, low_w),
        full{&l, &low, h, w, {}, nullptr},
        output(output_),
        out(out_) {}
  UpsampleRows(const UpsampleRows&) = delete;
  void place(Bump& scratch) {
    low.place(scratch);
    full.place(scratch, output);
  }
  int halo() const { return source.halo() + 1; }
  void start(int y) {
    make();
    const int first = max_of(y - 1, 0);
    source.start(first);
    taken = {first, first};
    if (y > 0) take(first);
  }
  void take(int y) {
    low.take_row(y, source.row(y), source.pitch);
    taken.end = y + 1;
  }
  void row(int y) {
    take(y);
    if (taken.size() == LowLogits::kRows) make();
  }
  void make() {
    if (taken.size() == 0) return;
    full.between(taken, output, out);
    taken.begin = taken.end == low.h ? low.h : taken.end - 1;
  }
  void run(const Team& team) {
    full.columns.fill(low.w, full.w, full.layer->align_corners);
    for_each_row(*this, low.h, team, [&](int y) { row(y); });
    make();
    stream_fence();
  }
};

#if FASTSCNN_ARITHMETIC != FASTSCNN_INT8
struct PlaneOfLogits {
  Plane x;
  int pitch;
  int halo() const { return 0; }
  void start(int) {}
  const logit* row(int y) const { return row_of(x, y, pitch); }
};

static size_t upsample_classify(const Layer& l, Plane x, Output output, void* out, int h, int w,
                                const Team& team, Bump scratch) {
  PlaneOfLogits source{x, pixel_pitch(l.in)};
  UpsampleRows<PlaneOfLogits> stage(l, source, x.h, x.w, h, w, output, out);
  stage.place(scratch);
  if (!scratch.measuring()) stage.run(team);
  return scratch.used;
}
constexpr auto kUpsampleClassify = upsample_classify;
#else
constexpr decltype(Ops::upsample_classify) kUpsampleClassify = nullptr;
#endif
