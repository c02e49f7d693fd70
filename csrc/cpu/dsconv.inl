// dsconv: depthwise 3x3 + bias [+ act] -> pointwise 1x1 + bias + act [-> 1x1 + bias].
template <class Source>
struct DsconvRows {
  const Layer* layer;
  const Weights* weights;
  Source source;
  Ring input;
  int width, height;
  Parts parts;
  element *depthwise_out, *pointwise_out;
  int last_pitch;  // of a pixel's logits

  DsconvRows(const Layer& l, const Weights& w, Source source_, int in_width, int in_height)
      : layer(&l),
        weights(&w),
        source(source_),
        width(l.output_size(in_width)),
        height(l.output_size(in_height)),
        parts(width, max_of(w.depthwise.channels, l.last ? w.main.n : 0)),
        last_pitch(logit_pitch(l.last)) {
    input.width = in_width, input.height = in_height;
  }
  void place(Bump& scratch) {
    const int dilation = layer->dilation, channels = weights->depthwise.channels;
    source.place(scratch);
    input.place(scratch, 2 * dilation + 1, dilation, channels, input.width, input.height);
    depthwise_out = scratch.take<element>(parts.longest() * channels);
    pointwise_out =
        layer->last ? scratch.take<element>(parts.longest() * weights->main.n) : nullptr;
  }
  int halo() const { return (2 * layer->dilation + source.halo()) / layer->stride; }
  void start(int y) {
    input.start(y * layer->stride - layer->dilation);
    source.start(input.next);
  }
  template <class Out>
  void row(int y, Out* out) {
    const Gemm &main = weights->main, &last = weights->last;
    const int channels = weights->depthwise.channels;
    const Clamp clamp = clamp_of(layer->activation);
    input.pull(source, y * layer->stride + layer->dilation);
    parts.for_each([&](Range x) {
      depthwise(input, y, layer->stride, layer->dilation, x, weights->depthwise,
                clamp_of(layer->mid_activation), depthwise_out);
      const Segment a{depthwise_out, size_t(channels), channels, 0};
      if (layer->last) {
        multiply(pointwise(a, main, clamp, pointwise_out), x.size());
        if constexpr (!__is_same(Out, uint8_t))
          multiply(pointwise({pointwise_out, size_t(main.n), main.n, 0}, last,
                             clamp_of(Activation::none), out + size_t(x.begin) * last_pitch,
                             static_cast<const Out*>(nullptr), last_pitch),
                   x.size());
      } else if constexpr (__is_same(Out, element)) {
        multiply(pointwise(a, main, clamp, out + size_t(x.begin) * main.n), x.size());
      }
    });
  }
};

static size_t dsconv(const Layer& l, const Weights& w, Plane x, Plane out, const Team& team,
                     Bump scratch) {
  DsconvRows<CopyRows> stage(l, w, CopyRows{x, pixel_pitch(l.in)}, x.w, x.h);
  stage.place(scratch);
  if (scratch.measuring()) return scratch.used;
  const Tiles tiles;
  if (l.last)
    run_rows<logit>(stage, out, logit_pitch(l.last), team);
  else
    run_rows(stage, out, pixel_pitch(l.out), team);
  return scratch.used;
}
