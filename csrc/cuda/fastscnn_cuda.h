/* The six fused ops on NVIDIA GPUs: a C interface of pointers, sizes and a stream, which knows
 * neither torch nor Python.
 *
 * Activations are channels-last: `pixel` elements from a pixel to the next, of which a multiple of
 * 16 channels is computed (what pads them is zero); rows follow each other without gaps, images lie
 * `image` elements apart; addresses, pixels and images are whole vectors of 16 bytes. Packed
 * weights are laid out by kernels/weights.py, aligned in the same way. Every function checks sizes,
 * strides and alignment (not how much memory there is), queues its launches on `stream`, does not
 * wait for them and returns 0, else a status that fastscnn_cuda_message() explains:
 * FASTSCNN_REFUSED for an argument that breaks a rule, or CUDA's own error.
 */
#ifndef FASTSCNN_CUDA_H
#define FASTSCNN_CUDA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  FASTSCNN_FLOAT32,
  FASTSCNN_BFLOAT16,
  FASTSCNN_FLOAT16,
  FASTSCNN_UINT8
}; /* types of elements */
enum { FASTSCNN_NONE, FASTSCNN_RELU, FASTSCNN_RELU6 };             /* activations */
enum { FASTSCNN_LOGITS, FASTSCNN_PROBABILITIES, FASTSCNN_LABELS }; /* outputs */
enum { FASTSCNN_MOST_BINS = 8 };
enum { FASTSCNN_REFUSED = -1 }; /* status */

/* 3x3 + bias + act from a picture of any strides, in elements: of `type`, or uint8 to be
 * normalised. */
typedef struct {
  int type, x_type, channels, out_channels, stride, padding, activation;
  int64_t images, height, width, out_height, out_width;
  int64_t x_image, x_channel, x_row, x_column, out_image, out_pixel;
  const void *x, *weight, *bias, *scale, *shift;
  void* out;
} fastscnn_stem_conv;

/* Depthwise 3x3 + bias + act -> 1x1 + bias + act [-> 1x1 + bias of last_channels, where those are
 * not 0]. `out_type` may differ from `type` with last_channels only. `out_channel` is 1 where an
 * out_pixel holds the padded channels, else a plane's size; without last_channels it is not looked
 * at. */
typedef struct {
  int type, out_type, in_channels, out_channels, last_channels, stride, dilation, mid_activation,
      activation;
  int64_t images, height, width, out_height, out_width;
  int64_t x_image, x_pixel, out_image, out_pixel, out_channel;
  const void *x, *depthwise_weight, *depthwise_bias, *pointwise_weight, *pointwise_bias,
      *last_weight, *last_bias;
  void* out;
} fastscnn_dsconv;

/* 1x1 + bias + act -> depthwise 3x3 + bias + act -> 1x1 + bias [+ x]. */
typedef struct {
  int type, in_channels, mid_channels, out_channels, stride, residual, activation;
  int64_t images, height, width, out_height, out_width;
  int64_t x_image, x_pixel, out_image, out_pixel;
  const void *x, *expand_weight, *expand_bias, *depthwise_weight, *depthwise_bias, *project_weight,
      *project_bias;
  void* out;
} fastscnn_inverted_residual;

/* out(concat [x, resize(relu(branch_i(pool_i(x)))) ...]) with a `kernel` x `kernel`
 * out-convolution, 1 or 3. `sums` and `shares` are scratch, of as many bytes as
 * fastscnn_cuda_pyramid_pooling_scratch() says. */
typedef struct {
  int type, in_channels, mid_channels, out_channels, kernel, activation, align_corners, branches;
  int bins[FASTSCNN_MOST_BINS];
  int64_t images, height, width;
  int64_t x_image, x_pixel, out_image, out_pixel;
  const void *x, *branch_weight, *branch_bias, *grid_weight, *out_weight, *out_bias;
  void *sums, *shares, *out;
} fastscnn_pyramid_pooling;

/* act(low_weight relu(refine(resize(low))) + high_weight high + bias); refine is a depthwise 3x3,
 * or (`dense`) a 1x1 whose result before the activation, (images, low_height, low_width,
 * low_pixel), goes to the scratch `refined`. */
typedef struct {
  int type, low_channels, high_channels, out_channels, dilation, dense, activation, align_corners;
  int64_t images, height, width, low_height, low_width;
  int64_t high_image, high_pixel, low_image, low_pixel, out_image, out_pixel;
  const void *high, *low, *refine_weight, *refine_bias, *low_weight, *high_weight, *bias;
  void *refined, *out;
} fastscnn_feature_fusion;

/* Bilinear resize of logits (any strides, `type`) -> `output` of every pixel: logits or
 * probabilities of `out_type` (images, classes, height, width), or uint8 labels (images, height,
 * width), contiguous. */
typedef struct {
  int type, out_type, classes, output, align_corners;
  int64_t images, low_height, low_width, height, width;
  int64_t x_image, x_class, x_row, x_column;
  const void* x;
  void* out;
} fastscnn_upsample_classify;

typedef void* fastscnn_stream; /* a cudaStream_t */

int fastscnn_cuda_stem_conv(const fastscnn_stem_conv* op, fastscnn_stream stream);
int fastscnn_cuda_dsconv(const fastscnn_dsconv* op, fastscnn_stream stream);
int fastscnn_cuda_inverted_residual(const fastscnn_inverted_residual* op, fastscnn_stream stream);
int fastscnn_cuda_pyramid_pooling(const fastscnn_pyramid_pooling* op, fastscnn_stream stream);
int fastscnn_cuda_feature_fusion(const fastscnn_feature_fusion* op, fastscnn_stream stream);
int fastscnn_cuda_upsample_classify(const fastscnn_upsample_classify* op, fastscnn_stream stream);

/* Bytes of `sums` and `shares` for these sizes. */
void fastscnn_cuda_pyramid_pooling_scratch(const fastscnn_pyramid_pooling* op, size_t* sums,
                                           size_t* shares);

/* What a status that is not 0 means: CUDA's own text, or which argument broke which rule. */
const char* fastscnn_cuda_message(int status);

#ifdef __cplusplus
}
#endif

#endif
