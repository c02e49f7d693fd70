// pyramid_pooling in int8: means of cells, a 1x1 on each grid, and the out-convolution of rows of x
// and of the resized grids side by side.

// Means over the cells that pyramid_pooling.inl describes.
static void pool(const Branch& branch, Plane x, int channels, Range blocks) {
  element* pooled = static_cast<element*>(branch.pooled);
  const int bins = branch.bins;
  for (int i = 0; i < bins; i++)
    for (int j = 0; j < bins; j++) {
      const int y0 = int(int64_t(i) * x.h / bins),
                y1 = int((int64_t(i + 1) * x.h + bins - 1) / bins);
      const int x0 = int(int64_t(j) * x.w / bins),
                x1 = int((int64_t(j + 1) * x.w + bins - 1) / bins);
      const float share = 1.0f / float(int64_t(y1 - y0) * (x1 - x0));
      for (int c = blocks.begin * kBlock; c < blocks.end * kBlock; c += NarrowBytes::kChannels) {
        using B = NarrowBytes;
        typename B::ints sums[4] = {B::zero(), B::zero(), B::zero(), B::zero()};
        for (int y = y0; y < y1; y++) {
          const element* p = row_of(x, y, channels) + size_t(x0) * channels + c;
          for (int k = x0; k < x1; k++, p += channels) {
            typename B::ints values[4];
            widen<B>(B::load(p), values);
            for (int v = 0; v < 4; v++) sums[v] = B::add(sums[v], values[v]);
          }
        }
        typename B::floats means[4];
        for (int v = 0; v < 4; v++) means[v] = B::multiply(B::to_floats(sums[v]), B::all(share));
        B::store(pooled + (size_t(i) * bins + j) * channels + c, narrow<B>(means, B::zero()));
      }
    }
}

// Source: rows of concat(x, branches).
struct ConcatRows {
  const Layer* layer;
  Plane x;
  int in, mid, channels;  // of x, of a branch, of both in a row
  ResizedRows branches[kMaxBins];

  ConcatRows(const Layer& l, Plane x_, const Branch* of) : layer(&l), x(x_) {
    in = pixel_pitch(l.in), mid = pixel_pitch(l.mid), channels = in + l.bin_count * mid;
    for (int b = 0; b < l.bin_count; b++)
      branches[b] = {{of[b].value, of[b].bins, of[b].bins},
                     mid,
                     x.h,
                     x.w,
                     l.align_corners,
                     clamp_of(Activation::none),
                     nullptr,
                     nullptr};
  }
  void place(Bump& scratch) {
    for (int b = 0; b < layer->bin_count; b++) branches[b].place(scratch);
  }
  void start(int y) {
    for (int b = 0; b < layer->bin_count; b++) branches[b].start(y);
  }
  void row(int y, element* out) {
    const element* p = row_of(x, y, in);
    for (int i = 0; i < x.w; i++)
      __builtin_memcpy(out + size_t(i) * channels, p + size_t(i) * in, in);
    for (int b = 0; b < layer->bin_count; b++) branches[b].row(y, out + in + b * mid, channels);
  }
};

// Rows of the result.
struct PyramidRows {
  const Layer* layer;
  const Weights* weights;
  ConcatRows source;
  Ring ring;         // of kernel 3
  element* outside;  // kernel 3: a row above or below; kernel 1: the row itself

  PyramidRows(const Layer& l, const Weights& w, Plane x, const Branch* branches)
      : layer(&l), weights(&w), source(l, x, branches) {}
  void place(Bump& scratch) {
    const Plane& x = source.x;
    source.place(scratch);
    if (layer->kernel == 3) ring.place(scratch, 3, 1, source.channels, x.w, x.h);
    outside = scratch.take<element>(size_t(x.w + 2) * source.channels);
  }
  void start(int y) {
    source.start(y);
    if (layer->kernel == 1) return;
    ring.start(y - 1);
    const int channels = source.channels;
    for (int i = 0; i < source.x.w + 2; i++) {
      __builtin_memset(outside + size_t(i) * channels, *weights->input_zero, source.in);
      __builtin_memset(outside + size_t(i) * channels + source.in, 0, channels - source.in);
    }
    for (int slot = 0; slot < 3; slot++) {
      element* row = ring.slot(slot);
      __builtin_memcpy(row - channels, outside, channels);
      __builtin_memcpy(row + size_t(ring.width) * channels, outside, channels);
    }
  }
  void row(int y, element* out) {
    const int channels = source.channels;
    const Clamp clamp = clamp_of(layer->activation);
    if (layer->kernel == 1) {
      source.row(y, outside);
      const Segment a{outside, size_t(channels), channels, 0};
      return multiply(sum_of(&a, 1, weights->main, clamp, out), source.x.w);
    }
    ring.pull(source, y + 1);
    Segment taps[9];
    for (int tap = 0; tap < 9; tap++) {
      const element* in = ring.at(y + tap / 3 - 1);
      if (!in) in = outside + channels;
      taps[tap] = {in + (tap % 3 - 1) * ptrdiff_t(channels), size_t(channels), channels,
                   tap * channels};
    }
    multiply(sum_of(taps, 9, weights->main, clamp, out), source.x.w);
  }
};

static size_t pyramid_pooling(const Layer& l, const Weights& w, Plane x, const Branch* branches,
                              Plane out, const Team& team, Bump scratch) {
  const int in = pixel_pitch(l.in), mid = pixel_pitch(l.mid), out_channels = pixel_pitch(l.out);
  PyramidRows stage(l, w, x, branches);
  stage.place(scratch);
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
    const Segment a{pooled, size_t(in), in, 0};
    multiply(sum_of(&a, 1, w.branch[b], clamp_of(Activation::relu), value), cells.size());
  }
  team.wait();
  const Range range = share(x.h, team);
  if (range.begin == range.end) return scratch.used;
  stage.start(range.begin);
  for (int y = range.begin; y < range.end; y++) stage.row(y, row_of(out, y, out_channels));
  return scratch.used;
}
