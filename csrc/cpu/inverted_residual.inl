// inverted_residual: 1x1 expand + act -> depthwise 3x3 + act -> 1x1 [+ x]. Of the expanded tensor
// only the three rows that the depthwise needs exist. Outside the image the *expanded* tensor is
// zero.

// Source: rows of the expanded tensor.
struct ExpandedRows {
  const Gemm* expand;
  Plane x;
  Clamp clamp;
  void start(int) {}
  void row(int y, float* out) {
    const size_t channels = expand->k;
    pointwise(*expand, x.data + size_t(y) * x.w * channels, channels, x.w, clamp, out, expand->n);
  }
};

struct InvertedResidualRows {
  const Layer* layer;
  const Weights* weights;
  ExpandedRows source;
  Ring expanded;
  int width;
  float* depthwise_out;

  InvertedResidualRows(const Layer& l, const Weights& w, Plane x)
      : layer(&l),
        weights(&w),
        source{&w.expand, x, clamp_of(l.activation)},
        width(l.output_size(x.w)) {}
  void place(Bump& scratch) {
    const int channels = weights->depthwise.channels;
    expanded.place(scratch, 3, 1, channels, source.x.w, source.x.h);
    depthwise_out = scratch.take<float>(size_t(width) * channels);
  }
  void start(int y) { expanded.start(y * layer->stride - 1); }
  void row(int y, float* out) {
    const int channels = weights->depthwise.channels;
    const Gemm& project = weights->main;
    const Plane& x = source.x;
    expanded.pull(source, y * layer->stride + 1);
    depthwise(expanded, y, layer->stride, 1, width, weights->depthwise, clamp_of(layer->activation),
              depthwise_out);
    const float* add = layer->residual ? x.data + size_t(y) * x.w * project.n : nullptr;
    pointwise(project, depthwise_out, channels, width, clamp_of(Activation::none), out, project.n,
              add, project.n);
  }
};

static size_t inverted_residual(const Layer& l, const Weights& w, Plane x, Plane out,
                                const Team& team, Bump scratch) {
  InvertedResidualRows stage(l, w, x);
  stage.place(scratch);
  if (!scratch.measuring()) run_rows(stage, out, padded(l.out), team);
  return scratch.used;
}
