// inverted_residual: 1x1 expand + act -> depthwise 3x3 + act -> 1x1 [+ x]. Of the expanded tensor
// only the three rows that the depthwise needs exist. Outside the image the *expanded* tensor is
// zero.

// Source: rows of the expanded tensor.
struct ExpandedRows {
  const Gemm* expand;
  Plane x;
  int channels;  // of x
  Clamp clamp;
  void row(int y, element* out) {
    multiply(
        pointwise({row_of(x, y, channels), size_t(channels), channels, 0}, *expand, clamp, out),
        x.w);
  }
};

struct InvertedResidualRows {
  const Layer* layer;
  const Weights* weights;
  ExpandedRows source;
  Ring expanded;
  Parts parts;
  element* depthwise_out;

  InvertedResidualRows(const Layer& l, const Weights& w, Plane x)
      : layer(&l),
        weights(&w),
        source{&w.expand, x, pixel_pitch(l.in), clamp_of(l.activation)},
        parts(l.output_size(x.w), w.depthwise.channels) {}
  void place(Bump& scratch) {
    const int channels = weights->depthwise.channels;
    expanded.place(scratch, 3, 1, channels, source.x.w, source.x.h);
    depthwise_out = scratch.take<element>(parts.longest() * channels);
  }
  int halo() const { return 2 / layer->stride; }
  void start(int y) { expanded.start(y * layer->stride - 1); }
  void row(int y, element* out) {
    const int channels = weights->depthwise.channels;
    const Gemm& project = weights->main;
    const element* add = layer->residual ? row_of(source.x, y, source.channels) : nullptr;
    expanded.pull(source, y * layer->stride + 1);
    parts.for_each([&](Range x) {
      depthwise(expanded, y, layer->stride, 1, x, weights->depthwise, clamp_of(layer->activation),
                depthwise_out);
      const size_t first = size_t(x.begin) * project.n;
      multiply(pointwise({depthwise_out, size_t(channels), channels, 0}, project,
                         clamp_of(Activation::none), out + first, add ? add + first : nullptr),
               x.size());
    });
  }
};

static size_t inverted_residual(const Layer& l, const Weights& w, Plane x, Plane out,
                                const Team& team, Bump scratch) {
  InvertedResidualRows stage(l, w, x);
  stage.place(scratch);
  if (scratch.measuring()) return scratch.used;
  const Tiles tiles;
  run_rows(stage, out, pixel_pitch(l.out), team);
  return scratch.used;
}
