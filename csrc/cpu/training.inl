// The training kernels of one instruction set (training.h). Arithmetic is in floats; storage is
// float or bfloat16, rounded to nearest even.
FASTSCNN_INLINE float sum_of(vf v) {
#if FASTSCNN_LANES == 16
  return _mm512_reduce_add_ps(v);
#else
  float s = v[0];
  for (int i = 1; i < kLanes; i++) s += v[i];
  return s;
#endif
}
FASTSCNN_INLINE float largest_of(vf v) {
#if FASTSCNN_LANES == 16
  return _mm512_reduce_max_ps(v);
#else
  float m = v[0];
  for (int i = 1; i < kLanes; i++) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

// log(x) for normal x > 0 to 2 ulp; NaN stays NaN (Cephes' polynomial).
FASTSCNN_INLINE vf log_positive(vf x) {
  const vi bits = (vi)x - 0x3F3504F3;  // the mantissa goes to [sqrt(1/2), sqrt(2))
  const vf e = __builtin_convertvector(bits >> 23, vf);
  const vf m = (vf)((bits & 0x7FFFFF) + 0x3F3504F3) - splat(1.0f);
  vf p = splat(7.0376836292e-2f);
  p = fma(p, m, splat(-1.1514610310e-1f));
  p = fma(p, m, splat(1.1676998740e-1f));
  p = fma(p, m, splat(-1.2420140846e-1f));
  p = fma(p, m, splat(1.4249322787e-1f));
  p = fma(p, m, splat(-1.6668057665e-1f));
  p = fma(p, m, splat(2.0000714765e-1f));
  p = fma(p, m, splat(-2.4999993993e-1f));
  p = fma(p, m, splat(3.3333331174e-1f));
  const vf square = m * m;
  vf y = p * m * square;
  y = fma(e, splat(-2.12194440e-4f), y);
  y = fma(square, splat(-0.5f), y);
  const vf log = fma(e, splat(0.693359375f), m + y);
  return (x == x) ? log : x;
}

// ---------------------------------------------------------------- loss

constexpr int kMaxClassVectors = kMaxClassesOfLabels / kLanes;
constexpr float kNoClass = -1e30f;  // the logits of the classes that only pad

// VECTORS 0: known at run time only.
template <int VECTORS, bool PROBABILITIES>
struct LossRow {
  const Loss& loss;
  const Sample* columns;
  int vectors;
  // One row of w cells, vertically resized, and its gradient.
  float *z = nullptr, *gradient = nullptr;
  // Per pixel: the largest logit, the sum of exp(z - peak), target_sums.
  float *peak = nullptr, *total = nullptr, *share = nullptr;
  vf against = {};             // targets . z so far
  float* confusion = nullptr;  // the row's, [classes][pitch]; or null

  FASTSCNN_INLINE void pixel(int x, int label, float* surprise) {
    constexpr int kMost = VECTORS ? VECTORS : kMaxClassVectors;
    const int count = VECTORS ? VECTORS : vectors;
    const size_t pitch = size_t(count) * kLanes;
    const Sample& s = columns[x];
    const float *a = z + s.low * pitch, *b = z + s.high * pitch;
    const vf wa = splat(s.low_weight), wb = splat(s.high_weight);
    vf v[kMost], most = {};
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) {
      v[i] = fma(load(b + i * kLanes), wb, load(a + i * kLanes) * wa);
      most = i ? at_least(v[i], most) : v[0];
    }
    const float* target = loss.targets + label * pitch;
    const float top = largest_of(most), weight = loss.target_sums[label];
    if (surprise) {
      alignas(64) float values[kMost * kLanes];
      for (int i = 0; i < count; i++) store(values + i * kLanes, v[i]);
      surprise[x] = top - values[label];
    }
    vf sum = {}, wanted = {};
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) {
      const vf t = load(target + i * kLanes);
      if (!PROBABILITIES) against = fma(t, v[i], against);
      v[i] = exp_negative(v[i] - splat(top));
      sum += v[i];
      if (PROBABILITIES) wanted = fma(t, v[i], wanted);
    }
    const float exps = sum_of(sum);
    if (!PROBABILITIES) peak[x] = top, total[x] = exps, share[x] = weight;
    const vf scale = splat((PROBABILITIES ? 1.0f : weight) / exps);
    if (PROBABILITIES && confusion) {
      float* c = confusion + label * pitch;
      for (int i = 0; i < count; i++) store(c + i * kLanes, fma(v[i], scale, load(c + i * kLanes)));
    }
    if (!loss.gradient) return;
    const vf mean = splat(PROBABILITIES ? sum_of(wanted) / exps : 0.0f);
    float *ga = gradient + s.low * pitch, *gb = gradient + s.high * pitch;
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) {
      const vf t = load(target + i * kLanes), p = v[i] * scale;
      const vf g = PROBABILITIES ? p * (t - mean) : p - t;
      store(ga + i * kLanes, fma(g, wa, load(ga + i * kLanes)));
      store(gb + i * kLanes, fma(g, wb, load(gb + i * kLanes)));
    }
  }

  FASTSCNN_INLINE void row_of_probabilities(const uint8_t* labels, double* sums) {
    const size_t size = size_t(loss.classes) * (VECTORS ? VECTORS : vectors) * kLanes;
    if (confusion)
      for (size_t i = 0; i < size; i += kLanes) store(confusion + i, splat(0));
    for (int x = 0; x < loss.width; x++)
      if (loss.target_sums[labels[x]] != 0) pixel(x, labels[x], nullptr);
    if (confusion)
      for (size_t i = 0; i < size; i++) sums[i] += confusion[i];
  }

  // The row's loss but for `against`.
  FASTSCNN_INLINE double row(const uint8_t* labels, float* surprise) {
    for (int x = 0; x < loss.width; x++) {
      if (loss.target_sums[labels[x]] != 0) {
        pixel(x, labels[x], surprise);
      } else {
        peak[x] = share[x] = 0, total[x] = 1;
        if (surprise) surprise[x] = 0;
      }
    }
    vf sum = {};
    for (int x = 0; x < loss.width; x += kLanes) {
      const vf log = log_positive(load(total + x));
      sum = fma(load(share + x), load(peak + x) + log, sum);
      if (surprise)
        for (int i = 0; i < min_of(kLanes, loss.width - x); i++) surprise[x + i] += log[i];
    }
    return sum_of(sum);
  }
};

template <int VECTORS, class T, bool PROBABILITIES>
double loss_image(const Loss& l, int image, Bump& scratch) {
  const int vectors = (pixel_pitch(l.classes, Type::f32) + kLanes - 1) / kLanes;
  const size_t pitch = size_t(vectors) * kLanes, row = l.w * pitch;
  const size_t wide = (size_t(l.width) + kLanes - 1) / kLanes * kLanes;
  Sample* columns = scratch.take<Sample>(l.width);
  float* low = scratch.take<float>(l.h * row);
  float* low_gradient = scratch.take<float>(l.gradient ? l.h * row : 0);
  LossRow<VECTORS, PROBABILITIES> rows{l, columns, vectors};
  rows.z = scratch.take<float>(row);
  rows.gradient = scratch.take<float>(row);
  rows.peak = scratch.take<float>(wide);
  rows.total = scratch.take<float>(wide);
  rows.share = scratch.take<float>(wide);
  const size_t cells = l.confusion ? l.classes * pitch : 0;
  double* sums = scratch.take<double>(cells);
  float* of_row = scratch.take<float>(cells);
  if (scratch.measuring()) return 0;
  if (l.confusion) rows.confusion = of_row;
  for (size_t i = 0; i < cells; i++) sums[i] = 0;

  samples(columns, l.w, l.width, l.align_corners);
  const T* logits = static_cast<const T*>(l.logits) + size_t(image) * l.h * l.w * l.classes;
  for (size_t i = 0; i < size_t(l.h) * l.w; i++) {
    float* z = low + i * pitch;
    for (size_t k = 0; k < pitch; k++)
      z[k] = int(k) < l.classes ? to_float(logits[i * l.classes + k]) : kNoClass;
  }
  if (l.gradient)
    for (size_t i = 0; i < l.h * row; i += kLanes) store(low_gradient + i, splat(0));
  for (size_t i = l.width / kLanes * kLanes; i < wide; i++)
    rows.peak[i] = rows.share[i] = 0, rows.total[i] = 1;

  const size_t pixels = size_t(l.height) * l.width;
  const uint8_t* labels = l.labels + image * pixels;
  double sum = 0;
  for (int y = 0; y < l.height; y++) {
    const Sample s = sample(y, l.h, l.height, l.align_corners);
    blend(low + s.low * row, low + s.high * row, s.low_weight, s.high_weight, row, rows.z);
    if (l.gradient)
      for (size_t i = 0; i < row; i += kLanes) store(rows.gradient + i, splat(0));
    float* surprise = l.surprise ? l.surprise + image * pixels + size_t(y) * l.width : nullptr;
    if (PROBABILITIES) {
      rows.row_of_probabilities(labels + size_t(y) * l.width, sums);
    } else {
      rows.against = vf{};
      sum += rows.row(labels + size_t(y) * l.width, surprise);
      sum -= sum_of(rows.against);
    }
    if (!l.gradient) continue;
    float *above = low_gradient + s.low * row, *below = low_gradient + s.high * row;
    const vf wa = splat(s.low_weight), wb = splat(s.high_weight);
    for (size_t i = 0; i < row; i += kLanes) {
      const vf g = load(rows.gradient + i);
      store(above + i, fma(g, wa, load(above + i)));
      store(below + i, fma(g, wb, load(below + i)));
    }
  }
  if (l.gradient) {
    float* out = l.gradient + size_t(image) * l.h * l.w * l.classes;
    for (size_t i = 0; i < size_t(l.h) * l.w; i++)
      for (int k = 0; k < l.classes; k++) out[i * l.classes + k] = low_gradient[i * pitch + k];
  }
  if (l.confusion) {
    double* out = l.confusion + size_t(image) * l.classes * l.classes;
    for (int label = 0; label < l.classes; label++)
      for (int k = 0; k < l.classes; k++) out[label * l.classes + k] = sums[label * pitch + k];
  }
  return sum;
}

template <int VECTORS>
double loss_image(const Loss& l, int image, Bump& scratch) {
  const bool f32 = l.type == Type::f32;
  if (l.probabilities)
    return (f32 ? loss_image<VECTORS, float, true> : loss_image<VECTORS, uint16_t, true>)(l, image,
                                                                                          scratch);
  return (f32 ? loss_image<VECTORS, float, false> : loss_image<VECTORS, uint16_t, false>)(l, image,
                                                                                          scratch);
}

static size_t loss(const Loss& l, int image, double* sum, Bump scratch) {
  const int vectors = (pixel_pitch(l.classes, Type::f32) + kLanes - 1) / kLanes;
  if (vectors == 1)
    *sum = loss_image<1>(l, image, scratch);
  else if (vectors == 2)
    *sum = loss_image<2>(l, image, scratch);
  else
    *sum = loss_image<0>(l, image, scratch);
  return scratch.used;
}

// ---------------------------------------------------------------- batch norm

// Sums over the pixels [begin, end) of u and of u * v per channel, where values(pixel, channel, u,
// v) computes both; kept in registers for a few vectors of channels at a time.
template <int VECTORS, class Values>
FASTSCNN_INLINE void sum_channels(const Values& values, int c, int channels, size_t begin,
                                  size_t end, float* sums) {
  vf a[VECTORS], b[VECTORS];
#pragma GCC unroll 4
  for (int i = 0; i < VECTORS; i++) a[i] = b[i] = splat(0);
  for (size_t p = begin; p < end; p++) {
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; i++) {
      vf u, v;
      values(p, c + i * kLanes, u, v);
      a[i] += u;
      b[i] = fma(u, v, b[i]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < VECTORS; i++) {
    store(sums + c + i * kLanes, a[i]);
    store(sums + channels + c + i * kLanes, b[i]);
  }
}
template <class Values>
FASTSCNN_INLINE void sum_pixels(const Values& values, int channels, size_t begin, size_t end,
                                float* sums) {
  int c = 0;
  for (; c + 4 * kLanes <= channels; c += 4 * kLanes)
    sum_channels<4>(values, c, channels, begin, end, sums);
  for (; c < channels; c += kLanes) sum_channels<1>(values, c, channels, begin, end, sums);
}

template <class T>
struct Centred {
  const T* x;
  size_t channels;
  const float* shift;
  FASTSCNN_INLINE void operator()(size_t p, int c, vf& u, vf& v) const {
    u = v = load(x + p * channels + c) - load(shift + c);
  }
};
static void batch_norm_moments(const BatchNorm& n, const float* shift, size_t begin, size_t end,
                               float* sums) {
  const size_t channels = n.channels;
  if (n.type == Type::f32)
    sum_pixels(Centred<float>{static_cast<const float*>(n.x), channels, shift}, n.channels, begin,
               end, sums);
  else
    sum_pixels(Centred<uint16_t>{static_cast<const uint16_t*>(n.x), channels, shift}, n.channels,
               begin, end, sums);
}

template <class T>
void apply(const BatchNorm& n, const float* scale, size_t begin, size_t end) {
  const size_t channels = n.channels;
  const Clamp clamp = clamp_of(n.activation);
  const T *x = static_cast<const T*>(n.x) + begin * channels,
          *r = n.residual ? static_cast<const T*>(n.residual) + begin * channels : nullptr;
  T* y = static_cast<T*>(n.y) + begin * channels;
  for (size_t p = begin; p < end; p++, x += channels, y += channels) {
    for (size_t c = 0; c < channels; c += kLanes) {
      vf v = fma(load(x + c) - load(n.mean + c), load(scale + c), load(n.beta + c));
      if (r) v += load(r + c);
      store(y + c, clamp(v));
    }
    if (r) r += channels;
  }
}
static void batch_norm_apply(const BatchNorm& n, const float* scale, size_t begin, size_t end) {
  (n.type == Type::f32 ? apply<float> : apply<uint16_t>)(n, scale, begin, end);
}

// How backward knows where the activation let the gradient through: everywhere, from y, or from
// scale * (x - mean) + beta, computed again.
enum class Mask { none, kept, computed };

template <class T, Mask MASK>
struct Gradients {
  const BatchNorm& n;
  const float* scale;
  Clamp clamp;

  // u: the gradient before the activation; v: x - mean.
  FASTSCNN_INLINE void operator()(size_t p, int c, vf& u, vf& v) const {
    const size_t at = p * n.channels + c;
    u = load(static_cast<const T*>(n.y_gradient) + at);
    v = load(static_cast<const T*>(n.x) + at) - load(n.mean + c);
    if constexpr (MASK == Mask::none) return;
    const vf y = MASK == Mask::kept ? load(static_cast<const T*>(n.y) + at)
                                    : fma(v, load(scale + c), load(n.beta + c));
    const vi open = (y > splat(clamp.low)) & (y < splat(clamp.high));
    u = (vf)((vi)u & open);
  }
};
// Calls act(gradients) with the right kind of Gradients.
template <class T, class Act>
FASTSCNN_INLINE void with_gradients(const BatchNorm& n, const float* scale, const Act& act) {
  const Clamp clamp = clamp_of(n.activation);
  if (n.activation == Activation::none)
    act(Gradients<T, Mask::none>{n, scale, clamp});
  else if (n.residual)
    act(Gradients<T, Mask::kept>{n, scale, clamp});
  else
    act(Gradients<T, Mask::computed>{n, scale, clamp});
}

struct SumGradients {
  int channels;
  size_t begin, end;
  float* sums;
  template <class G>
  FASTSCNN_INLINE void operator()(const G& gradients) const {
    sum_pixels(gradients, channels, begin, end, sums);
  }
};
static void batch_norm_sums(const BatchNorm& n, const float* scale, size_t begin, size_t end,
                            float* sums) {
  const SumGradients act{n.channels, begin, end, sums};
  if (n.type == Type::f32)
    with_gradients<float>(n, scale, act);
  else
    with_gradients<uint16_t>(n, scale, act);
}

template <class T>
struct WriteGradients {
  const BatchNorm& n;
  const float *scale, *slope, *constant;
  size_t begin, end;
  template <class G>
  FASTSCNN_INLINE void operator()(const G& gradients) const {
    T *of_x = static_cast<T*>(n.x_gradient), *of_residual = static_cast<T*>(n.residual_gradient);
    for (size_t p = begin; p < end; p++)
      for (int c = 0; c < n.channels; c += kLanes) {
        const size_t at = p * n.channels + c;
        vf u, v;
        gradients(p, c, u, v);
        store(of_x + at, fma(u, load(scale + c), fma(v, load(slope + c), load(constant + c))));
        if (of_residual) store(of_residual + at, u);
      }
  }
};
static void batch_norm_gradient(const BatchNorm& n, const float* scale, const float* slope,
                                const float* constant, size_t begin, size_t end) {
  if (n.type == Type::f32)
    with_gradients<float>(n, scale, WriteGradients<float>{n, scale, slope, constant, begin, end});
  else
    with_gradients<uint16_t>(n, scale,
                             WriteGradients<uint16_t>{n, scale, slope, constant, begin, end});
}

// ---------------------------------------------------------------- depthwise

// Walks the rows of the result's gradient: each adds to three rows of x's gradient, which leave
// once complete, and, times three rows of x, to the nine sums of the weight's gradient.
template <class T>
struct DepthwiseBackward {
  const DepthwiseGradient& d;
  int image, begin, channels;  // of the task
  Ring x, gradient;            // rows of x and of its gradient
  float *y_row, *weight, *sums;

  void place(Bump& scratch, int width) {
    const int slots = 2 * d.dilation + 1;
    x.place(scratch, slots, d.dilation, channels, d.w, d.h);
    gradient.place(scratch, slots, d.dilation, channels, d.w, d.h);
    y_row = scratch.take<float>(size_t(width) * channels);
    weight = scratch.take<float>(size_t(9) * channels);
  }
  void read(const void* from, int height, int width, int y, float* row) const {
    const size_t pitch = d.channels;
    const T* p = static_cast<const T*>(from) + (size_t(image) * height + y) * width * pitch + begin;
    for (int i = 0; i < width; i++, p += pitch, row += channels)
      for (int c = 0; c < channels; c += kLanes) store(row + c, load(p + c));
  }
  void row(int y, float* out) { read(d.x, d.h, d.w, y, out); }  // as the ring's source
  void write(int y) const {
    const size_t pitch = d.channels;
    const float* row = gradient.slot(y);
    T* p = static_cast<T*>(d.x_gradient) + (size_t(image) * d.h + y) * d.w * pitch + begin;
    for (int i = 0; i < d.w; i++, p += pitch, row += channels)
      for (int c = 0; c < channels; c += kLanes) store(p + c, load(row + c));
  }
  void clear(int y) const {
    float* row = gradient.slot(y) - size_t(d.dilation) * channels;
    for (size_t i = 0; i < size_t(d.w + 2 * d.dilation) * channels; i += kLanes)
      store(row + i, splat(0));
  }
  // Row ky of the taps, for which row `row` of x and of its gradient exist.
  template <bool WANTED>
  FASTSCNN_INLINE void taps(int ky, int row, int width) const {
    const size_t step = size_t(d.stride) * channels, apart = size_t(d.dilation) * channels;
    const float* xs = x.slot(row) - apart;
    float* gs = gradient.slot(row) - apart;
    for (int c = 0; c < channels; c += kLanes) {
      const float* w = weight + size_t(ky) * 3 * channels + c;
      float* sum = sums + size_t(ky) * 3 * channels + c;
      const vf w0 = load(w), w1 = load(w + channels), w2 = load(w + 2 * channels);
      vf s0 = load(sum), s1 = load(sum + channels), s2 = load(sum + 2 * channels);
      const float *xp = xs + c, *yp = y_row + c;
      float* gp = gs + c;
      for (int i = 0; i < width; i++, xp += step, gp += step, yp += channels) {
        const vf g = load(yp);
        s0 = fma(g, load(xp), s0);
        s1 = fma(g, load(xp + apart), s1);
        s2 = fma(g, load(xp + 2 * apart), s2);
        if (WANTED) {
          store(gp, fma(g, w0, load(gp)));
          store(gp + apart, fma(g, w1, load(gp + apart)));
          store(gp + 2 * apart, fma(g, w2, load(gp + 2 * apart)));
        }
      }
      store(sum, s0), store(sum + channels, s1), store(sum + 2 * channels, s2);
    }
  }
  void run() {
    const int height = (d.h - 1) / d.stride + 1, width = (d.w - 1) / d.stride + 1;
    for (int k = 0; k < 9; k++)
      for (int c = 0; c < channels; c += kLanes) {
        store(weight + k * channels + c, load(d.weight + size_t(k) * d.channels + begin + c));
        store(sums + k * channels + c, splat(0));
      }
    x.start(-d.dilation);
    int cleared = 0, written = 0;  // rows of x's gradient
    for (int y = 0; y < height; y++) {
      const int first = y * d.stride - d.dilation,
                last = min_of(y * d.stride + d.dilation, d.h - 1);
      if (d.x_gradient) {
        for (; written < min_of(first, d.h); written++) write(written);
        for (; cleared <= last; cleared++) clear(cleared);
      }
      x.pull(*this, last);
      read(d.y_gradient, height, width, y, y_row);
      for (int ky = 0; ky < 3; ky++) {
        const int row = first + ky * d.dilation;
        if (row < 0 || row >= d.h) continue;
        if (d.x_gradient)
          taps<true>(ky, row, width);
        else
          taps<false>(ky, row, width);
      }
    }
    if (!d.x_gradient) return;
    for (; written < d.h; written++) write(written);
  }
};
template <class T>
size_t depthwise_gradients(const DepthwiseGradient& d, int image, int begin, int end,
                           float* weight_gradient, Bump& scratch) {
  DepthwiseBackward<T> task{d,  image,   begin,   end - begin,    {},
                            {}, nullptr, nullptr, weight_gradient};
  task.place(scratch, (d.w - 1) / d.stride + 1);
  if (!scratch.measuring()) task.run();
  return scratch.used;
}
static size_t depthwise_backward(const DepthwiseGradient& d, int image, int begin, int end,
                                 float* weight_gradient, Bump scratch) {
  return (d.type == Type::f32
              ? depthwise_gradients<float>
              : depthwise_gradients<uint16_t>)(d, image, begin, end, weight_gradient, scratch);
}

static const TrainingKernels kTraining = {
    loss,
    batch_norm_moments,
    batch_norm_sums,
    batch_norm_apply,
    batch_norm_gradient,
    depthwise_backward,
};
