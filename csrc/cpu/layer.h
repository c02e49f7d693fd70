// The network's layers as the Python package encodes them (fastscnn_fast/plan.py), and where each
// layer's packed weights lie.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastscnn {

enum class Op : int {
  stem_conv,
  dsconv,
  inverted_residual,
  pyramid_pooling,
  feature_fusion,
  upsample_classify
};
enum class Activation : int { none, relu, relu6 };
enum class Output : int { logits, probabilities, labels };

constexpr int kMaxBins = 8;
constexpr int kMaxClassesOfLabels = 256;

// Channels are padded to whole blocks: activations and weights have zeros there.
constexpr int kBlock = 16;
constexpr int padded(int channels) { return (channels + kBlock - 1) / kBlock * kBlock; }

struct Layer {
  Op op;
  int in, out, mid, last;
  int stride, dilation, padding, kernel;
  Activation activation, mid_activation;
  bool residual, dense, align_corners;
  int bins[kMaxBins];
  int bin_count;

  // Size of a 3x3's result along one axis.
  int output_size(int n) const {
    const int pad = op == Op::stem_conv ? padding : 1;
    return (n + 2 * pad - 3) / stride + 1;
  }
  int result_channels() const { return last ? last : out; }
};

// A 1x1 (or, over several segments, 3x3) convolution as a matrix product: B is stored in panels of
// 16 columns, [padded(n) / 16][k][16], the bias after it.
struct Gemm {
  float* panels;
  float* bias;  // null: none
  int k, n;
};

// Depthwise 3x3: [9][channels] and the bias.
struct Depthwise {
  float* weight;
  float* bias;
  int channels;
};

struct Weights {
  float *scale, *shift;       // stem_conv: uint8 * scale + shift is the normalised picture
  Depthwise depthwise;        // dsconv, inverted_residual, feature_fusion unless dense
  Gemm expand;                // inverted_residual; feature_fusion's dense 1x1
  Gemm main;                  // stem_conv, pointwise, project, pyramid's out, fusion's low + high
  Gemm last;                  // dsconv: the following 1x1
  Gemm branch[kMaxBins];      // pyramid_pooling: 1x1 of each branch
  Gemm branch_out[kMaxBins];  // pyramid_pooling with kernel 1: out's columns of that branch
};

// Places a layer's weights from `base` on, in the one order that packing and kernels share; returns
// the number of floats taken.
inline size_t place_weights(const Layer& l, float* base, Weights& w) {
  size_t used = 0;
  auto take = [&](size_t floats) {
    float* p = base + used;
    used += (floats + kBlock - 1) / kBlock * kBlock;
    return p;
  };
  auto gemm = [&](Gemm& g, int k, int n) {
    g = {nullptr, nullptr, k, padded(n)};
    g.panels = take(size_t(g.k) * g.n);
    g.bias = take(g.n);
  };
  auto depthwise = [&](int channels) {
    w.depthwise.channels = padded(channels);
    w.depthwise.weight = take(9 * size_t(w.depthwise.channels));
    w.depthwise.bias = take(w.depthwise.channels);
  };
  const int in = padded(l.in), out = padded(l.out), mid = padded(l.mid);
  switch (l.op) {
    case Op::stem_conv:
      gemm(w.main, 9 * l.in, out);
      w.scale = take(l.in);
      w.shift = take(l.in);
      break;
    case Op::dsconv:
      depthwise(in);
      gemm(w.main, in, out);
      if (l.last) gemm(w.last, out, l.last);
      break;
    case Op::inverted_residual:
      gemm(w.expand, in, mid);
      depthwise(mid);
      gemm(w.main, mid, out);
      break;
    case Op::pyramid_pooling:
      for (int b = 0; b < l.bin_count; b++) gemm(w.branch[b], in, mid);
      if (l.kernel == 1) {
        gemm(w.main, in, out);
        for (int b = 0; b < l.bin_count; b++) gemm(w.branch_out[b], mid, out);
      } else {
        gemm(w.main, 9 * (in + l.bin_count * mid), out);
      }
      break;
    case Op::feature_fusion:
      if (l.dense)
        gemm(w.expand, in, in);
      else
        depthwise(in);
      gemm(w.main, in + mid, out);
      break;
    case Op::upsample_classify:
      break;
  }
  return used;
}

}  // namespace fastscnn
