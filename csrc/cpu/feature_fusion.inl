// feature_fusion: resize low to high's size -> depthwise 3x3 + ReLU -> 1x1, plus 1x1 of high, ReLU.
// The resized tensor exists as the few rows that the depthwise needs; both 1x1s are one product. A
// dense 1x1 in the depthwise's place commutes with the resize, which weighs by shares of 1: it runs
// on the small grid, its ReLU after the resize.
struct FusionRows {
  const Layer* layer;
  const Weights* weights;
  Plane high;
  ResizedRows source;
  Ring input;
  Parts parts;
  element* refined;  // a part's depthwise result; where dense, the whole resized row

  FusionRows(const Layer& l, const Weights& w, Plane high_, Plane low)
      : layer(&l), weights(&w), high(high_), parts(high_.w, pixel_pitch(l.in)) {
    source = {
        low,    pixel_pitch(l.in), high.h, high.w, l.align_corners, refined_clamp(l, w), nullptr,
        nullptr};
  }
  void place(Bump& scratch) {
    const int dilation = layer->dilation, channels = pixel_pitch(layer->in);
    source.place(scratch);
    if (!layer->dense) input.place(scratch, 2 * dilation + 1, dilation, channels, high.w, high.h);
    refined = scratch.take<element>((layer->dense ? high.w : parts.longest()) * channels);
  }
  int halo() const { return layer->dense ? 0 : 2 * layer->dilation; }
  void start(int y) {
    if (!layer->dense) input.start(y - layer->dilation);
    source.start(y);
  }
  void row(int y, element* out) {
    const int channels = pixel_pitch(layer->in), high_channels = pixel_pitch(layer->mid);
    const Gemm& main = weights->main;
    const element* skip = row_of(high, y, high_channels);
    auto fuse = [&](const element* low, Range x) {
      const Segment branches[2] = {
          {low, size_t(channels), channels, 0},
          {skip + size_t(x.begin) * high_channels, size_t(high_channels), high_channels, channels}};
      multiply(
          sum_of(branches, 2, main, clamp_of(layer->activation), out + size_t(x.begin) * main.n),
          x.size());
    };
    if (layer->dense) {
      source.row(y, refined);
      return fuse(refined, {0, high.w});
    }
    input.pull(source, y + layer->dilation);
    parts.for_each([&](Range x) {
      depthwise(input, y, 1, layer->dilation, x, weights->depthwise, clamp_of(Activation::relu),
                refined);
      fuse(refined, x);
    });
  }
};

// The dense 1x1 on the low branch's own grid; the team waits before anyone resizes it.
static Plane refine_dense(const Layer& l, const Weights& w, Plane low, Plane refined,
                          const Team& team) {
  if (!l.dense) return low;
  const int channels = pixel_pitch(l.in);
  const Range rows = share(low.h, team);
  if (rows.begin < rows.end)
    multiply(pointwise({row_of(low, rows.begin, channels), size_t(channels), channels, 0}, w.expand,
                       clamp_of(Activation::none), row_of(refined, rows.begin, channels)),
             rows.size() * low.w);
  team.wait();
  return refined;
}

static size_t feature_fusion(const Layer& l, const Weights& w, Plane high, Plane low, Plane refined,
                             Plane out, const Team& team, Bump scratch) {
  FusionRows stage(l, w, high, low);
  stage.place(scratch);
  if (scratch.measuring()) return scratch.used;
  const Tiles tiles;
  stage.source.x = refine_dense(l, w, low, refined, team);
  run_rows(stage, out, pixel_pitch(l.out), team);
  return scratch.used;
}
