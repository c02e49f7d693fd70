// stem_conv: 3x3 stride 2 convolution + bias + act, straight from the caller's picture.

// Source: a picture's rows as (width, channels) elements: raw bytes normalised, floats rounded on
// the way.
struct PictureRows {
  const Picture* picture;
  int image;
  const float *scale, *shift;

  void start(int) {}
  void row(int y, element* out) {
    const int64_t offset = image * picture->stride_n + y * picture->stride_h;
    if (picture->type == Type::u8)
      copy(static_cast<const uint8_t*>(picture->data) + offset, out);
    else if (picture->type == Type::f32)
      copy(static_cast<const float*>(picture->data) + offset, out);
    else
      copy(static_cast<const element*>(picture->data) + offset, out);
  }
  template <class T>
  void copy(const T* in, element* out) {
    const int64_t sc = picture->stride_c, sw = picture->stride_w;
    const int channels = picture->c, width = picture->w;
    int x = 0;  // pixels done; the two usual layouts by vectors
    if (channels == 3 && sw == 1)
      x = interleave(in, sc, width, out);
    else if (channels == 3 && sw == 3 && sc == 1)
      x = convert(in, width, out);
    for (; x < width; x++)
      for (int c = 0; c < channels; c++) out[x * channels + c] = value(in[x * sw + c * sc], c);
  }
  FASTSCNN_INLINE element value(uint8_t v, int c) const {
    return to_element(v * scale[c] + shift[c]);
  }
  template <class T>
  FASTSCNN_INLINE element value(T v, int) const {
    if constexpr (sizeof(T) == sizeof(element))
      return v;
    else
      return to_element(v);
  }

  // Planes (3, width) to pixels.
  template <class T>
  int interleave(const T* in, int64_t plane, int width, element* out) const {
    const Interleave3 pixels;
    int x = 0;
    for (; x + kLanes <= width; x += kLanes, in += kLanes, out += 3 * kLanes) {
      vf v[3];
      for (int c = 0; c < 3; c++) {
        v[c] = load(in + c * plane);
        if constexpr (sizeof(T) == 1) v[c] = v[c] * splat(scale[c]) + splat(shift[c]);
      }
      for (int i = 0; i < 3; i++) store(out + i * kLanes, pixels.part(i, v));
    }
    return x;
  }
  // Pixels (width, 3) to the same: three vectors hold whole pixels.
  template <class T>
  int convert(const T* in, int width, element* out) const {
    float scales[3 * kLanes], shifts[3 * kLanes];
    for (int i = 0; i < 3 * kLanes; i++) scales[i] = scale[i % 3], shifts[i] = shift[i % 3];
    int x = 0;
    for (; x + kLanes <= width; x += kLanes, in += 3 * kLanes, out += 3 * kLanes)
      for (int i = 0; i < 3 * kLanes; i += kLanes) {
        vf v = load(in + i);
        if constexpr (sizeof(T) == 1) v = v * load(scales + i) + load(shifts + i);
        store(out + i, v);
      }
    return x;
  }
};

// Source: rows of the stem's result. In a row the 3 x C inputs of a tap row are contiguous, so a
// 3x3 convolution is three segments whose pixels lie 2 * C elements apart. Products of bf16 want
// whole tiles of them: there each pixel's taps are gathered first.
struct StemRows {
  const Layer* layer;
  const Weights* weights;
  PictureRows source;
  Ring input;
  int width, height;
  element* gathered;

  StemRows(const Layer& l, const Weights& w, const Picture& p, int image)
      : layer(&l),
        weights(&w),
        source{&p, image, w.scale, w.shift},
        width(l.output_size(p.w)),
        height(l.output_size(p.h)) {}
  void place(Bump& scratch) {
    input.place(scratch, 3, layer->padding, layer->in, source.picture->w, source.picture->h);
    gathered = kGathered ? scratch.take<element>(size_t(width) * weights->main.k) : nullptr;
  }
  int halo() const { return 1; }
  void start(int y) { input.start(2 * y - layer->padding); }
  void row(int y, element* out) {
    const int channels = layer->in, top = 2 * y - layer->padding;
    const Gemm& main = weights->main;
    input.pull(source, top + 2);
    Segment taps[3];
    for (int ky = 0; ky < 3; ky++) {
      const element* in = input.at(top + ky);
      taps[ky] = {in ? in - layer->padding * channels : nullptr, size_t(2 * channels), 3 * channels,
                  3 * channels * ky};
    }
    const Clamp clamp = clamp_of(layer->activation);
    if constexpr (kGathered) {
      gather(taps);
      multiply(pointwise({gathered, size_t(main.k), main.k, 0}, main, clamp, out), width);
    } else {
      multiply_in_registers(sum_of(taps, 3, main, clamp, out), width);
    }
  }
  void gather(const Segment (&taps)[3]) {
    switch (layer->in) {
      case 1:
        return gather_taps<3>(taps);
      case 2:
        return gather_taps<6>(taps);
      case 3:
        return gather_taps<9>(taps);
      case 4:
        return gather_taps<12>(taps);
    }
  }
  // RUN: elements of a row of taps.
  template <int RUN>
  void gather_taps(const Segment (&taps)[3]) {
    const size_t pitch = weights->main.k;
    element* out = gathered;
    int x = 0;
#if FASTSCNN_LANES == 16
    if constexpr (3 * RUN <= kBlock) {  // one vector, whose parts are loaded where they belong
      constexpr __mmask32 kRun = (1u << RUN) - 1;
      __mmask32 masks[3];
      const element* from[3];
      for (int ky = 0; ky < 3; ky++) {
        masks[ky] = taps[ky].a ? kRun << (ky * RUN) : 0;
        from[ky] = taps[ky].a ? taps[ky].a - ky * RUN : gathered;
      }
      const size_t step = taps[0].lda;
      for (; x < width; x++, out += pitch) {
        __m512i v = _mm512_maskz_loadu_epi16(masks[0], from[0] + x * step);
        v = _mm512_mask_loadu_epi16(v, masks[1], from[1] + x * step);
        v = _mm512_mask_loadu_epi16(v, masks[2], from[2] + x * step);
        _mm512_storeu_si512(out, v);
      }
    }
#endif
    for (; x < width; x++, out += pitch) {
      for (int ky = 0; ky < 3; ky++)
        if (taps[ky].a)
          __builtin_memcpy(out + ky * RUN, taps[ky].a + x * taps[ky].lda, RUN * sizeof(element));
        else
          __builtin_memset(out + ky * RUN, 0, RUN * sizeof(element));
      __builtin_memset(out + 3 * RUN, 0, (pitch - 3 * RUN) * sizeof(element));
    }
  }
};

#if FASTSCNN_ARITHMETIC != FASTSCNN_HIGH
static size_t stem_conv(const Layer& l, const Weights& w, const Picture& picture, int image,
                        Plane out, const Team& team, Bump scratch) {
  StemRows stage(l, w, picture, image);
  stage.place(scratch);
  if (scratch.measuring()) return scratch.used;
  const Tiles tiles;
  run_rows(stage, out, pixel_pitch(l.out), team);
  return scratch.used;
}
constexpr auto kStemConv = stem_conv;
#else
constexpr decltype(Ops::stem_conv) kStemConv = nullptr;
#endif
