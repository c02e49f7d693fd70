// dsconv: depthwise 3x3 + bias [+ act] -> pointwise 1x1 + bias + act [-> 1x1 + bias]. The depthwise
// result is one row, in cache.
template <class Source>
struct DsconvRows {
  const Layer* layer;
  const Weights* weights;
  Source source;
  Ring input;
  int width, height;
  float *depthwise_out, *pointwise_out;

  DsconvRows(const Layer& l, const Weights& w, Source source_, int in_width, int in_height)
      : layer(&l),
        weights(&w),
        source(source_),
        width(l.output_size(in_width)),
        height(l.output_size(in_height)) {
    input.width = in_width, input.height = in_height;
  }
  void place(Bump& scratch) {
    const int dilation = layer->dilation, channels = weights->depthwise.channels;
    input.place(scratch, 2 * dilation + 1, dilation, channels, input.width, input.height);
    depthwise_out = scratch.take<float>(size_t(width) * channels);
    pointwise_out = layer->last ? scratch.take<float>(size_t(width) * weights->main.n) : nullptr;
  }
  void start(int y) {
    input.start(y * layer->stride - layer->dilation);
    source.start(input.next);
  }
  void row(int y, float* out) {
    const int channels = weights->depthwise.channels;
    input.pull(source, y * layer->stride + layer->dilation);
    depthwise(input, y, layer->stride, layer->dilation, width, weights->depthwise,
              clamp_of(layer->mid_activation), depthwise_out);
    const Gemm &main = weights->main, &last = weights->last;
    float* result = layer->last ? pointwise_out : out;
    pointwise(main, depthwise_out, channels, width, clamp_of(layer->activation), result, main.n);
    if (layer->last)
      pointwise(last, result, main.n, width, clamp_of(Activation::none), out, last.n);
  }
};

static size_t dsconv(const Layer& l, const Weights& w, Plane x, Plane out, const Team& team,
                     Bump scratch) {
  DsconvRows<CopyRows> stage(l, w, CopyRows{x, padded(l.in)}, x.w, x.h);
  stage.place(scratch);
  if (!scratch.measuring()) run_rows(stage, out, padded(l.result_channels()), team);
  return scratch.used;
}
