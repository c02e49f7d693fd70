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
  float* refined;

  FusionRows(const Layer& l, const Weights& w, Plane high_, Plane low)
      : layer(&l), weights(&w), high(high_) {
    const Activation after_resize = l.dense ? Activation::relu : Activation::none;
    source = {low,     padded(l.in), high.h, high.w, l.align_corners, clamp_of(after_resize),
              nullptr, nullptr};
  }
  void place(Bump& scratch) {
    const int dilation = layer->dilation, channels = padded(layer->in);
    source.place(scratch);
    if (!layer->dense) input.place(scratch, 2 * dilation + 1, dilation, channels, high.w, high.h);
    refined = scratch.take<float>(size_t(high.w) * channels);
  }
  void start(int y) {
    if (!layer->dense) input.start(y - layer->dilation);
    source.start(y);
  }
  void row(int y, float* out) {
    const int channels = padded(layer->in), high_channels = padded(layer->mid);
    if (layer->dense) {
      source.row(y, refined);
    } else {
      input.pull(source, y + layer->dilation);
      depthwise(input, y, 1, layer->dilation, high.w, weights->depthwise,
                clamp_of(Activation::relu), refined);
    }
    const Segment branches[2] = {{refined, size_t(channels), channels, 0},
                                 {high.data + size_t(y) * high.w * high_channels,
                                  size_t(high_channels), high_channels, channels}};
    multiply({branches, 2, &weights->main, clamp_of(layer->activation), nullptr, 0, out,
              size_t(padded(layer->out))},
             high.w);
  }
};

// The dense 1x1 on the low branch's own grid; the team waits before anyone resizes it.
static Plane refine_dense(const Layer& l, const Weights& w, Plane low, Plane refined,
                          const Team& team) {
  if (!l.dense) return low;
  const size_t channels = padded(l.in);
  const Range rows = share(low.h, team);
  const size_t first = size_t(rows.begin) * low.w * channels;
  if (rows.begin < rows.end)
    pointwise(w.expand, low.data + first, channels, (rows.end - rows.begin) * low.w,
              clamp_of(Activation::none), refined.data + first, channels);
  team.wait();
  return refined;
}

static size_t feature_fusion(const Layer& l, const Weights& w, Plane high, Plane low, Plane refined,
                             Plane out, const Team& team, Bump scratch) {
  FusionRows stage(l, w, high, low);
  stage.place(scratch);
  if (scratch.measuring()) return scratch.used;
  stage.source.x = refine_dense(l, w, low, refined, team);
  run_rows(stage, out, padded(l.out), team);
  return scratch.used;
}
