// stem_conv in int8: 3x3 stride 2 of the caller's picture, as pixels; floats become pixels first.

// Source: a picture's rows as (width, channels) bytes.
struct PictureRows {
  const Picture* picture;
  int image;
  const float *scale, *shift;

  void start(int) {}
  void row(int y, element* out) {
    const int64_t offset = image * picture->stride_n + y * picture->stride_h;
    if (picture->type == Type::u8)
      copy(static_cast<const uint8_t*>(picture->data) + offset, out);
    else
      copy(static_cast<const float*>(picture->data) + offset, out);
  }
  template <class T>
  void copy(const T* in, element* out) {
    const int64_t sc = picture->stride_c, sw = picture->stride_w;
    const int channels = picture->c, width = picture->w;
    if constexpr (sizeof(T) == 1)
      if (sc == 1 && sw == channels) {
        __builtin_memcpy(out, in, size_t(width) * channels);
        return;
      }
    int x = 0;  // pixels done
    if (channels == 3 && sw == 1) x = interleave_planes(in, sc, width, out);
    for (; x < width; x++)
      for (int c = 0; c < channels; c++) out[x * channels + c] = value(in[x * sw + c * sc], c);
  }
  FASTSCNN_INLINE element value(uint8_t v, int) const { return v; }
  FASTSCNN_INLINE element value(float v, int c) const {
    using B = NarrowBytes;
    typename B::floats values[4] = {B::all(v), B::all(v), B::all(v), B::all(v)};
    pixels<B>(values, c);
    uint8_t bytes[B::kChannels];
    B::store(bytes, narrow<B>(values, B::zero()));
    return bytes[0];
  }
  template <class B>
  FASTSCNN_INLINE void pixels(typename B::floats (&v)[4], int c) const {
    for (auto& f : v) f = B::to_pixels(B::add(B::multiply(f, B::all(scale[c])), B::all(shift[c])));
  }

  // Planes (3, width) to pixels, 16 at a time.
#if FASTSCNN_LANES >= 8
  FASTSCNN_INLINE static void store_pixels(__m128i r, __m128i g, __m128i b, element* out) {
    // Byte i of part p is channel (16 p + i) % 3 of pixel (16 p + i) / 3; -1 gives 0.
    struct Shuffles {
      alignas(16) int8_t of[3][3][16];
      constexpr Shuffles() : of() {
        for (int p = 0; p < 3; p++)
          for (int c = 0; c < 3; c++)
            for (int i = 0; i < 16; i++)
              of[p][c][i] = int8_t((16 * p + i) % 3 == c ? (16 * p + i) / 3 : -1);
      }
    };
    static constexpr Shuffles shuffles;
    for (int p = 0; p < 3; p++) {
      auto part = [&](__m128i plane, int c) {
        return _mm_shuffle_epi8(
            plane, _mm_load_si128(reinterpret_cast<const __m128i*>(shuffles.of[p][c])));
      };
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * p),
                       _mm_or_si128(_mm_or_si128(part(r, 0), part(g, 1)), part(b, 2)));
    }
  }
  FASTSCNN_INLINE __m128i sixteen(const uint8_t* p, int) const {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  FASTSCNN_INLINE __m128i sixteen(const float* p, int c) const {
    using B = Bytes<8>;
    B::floats v[4] = {B::load_floats(p), B::load_floats(p + 8), B::all(0), B::all(0)};
    pixels<B>(v, c);
    // Of each half of eight floats, four bytes: 0..3, 8..11 and 4..7, 12..15.
    const __m256i bytes = narrow<B>(v, B::zero());
    const __m128i halves =
        _mm_unpacklo_epi64(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    return _mm_shuffle_epi32(halves, _MM_SHUFFLE(3, 1, 2, 0));
  }
  template <class T>
  int interleave_planes(const T* in, int64_t plane, int width, element* out) const {
    int x = 0;
    for (; x + 16 <= width; x += 16, in += 16, out += 48)
      store_pixels(sixteen(in, 0), sixteen(in + plane, 1), sixteen(in + 2 * plane, 2), out);
    return x;
  }
#else
  template <class T>
  int interleave_planes(const T*, int64_t, int, element*) const {
    return 0;
  }
#endif
};

// Source: rows of the stem's result. In a row the 3 x C inputs of a tap row are contiguous, so a
// 3x3 convolution is three segments whose pixels lie 2 * C elements apart. A segment ends with its
// last whole unit, whose surplus meets zeros.
struct StemRows {
  static constexpr int kSurplus = 4;
  const Layer* layer;
  const Weights* weights;
  PictureRows source;
  Ring input;
  int width, height;
  element* outside;  // a row of pixels that surround the picture

  StemRows(const Layer& l, const Weights& w, const Picture& p, int image)
      : layer(&l),
        weights(&w),
        source{&p, image, w.scale, w.shift},
        width(l.output_size(p.w)),
        height(l.output_size(p.h)) {}
  void place(Bump& scratch) {
    const Picture& p = *source.picture;
    input.place(scratch, 3, layer->padding, layer->in, p.w, p.h, kSurplus);
    outside = scratch.take<element>(input.pitch);
  }
  int halo() const { return 1; }
  void start(int y) {
    input.start(2 * y - layer->padding);
    const int channels = layer->in, pad = layer->padding;
    for (int x = 0; x < input.width + 2 * pad; x++)
      for (int c = 0; c < channels; c++) outside[x * channels + c] = element(weights->pad[c]);
    for (int slot = 0; slot < 3; slot++) {
      element* row = input.slot(slot);
      __builtin_memcpy(row - pad * channels, outside, pad * channels);
      __builtin_memcpy(row + size_t(input.width) * channels, outside, pad * channels);
    }
  }
  void row(int y, element* out) {
    const int channels = layer->in, top = 2 * y - layer->padding;
    input.pull(source, top + 2);
    Segment taps[3];
    for (int ky = 0; ky < 3; ky++) {
      const element* in = input.at(top + ky);
      taps[ky] = {in ? in - layer->padding * channels : outside, size_t(2 * channels),
                  stem_taps(channels), stem_taps(channels) * ky};
    }
    multiply_in_registers(sum_of(taps, 3, weights->main, clamp_of(layer->activation), out), width);
  }
};

static size_t stem_conv(const Layer& l, const Weights& w, const Picture& picture, int image,
                        Plane out, const Team& team, Bump scratch) {
  StemRows stage(l, w, picture, image);
  stage.place(scratch);
  if (scratch.measuring()) return scratch.used;
  run_rows(stage, out, pixel_pitch(l.out), team);
  return scratch.used;
}
constexpr auto kStemConv = stem_conv;
