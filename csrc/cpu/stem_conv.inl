// stem_conv: 3x3 stride 2 convolution + bias + act, straight from the caller's picture.

// Source: a picture's rows as (width, channels) floats, raw bytes normalised on the way.
struct PictureRows {
  const Picture* picture;
  int image;
  const float *scale, *shift;

  void start(int) {}
  void row(int y, float* out) {
    const int64_t offset = image * picture->stride_n + y * picture->stride_h;
    if (picture->raw)
      copy(static_cast<const uint8_t*>(picture->data) + offset, out,
           [this](uint8_t v, int c) { return v * scale[c] + shift[c]; });
    else
      copy(static_cast<const float*>(picture->data) + offset, out, [](float v, int) { return v; });
  }
  template <class T, class Convert>
  FASTSCNN_INLINE void copy(const T* in, float* out, Convert convert) {
    switch (picture->c) {
      case 1:
        return copy_channels<1>(in, out, convert);
      case 2:
        return copy_channels<2>(in, out, convert);
      case 3:
        return copy_channels<3>(in, out, convert);
      case 4:
        return copy_channels<4>(in, out, convert);
    }
  }
  template <int C, class T, class Convert>
  FASTSCNN_INLINE void copy_channels(const T* in, float* out, Convert convert) {
    const int64_t sc = picture->stride_c, sw = picture->stride_w;
    const int width = picture->w;
    // The two usual layouts, with strides the compiler knows.
    if (sw == 1)
      for (int x = 0; x < width; x++)
        for (int c = 0; c < C; c++) out[x * C + c] = convert(in[x + c * sc], c);
    else if (sw == C && sc == 1)
      for (int x = 0; x < width; x++)
        for (int c = 0; c < C; c++) out[x * C + c] = convert(in[x * C + c], c);
    else
      for (int x = 0; x < width; x++)
        for (int c = 0; c < C; c++) out[x * C + c] = convert(in[x * sw + c * sc], c);
  }
};

// Source: rows of the stem's result. In a row the 3 x C inputs of a tap row are contiguous, so a
// 3x3 convolution is three segments whose pixels lie 2 * C floats apart: no im2col.
struct StemRows {
  const Layer* layer;
  const Weights* weights;
  PictureRows source;
  Ring input;
  int width, height;

  StemRows(const Layer& l, const Weights& w, const Picture& p, int image)
      : layer(&l),
        weights(&w),
        source{&p, image, w.scale, w.shift},
        width(l.output_size(p.w)),
        height(l.output_size(p.h)) {}
  void place(Bump& scratch) {
    input.place(scratch, 3, layer->padding, layer->in, source.picture->w, source.picture->h);
  }
  void start(int y) { input.start(2 * y - layer->padding); }
  void row(int y, float* out) {
    const int channels = layer->in, top = 2 * y - layer->padding;
    input.pull(source, top + 2);
    Segment taps[3];
    for (int ky = 0; ky < 3; ky++) {
      const float* in = input.at(top + ky);
      taps[ky] = {in ? in - layer->padding * channels : nullptr, size_t(2 * channels), 3 * channels,
                  3 * channels * ky};
    }
    multiply({taps, 3, &weights->main, clamp_of(layer->activation), nullptr, 0, out,
              size_t(padded(layer->out))},
             width);
  }
};

static size_t stem_conv(const Layer& l, const Weights& w, const Picture& picture, int image,
                        Plane out, const Team& team, Bump scratch) {
  StemRows stage(l, w, picture, image);
  stage.place(scratch);
  if (!scratch.measuring()) run_rows(stage, out, padded(l.out), team);
  return scratch.used;
}
