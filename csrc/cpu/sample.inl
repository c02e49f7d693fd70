// Bilinear sampling positions as torch.nn.functional.interpolate defines them, in double so that
// the weights are right to the last bit of a float.
struct Sample {
  int low, high;
  float low_weight, high_weight;
};
static Sample sample(int i, int in, int out, bool align_corners) {
  double position;
  if (align_corners)
    position = out > 1 ? double(in - 1) / (out - 1) * i : 0;
  else {
    position = (i + 0.5) * in / out - 0.5;
    if (position < 0) position = 0;
  }
  const int low = min_of(int(position), in - 1), high = min_of(low + 1, in - 1);
  const double weight = position - low;
  return {low, high, float(1 - weight), float(weight)};
}

[[maybe_unused]] static void samples(Sample* table, int in, int out, bool align_corners) {
  for (int i = 0; i < out; i++) table[i] = sample(i, in, out, align_corners);
}

// out = low_weight * a + high_weight * b over n elements, a multiple of kLanes.
template <class T>
FASTSCNN_INLINE void blend(const T* a, const T* b, float low_weight, float high_weight, size_t n,
                           float* out) {
  const vf wa = splat(low_weight), wb = splat(high_weight);
  for (size_t i = 0; i < n; i += kLanes) store(out + i, fma(load(b + i), wb, load(a + i) * wa));
}
