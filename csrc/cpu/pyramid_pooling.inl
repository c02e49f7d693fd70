// pyramid_pooling: adaptive average pools, a 1x1 + ReLU on each grid, resize, concat,
// out-convolution. A 1x1 out-convolution commutes with the resize: each branch's share of it is
// computed on the grid (1 + 4 + 9 + 36 cells) and interpolated into the sum. A 3x3 does not: there
// the concatenated rows exist, three at a time.

// Means over [i * h / bins, ceil((i + 1) * h / bins)), as torch.nn.functional.adaptive_avg_pool2d.
// Sums are taken row by row, which keeps the rounding error of large cells small.
static void pool(const Branch& branch, Plane x, int channels, Range blocks) {
  element* pooled = static_cast<element*>(branch.pooled);
  const int bins = branch.bins;
  for (int i = 0; i < bins; i++)
    for (int j = 0; j < bins; j++) {
      const int y0 = int(int64_t(i) * x.h / bins),
                y1 = int((int64_t(i + 1) * x.h + bins - 1) / bins);
      const int x0 = int(int64_t(j) * x.w / bins),
                x1 = int((int64_t(j + 1) * x.w + bins - 1) / bins);
      const vf scale = splat(1.0f / (float(y1 - y0) * float(x1 - x0)));
      for (int c = blocks.begin * kBlock; c < blocks.end * kBlock; c += kLanes) {
        vf sum = splat(0);
        for (int y = y0; y < y1; y++) {
          vf row = splat(0);
          const element* p = row_of(x, y, channels) + size_t(x0) * channels + c;
          for (int k = x0; k < x1; k++, p += channels) row += load(p);
          sum += row;
        }
        store(pooled + (size_t(i) * bins + j) * channels + c, sum * scale);
      }
    }
}

// Row y of every branch's grid, resized to the row's width.
struct BranchRows {
  const Layer* layer;
  Plane x;
  int channels;  // of the resized grids
  const Branch* branches;
  bool products;  // rather than values
  Sample* columns[kMaxBins];
  float* blended[kMaxBins];

  void place(Bump& scratch, int channels_) {
    channels = channels_;
    for (int b = 0; b < layer->bin_count; b++) {
      columns[b] = scratch.take<Sample>(x.w);
      blended[b] = scratch.take<float>(size_t(layer->bins[b]) * channels);
    }
  }
  void start() {
    for (int b = 0; b < layer->bin_count; b++)
      samples(columns[b], layer->bins[b], x.w, layer->align_corners);
  }
  void blend_row(int y) {
    for (int b = 0; b < layer->bin_count; b++) {
      const Sample s = sample(y, layer->bins[b], x.h, layer->align_corners);
      const size_t n = size_t(layer->bins[b]) * channels;
      auto blend_of = [&](const auto* grid) {
        blend(grid + s.low * n, grid + s.high * n, s.low_weight, s.high_weight, n, blended[b]);
      };
      products ? blend_of(branches[b].product)
               : blend_of(static_cast<const element*>(branches[b].value));
    }
  }
  FASTSCNN_INLINE vf at(int b, int pixel, int channel) const {
    const Sample& s = columns[b][pixel];
    const vf low = load(blended[b] + size_t(s.low) * channels + channel);
    const vf high = load(blended[b] + size_t(s.high) * channels + channel);
    return fma(high, splat(s.high_weight), low * splat(s.low_weight));
  }
};

// Source: rows of concat(x, branches).
struct ConcatRows {
  BranchRows branches;
  int in;
  void start(int) { branches.start(); }
  void row(int y, element* out) {
    const Plane& x = branches.x;
    const element* p = row_of(x, y, in);
    branches.blend_row(y);
    for (int i = 0; i < x.w; i++) {
      for (int c = 0; c < in; c += kLanes) store(out + c, load(p + c));
      p += in, out += in;
      for (int b = 0; b < branches.layer->bin_count; b++, out += branches.channels)
        for (int c = 0; c < branches.channels; c += kLanes) store(out + c, branches.at(b, i, c));
    }
  }
};

static void pyramid_rows_1x1(const Layer& l, const Weights& w, BranchRows& branches, float* sum,
                             Plane out, Range rows) {
  const Plane& x = branches.x;
  const int in = pixel_pitch(l.in), channels = w.main.n;
  branches.start();
  for (int y = rows.begin; y < rows.end; y++) {
    branches.blend_row(y);
    for (int i = 0; i < x.w; i++)
      for (int c = 0; c < channels; c += kLanes) {
        vf v = branches.at(0, i, c);
        for (int b = 1; b < l.bin_count; b++) v += branches.at(b, i, c);
        store(sum + size_t(i) * channels + c, v);
      }
    multiply(pointwise({row_of(x, y, in), size_t(in), in, 0}, w.main, clamp_of(l.activation),
                       row_of(out, y, channels), sum),
             x.w);
  }
}

static void pyramid_rows_3x3(const Layer& l, const Weights& w, ConcatRows& source, Ring& ring,
                             Plane out, Range rows) {
  const int channels = ring.channels;
  Gemm unbiased = w.main;
  unbiased.bias = nullptr;
  // A sum over all nine taps is thousands of terms long and loses digits: where those digits are
  // asked for, each row of taps is summed by itself.
  constexpr int kTaps = kLongSums ? 9 : 3;
  ring.start(rows.begin - 1);
  source.start(ring.next);
  for (int y = rows.begin; y < rows.end; y++) {
    ring.pull(source, y + 1);
    for (int first = 0; first < 9; first += kTaps) {
      Segment taps[kTaps];
      for (int i = 0; i < kTaps; i++) {
        const int tap = first + i;
        const element* in = ring.at(y + tap / 3 - 1);
        taps[i] = {in ? in + (tap % 3 - 1) * ptrdiff_t(channels) : nullptr, size_t(channels),
                   channels, tap * channels};
      }
      Epilogue<element, element> epilogue{clamp_of(l.activation), row_of(out, y, w.main.n),
                                          size_t(w.main.n)};
      if (first > 0) epilogue = epilogue.continued();
      if (first + kTaps < 9) epilogue = epilogue.unfinished();
      multiply(product_of(taps, kTaps, first == 0 ? w.main : unbiased, epilogue), out.w);
    }
  }
}

static size_t pyramid_pooling(const Layer& l, const Weights& w, Plane x, const Branch* branches,
                              Plane out, const Team& team, Bump scratch) {
  const int in = pixel_pitch(l.in), mid = pixel_pitch(l.mid), out_channels = pixel_pitch(l.out);
  const bool commutes = l.kernel == 1;
  BranchRows rows{};
  rows.layer = &l, rows.x = x, rows.branches = branches, rows.products = commutes;
  rows.place(scratch, commutes ? out_channels : mid);
  Ring ring{};
  float* sum = nullptr;
  if (commutes)
    sum = scratch.take<float>(size_t(x.w) * out_channels);
  else
    ring.place(scratch, 3, 1, in + l.bin_count * mid, x.w, x.h);
  if (scratch.measuring()) return scratch.used;

  const Tiles tiles;
  for (int b = 0; b < l.bin_count; b++) pool(branches[b], x, in, share(in / kBlock, team));
  team.wait();
  for (int b = 0; b < l.bin_count; b++) {
    const Branch& branch = branches[b];
    const Range cells = share(branch.bins * branch.bins, team);
    if (cells.begin == cells.end) continue;
    const element* pooled = static_cast<const element*>(branch.pooled) + size_t(cells.begin) * in;
    element* value = static_cast<element*>(branch.value) + size_t(cells.begin) * mid;
    multiply(pointwise({pooled, size_t(in), in, 0}, w.branch[b], clamp_of(Activation::relu), value),
             cells.size());
    if (commutes)
      multiply(pointwise({value, size_t(mid), mid, 0}, w.branch_out[b], clamp_of(Activation::none),
                         branch.product + size_t(cells.begin) * out_channels),
               cells.size());
  }
  team.wait();
  const Range range = share(x.h, team);
  if (range.begin == range.end) return scratch.used;
  if (commutes) {
    pyramid_rows_1x1(l, w, rows, sum, out, range);
  } else {
    ConcatRows source{rows, in};
    pyramid_rows_3x3(l, w, source, ring, out, range);
  }
  return scratch.used;
}
