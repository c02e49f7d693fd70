// What one step of training spends its time on beside matrix products: the loss on full-size
// logits, batch norm with its activation, the gradients of depthwise convolutions. Results do not
// depend on the number of threads.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels.h"

namespace fastscnn {

// Cross-entropy of logits that are bilinearly resized from (h, w) to the labels' size. A label l
// stands for the target distribution targets[l], whose sum is target_sums[l]; where that is 0 the
// pixel is left out. Per pixel: target_sums[l] * logsumexp(z) - targets[l] . z.
//
// Or, where `probabilities` says so, targets[l] . softmax(z) of pixels whose target_sums[l] is not
// 0; their labels are classes.
struct Loss {
  Type type;
  const void* logits;  // (n, h, w, classes)
  int n, classes, h, w;
  const uint8_t* labels;  // (n, height, width)
  int height, width;
  bool align_corners;
  const float* targets;  // [256][pixel_pitch(classes)]
  const float* target_sums;
  float* gradient;  // of the sum over all pixels, (n, h, w, classes); or null
  float* surprise;  // -log p(label), 0 where left out, (n, height, width); or null
  bool probabilities = false;
  double* confusion = nullptr;  // sums of softmax(z) by label, (n, classes, classes); or null
};

// act(batch norm(x) [+ residual]) over (pixels, channels), by the batch's own statistics.
struct BatchNorm {
  Type type;
  Activation activation;
  size_t pixels;
  int channels;  // a multiple of 16
  const void *x, *residual;
  const float *gamma, *beta;
  float *mean, *inverse_std;  // of the batch: results of forward, inputs of backward
  // forward
  float epsilon, momentum;
  float *running_mean, *running_variance;
  void* y;  // backward reads it where there is a residual
  // backward
  const void* y_gradient;
  void *x_gradient, *residual_gradient;
  float *gamma_gradient, *beta_gradient;
};

// The gradients of a depthwise 3x3 with padding = dilation.
struct DepthwiseGradient {
  Type type;
  int n, h, w, channels;  // of x; channels is a multiple of 16
  int stride, dilation;
  const void *x, *y_gradient;
  const float* weight;     // [9][channels]
  void* x_gradient;        // or null
  float* weight_gradient;  // [9][channels]
};

double upsampled_loss(const std::string& isa, const Loss&, int threads);
void batch_norm_forward(const std::string& isa, const BatchNorm&, int threads);
void batch_norm_backward(const std::string& isa, const BatchNorm&, int threads);
void depthwise_backward(const std::string& isa, const DepthwiseGradient&, int threads);

// One instruction set's kernels. Each runs one task; scratch as in Kernels.
struct TrainingKernels {
  // One image; *sum is its part of the loss.
  size_t (*loss)(const Loss&, int image, double* sum, Bump scratch);
  // Sums of x - shift and its square, or of the gradient before the activation and its product with
  // x - mean, over some pixels: two rows of `channels`.
  void (*batch_norm_moments)(const BatchNorm&, const float* shift, size_t begin, size_t end,
                             float* sums);
  void (*batch_norm_sums)(const BatchNorm&, const float* scale, size_t begin, size_t end,
                          float* sums);
  // y = act(scale * (x - mean) + beta [+ residual]);
  // x_gradient = scale * g + slope * (x - mean) + constant.
  void (*batch_norm_apply)(const BatchNorm&, const float* scale, size_t begin, size_t end);
  void (*batch_norm_gradient)(const BatchNorm&, const float* scale, const float* slope,
                              const float* constant, size_t begin, size_t end);
  // Channels [begin, end) of one image; weight_gradient is its part, [9][end - begin].
  size_t (*depthwise_backward)(const DepthwiseGradient&, int image, int begin, int end,
                               float* weight_gradient, Bump scratch);
};

}  // namespace fastscnn
