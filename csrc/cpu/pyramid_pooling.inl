// pyramid_pooling: adaptive average pools, a 1x1 + ReLU on each grid, resize, concat,
// out-convolution. A 1x1 out-convolution commutes with the resize: each branch's share of it is
// computed on the grid (1 + 4 + 9 + 36 cells) and interpolated into the sum. A 3x3 does not: there
// the concatenated rows exist, three at a time.

// One branch's grids, bins x bins cells each.
struct Branch {
  int bins;
  float *pooled, *value, *product;  // in, mid and out channels
};

static void place_branches(const Layer& l, float* grids, Branch* branches) {
  for (int b = 0; b < l.bin_count; b++) {
    const size_t cells = size_t(l.bins[b]) * l.bins[b];
    branches[b].bins = l.bins[b];
    branches[b].pooled = grids;
    branches[b].value = branches[b].pooled + cells * padded(l.in);
    branches[b].product = branches[b].value + cells * padded(l.mid);
    grids = branches[b].product + cells * padded(l.out);
  }
}

// Means over [i * h / bins, ceil((i + 1) * h / bins)), as torch.nn.functional.adaptive_avg_pool2d.
// Sums are taken row by row, which keeps the rounding error of large cells small.
static void pool(const Branch& branch, Plane x, size_t channels, Range blocks) {
  const int bins = branch.bins;
  for (int i = 0; i < bins; i++)
    for (int j = 0; j < bins; j++) {
      const int y0 = int(int64_t(i) * x.h / bins),
                y1 = int((int64_t(i + 1) * x.h + bins - 1) / bins);
      const int x0 = int(int64_t(j) * x.w / bins),
                x1 = int((int64_t(j + 1) * x.w + bins - 1) / bins);
      const vf scale = splat(1.0f / (float(y1 - y0) * float(x1 - x0)));
      for (size_t c = size_t(blocks.begin) * kBlock; c < size_t(blocks.end) * kBlock; c += kLanes) {
        vf sum = splat(0);
        for (int y = y0; y < y1; y++) {
          vf row = splat(0);
          const float* p = x.data + (size_t(y) * x.w + x0) * channels + c;
          for (int k = x0; k < x1; k++, p += channels) row += load(p);
          sum += row;
        }
        store(branch.pooled + (size_t(i) * bins + j) * channels + c, sum * scale);
      }
    }
}

// Row y of every branch's grid, resized to the row's width and handed to `take(branch, pixel,
// value)`.
struct BranchRows {
  const Layer* layer;
  Plane x;
  int channels;  // of the resized grids
  float* grids[kMaxBins];
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
      const size_t floats = size_t(layer->bins[b]) * channels;
      blend(grids[b] + s.low * floats, grids[b] + s.high * floats, s.low_weight, s.high_weight,
            floats, blended[b]);
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
  void row(int y, float* out) {
    const Plane& x = branches.x;
    const float* p = x.data + size_t(y) * x.w * in;
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
  const size_t in = w.main.k, channels = w.main.n;
  branches.start();
  for (int y = rows.begin; y < rows.end; y++) {
    branches.blend_row(y);
    for (int i = 0; i < x.w; i++)
      for (size_t c = 0; c < channels; c += kLanes) {
        vf v = branches.at(0, i, int(c));
        for (int b = 1; b < l.bin_count; b++) v += branches.at(b, i, int(c));
        store(sum + i * channels + c, v);
      }
    pointwise(w.main, x.data + size_t(y) * x.w * in, in, x.w, clamp_of(l.activation),
              out.data + size_t(y) * x.w * channels, channels, sum, channels);
  }
}

static void pyramid_rows_3x3(const Layer& l, const Weights& w, ConcatRows& source, Ring& ring,
                             Plane out, Range rows) {
  const size_t channels = ring.channels;
  const Gemm unbiased{w.main.panels, nullptr, w.main.k, w.main.n};
  ring.start(rows.begin - 1);
  source.start(ring.next);
  for (int y = rows.begin; y < rows.end; y++) {
    ring.pull(source, y + 1);
    // A sum over all nine taps is thousands of terms long and loses digits: each row of taps is
    // summed by itself.
    float* sums = out.data + size_t(y) * out.w * w.main.n;
    for (int ky = 0; ky < 3; ky++) {
      const float* in = ring.at(y + ky - 1);
      Segment taps[3];
      for (int kx = 0; kx < 3; kx++)
        taps[kx] = {in ? in + (kx - 1) * ptrdiff_t(channels) : nullptr, channels, int(channels),
                    (3 * ky + kx) * int(channels)};
      const Activation activation = ky == 2 ? l.activation : Activation::none;
      multiply({taps, 3, ky == 0 ? &w.main : &unbiased, clamp_of(activation),
                ky == 0 ? nullptr : sums, size_t(w.main.n), sums, size_t(w.main.n)},
               out.w);
    }
  }
}

static size_t pyramid_pooling(const Layer& l, const Weights& w, Plane x, float* grids, Plane out,
                              const Team& team, Bump scratch) {
  const int in = padded(l.in), mid = padded(l.mid);
  const bool commutes = l.kernel == 1;
  BranchRows rows{};
  rows.layer = &l, rows.x = x;
  rows.place(scratch, commutes ? padded(l.out) : mid);
  Ring ring{};
  float* sum = nullptr;
  if (commutes)
    sum = scratch.take<float>(size_t(x.w) * padded(l.out));
  else
    ring.place(scratch, 3, 1, in + l.bin_count * mid, x.w, x.h);
  if (scratch.measuring()) return scratch.used;

  Branch branches[kMaxBins];
  place_branches(l, grids, branches);
  for (int b = 0; b < l.bin_count; b++) pool(branches[b], x, in, share(in / kBlock, team));
  team.wait();
  for (int b = 0; b < l.bin_count; b++) {
    const Branch& branch = branches[b];
    const Range cells = share(branch.bins * branch.bins, team);
    rows.grids[b] = commutes ? branch.product : branch.value;
    if (cells.begin == cells.end) continue;
    const int count = cells.end - cells.begin;
    float* value = branch.value + size_t(cells.begin) * mid;
    pointwise(w.branch[b], branch.pooled + size_t(cells.begin) * in, in, count,
              clamp_of(Activation::relu), value, mid);
    if (commutes)
      pointwise(w.branch_out[b], value, mid, count, clamp_of(Activation::none),
                branch.product + size_t(cells.begin) * padded(l.out), padded(l.out));
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
