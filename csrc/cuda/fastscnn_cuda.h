/* The six fused ops on NVIDIA GPUs: a C interface of pointers, sizes and a stream, which knows
 * neither torch nor Python.
 *
 * Activations are channels-last: `pixel` elements from a pixel to the next, of which a multiple of
 * 16 channels is computed (what pads them is zero); rows follow each other without gaps, images lie
 * `image` elements apart; addresses, pixels and images are whole vectors of 16 bytes. Packed
 * weights are laid out by fastscnn_fast/lower/gpu.py, aligned in the same way. Every function
 * checks sizes, strides and alignment (not how much memory there is), queues its launches on
 * `stream`, does not wait for them and returns 0, else a status that fastscnn_cuda_message()
 * explains: FASTSCNN_REFUSED for an argument that breaks a rule, or CUDA's own error.
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

typedef const void* fastscnn_input;
typedef void* fastscnn_output; /* scratch too */
typedef int fastscnn_bins[FASTSCNN_MOST_BINS];

/* FASTSCNN_FIELDS_op lists the fields of the struct fastscnn_op, F(type, name) each: the struct
 * here, and whoever fills it by name, are made from that list. */
/* clang-format off */

/* 3x3 + bias + act from a picture of any strides, in elements: of `type`, or uint8 to be
 * normalised. */
#define FASTSCNN_FIELDS_stem_conv(F)                                                \
  F(int, type) F(int, x_type) F(int, channels) F(int, out_channels) F(int, stride)  \
  F(int, padding) F(int, activation)                                                \
  F(int64_t, images) F(int64_t, height) F(int64_t, width) F(int64_t, out_height)    \
  F(int64_t, out_width) F(int64_t, x_image) F(int64_t, x_channel) F(int64_t, x_row) \
  F(int64_t, x_column) F(int64_t, out_image) F(int64_t, out_pixel)                  \
  F(fastscnn_input, x) F(fastscnn_input, weight) F(fastscnn_input, bias)            \
  F(fastscnn_input, scale) F(fastscnn_input, shift) F(fastscnn_output, out)

/* Depthwise 3x3 + bias + act -> 1x1 + bias + act [-> 1x1 + bias of last_channels, where those are
 * not 0]. `out_type` may differ from `type` with last_channels only. `out_channel` is 1 where an
 * out_pixel holds the padded channels, else a plane's size; without last_channels it is not looked
 * at. */
#define FASTSCNN_FIELDS_dsconv(F)                                                              \
  F(int, type) F(int, out_type) F(int, in_channels) F(int, out_channels) F(int, last_channels) \
  F(int, stride) F(int, dilation) F(int, mid_activation) F(int, activation)                    \
  F(int64_t, images) F(int64_t, height) F(int64_t, width) F(int64_t, out_height)               \
  F(int64_t, out_width) F(int64_t, x_image) F(int64_t, x_pixel) F(int64_t, out_image)          \
  F(int64_t, out_pixel) F(int64_t, out_channel)                                                \
  F(fastscnn_input, x) F(fastscnn_input, depthwise_weight) F(fastscnn_input, depthwise_bias)   \
  F(fastscnn_input, pointwise_weight) F(fastscnn_input, pointwise_bias)                        \
  F(fastscnn_input, last_weight) F(fastscnn_input, last_bias) F(fastscnn_output, out)

/* 1x1 + bias + act -> depthwise 3x3 + bias + act -> 1x1 + bias [+ x]. `slices` blocks share a tile,
 * as many as fastscnn_cuda_inverted_residual_slices() says or others; where there are several,
 * `partials` is scratch and `counters` are int32 that are zero before and after the call, of as
 * many bytes as fastscnn_cuda_inverted_residual_scratch() says. */
#define FASTSCNN_FIELDS_inverted_residual(F)                                                \
  F(int, type) F(int, in_channels) F(int, mid_channels) F(int, out_channels) F(int, stride) \
  F(int, residual) F(int, activation) F(int, slices)                                        \
  F(int64_t, images) F(int64_t, height) F(int64_t, width) F(int64_t, out_height)            \
  F(int64_t, out_width) F(int64_t, x_image) F(int64_t, x_pixel) F(int64_t, out_image)       \
  F(int64_t, out_pixel)                                                                     \
  F(fastscnn_input, x) F(fastscnn_input, expand_weight) F(fastscnn_input, expand_bias)      \
  F(fastscnn_input, depthwise_weight) F(fastscnn_input, depthwise_bias)                     \
  F(fastscnn_input, project_weight) F(fastscnn_input, project_bias)                         \
  F(fastscnn_output, partials) F(fastscnn_output, counters) F(fastscnn_output, out)

/* out(concat [x, resize(relu(branch_i(pool_i(x)))) ...]) with a `kernel` x `kernel`
 * out-convolution, 1 or 3. `sums` and `shares` are scratch, of as many bytes as
 * fastscnn_cuda_pyramid_pooling_scratch() says. */
#define FASTSCNN_FIELDS_pyramid_pooling(F)                                                  \
  F(int, type) F(int, in_channels) F(int, mid_channels) F(int, out_channels) F(int, kernel) \
  F(int, activation) F(int, align_corners) F(int, branches) F(fastscnn_bins, bins)          \
  F(int64_t, images) F(int64_t, height) F(int64_t, width) F(int64_t, x_image)               \
  F(int64_t, x_pixel) F(int64_t, out_image) F(int64_t, out_pixel)                           \
  F(fastscnn_input, x) F(fastscnn_input, branch_weight) F(fastscnn_input, branch_bias)      \
  F(fastscnn_input, grid_weight) F(fastscnn_input, out_weight) F(fastscnn_input, out_bias)  \
  F(fastscnn_output, sums) F(fastscnn_output, shares) F(fastscnn_output, out)

/* act(low_weight relu(refine(resize(low))) + high_weight high + bias); refine is a depthwise 3x3,
 * or (`dense`) a 1x1 whose result before the activation, (images, low_height, low_width,
 * low_pixel), goes to the scratch `refined`. */
#define FASTSCNN_FIELDS_feature_fusion(F)                                                     \
  F(int, type) F(int, low_channels) F(int, high_channels) F(int, out_channels)                \
  F(int, dilation) F(int, dense) F(int, activation) F(int, align_corners)                     \
  F(int64_t, images) F(int64_t, height) F(int64_t, width) F(int64_t, low_height)              \
  F(int64_t, low_width) F(int64_t, high_image) F(int64_t, high_pixel) F(int64_t, low_image)   \
  F(int64_t, low_pixel) F(int64_t, out_image) F(int64_t, out_pixel)                           \
  F(fastscnn_input, high) F(fastscnn_input, low) F(fastscnn_input, refine_weight)             \
  F(fastscnn_input, refine_bias) F(fastscnn_input, low_weight) F(fastscnn_input, high_weight) \
  F(fastscnn_input, bias) F(fastscnn_output, refined) F(fastscnn_output, out)

/* In int8 (the ops whose names end so) activations are uint8, `pixel` a multiple of 32 channels,
 * whatever pads them; packed weights are fastscnn_fast/lower/gpu_int8.py's. What the ops compute is
 * specified by fastscnn_fast/program/integers.py. */

/* As dsconv; with last_channels `out` is float32. */
#define FASTSCNN_FIELDS_dsconv_int8(F)                                                         \
  F(int, in_channels) F(int, out_channels) F(int, last_channels) F(int, stride)                \
  F(int, dilation)                                                                             \
  F(int64_t, images) F(int64_t, height) F(int64_t, width) F(int64_t, out_height)               \
  F(int64_t, out_width) F(int64_t, x_image) F(int64_t, x_pixel) F(int64_t, out_image)          \
  F(int64_t, out_pixel) F(int64_t, out_channel)                                                \
  F(fastscnn_input, x) F(fastscnn_input, depthwise_weight) F(fastscnn_input, depthwise_bias)   \
  F(fastscnn_input, depthwise_multiplier) F(fastscnn_input, depthwise_zero)                    \
  F(fastscnn_input, pointwise_weight) F(fastscnn_input, pointwise_bias)                        \
  F(fastscnn_input, pointwise_multiplier) F(fastscnn_input, pointwise_zero)                    \
  F(fastscnn_input, last_weight) F(fastscnn_input, last_bias)                                  \
  F(fastscnn_input, last_multiplier) F(fastscnn_output, out)

/* As inverted_residual. */
#define FASTSCNN_FIELDS_inverted_residual_int8(F)                                             \
  F(int, in_channels) F(int, mid_channels) F(int, out_channels) F(int, stride)                \
  F(int, residual) F(int, slices)                                                             \
  F(int64_t, images) F(int64_t, height) F(int64_t, width) F(int64_t, out_height)              \
  F(int64_t, out_width) F(int64_t, x_image) F(int64_t, x_pixel) F(int64_t, out_image)         \
  F(int64_t, out_pixel)                                                                       \
  F(fastscnn_input, x) F(fastscnn_input, expand_weight) F(fastscnn_input, expand_bias)        \
  F(fastscnn_input, expand_multiplier) F(fastscnn_input, expand_zero)                         \
  F(fastscnn_input, depthwise_weight) F(fastscnn_input, depthwise_bias)                       \
  F(fastscnn_input, depthwise_multiplier) F(fastscnn_input, depthwise_zero)                   \
  F(fastscnn_input, project_weight) F(fastscnn_input, project_bias)                           \
  F(fastscnn_input, project_multiplier) F(fastscnn_input, project_zero)                       \
  F(fastscnn_input, input_zero) F(fastscnn_input, residual_multiplier)                        \
  F(fastscnn_output, partials) F(fastscnn_output, counters) F(fastscnn_output, out)

/* As stem_conv; x is uint8 or float32, stride 2, at most 4 channels. */
#define FASTSCNN_FIELDS_stem_conv_int8(F)                                           \
  F(int, x_type) F(int, channels) F(int, out_channels) F(int, stride) F(int, padding) \
  F(int64_t, images) F(int64_t, height) F(int64_t, width) F(int64_t, out_height)    \
  F(int64_t, out_width) F(int64_t, x_image) F(int64_t, x_channel) F(int64_t, x_row) \
  F(int64_t, x_column) F(int64_t, out_image) F(int64_t, out_pixel)                  \
  F(fastscnn_input, x) F(fastscnn_input, weight) F(fastscnn_input, bias)            \
  F(fastscnn_input, multiplier) F(fastscnn_input, zero) F(fastscnn_input, pad)      \
  F(fastscnn_input, scale) F(fastscnn_input, shift) F(fastscnn_output, out)

/* As pyramid_pooling; the scratch `sums` is int32, (images, height, sum of bins, channels), and
 * `grids` bytes, (images, cells, mid_channels), both padded as a matrix's terms and branches are. */
#define FASTSCNN_FIELDS_pyramid_pooling_int8(F)                                             \
  F(int, in_channels) F(int, mid_channels) F(int, out_channels) F(int, kernel)              \
  F(int, align_corners) F(int, branches) F(fastscnn_bins, bins)                             \
  F(int64_t, images) F(int64_t, height) F(int64_t, width) F(int64_t, x_image)               \
  F(int64_t, x_pixel) F(int64_t, out_image) F(int64_t, out_pixel)                           \
  F(fastscnn_input, x) F(fastscnn_input, branch_weight) F(fastscnn_input, branch_bias)      \
  F(fastscnn_input, branch_multiplier) F(fastscnn_input, branch_zero)                       \
  F(fastscnn_input, grid_weight) F(fastscnn_input, out_weight) F(fastscnn_input, out_bias)  \
  F(fastscnn_input, out_multiplier) F(fastscnn_input, out_zero)                             \
  F(fastscnn_input, input_zero)                                                             \
  F(fastscnn_output, sums) F(fastscnn_output, grids) F(fastscnn_output, out)

/* As feature_fusion; `refined` is of bytes. */
#define FASTSCNN_FIELDS_feature_fusion_int8(F)                                                \
  F(int, low_channels) F(int, high_channels) F(int, out_channels) F(int, dilation)            \
  F(int, dense) F(int, align_corners)                                                         \
  F(int64_t, images) F(int64_t, height) F(int64_t, width) F(int64_t, low_height)              \
  F(int64_t, low_width) F(int64_t, high_image) F(int64_t, high_pixel) F(int64_t, low_image)   \
  F(int64_t, low_pixel) F(int64_t, out_image) F(int64_t, out_pixel)                           \
  F(fastscnn_input, high) F(fastscnn_input, low) F(fastscnn_input, refine_weight)             \
  F(fastscnn_input, refine_bias) F(fastscnn_input, refine_multiplier)                         \
  F(fastscnn_input, refine_zero) F(fastscnn_input, low_weight) F(fastscnn_input, high_weight) \
  F(fastscnn_input, bias) F(fastscnn_input, multiplier) F(fastscnn_input, zero)               \
  F(fastscnn_output, refined) F(fastscnn_output, out)

/* Bilinear resize of logits (any strides, `type`) -> `output` of every pixel: logits or
 * probabilities of `out_type` (images, classes, height, width), or uint8 labels (images, height,
 * width), contiguous. */
#define FASTSCNN_FIELDS_upsample_classify(F)                                         \
  F(int, type) F(int, out_type) F(int, classes) F(int, output) F(int, align_corners) \
  F(int64_t, images) F(int64_t, low_height) F(int64_t, low_width) F(int64_t, height) \
  F(int64_t, width) F(int64_t, x_image) F(int64_t, x_class) F(int64_t, x_row)        \
  F(int64_t, x_column)                                                               \
  F(fastscnn_input, x) F(fastscnn_output, out)

/* Where a call queues its launches: a cudaStream_t; and whether (not 0) what was queued there last is
 * another of these calls whose weights were written before it, as these were. Then, on GPUs of
 * compute capability 9.0 and later, this call's first launch begins, and fetches weights, while that
 * call's last still runs: programmatic dependent launch. */
typedef struct {
  void* queue;
  int follows;
} fastscnn_stream;

#define FASTSCNN_OPS(OP)                                     \
  OP(stem_conv) OP(dsconv) OP(inverted_residual)             \
  OP(pyramid_pooling) OP(feature_fusion) OP(upsample_classify) \
  OP(stem_conv_int8) OP(dsconv_int8) OP(inverted_residual_int8) \
  OP(pyramid_pooling_int8) OP(feature_fusion_int8)
/* clang-format on */

#define FASTSCNN_MEMBER(TYPE, NAME) TYPE NAME;
#define FASTSCNN_DECLARE(NAME)              \
  typedef struct {                          \
    FASTSCNN_FIELDS_##NAME(FASTSCNN_MEMBER) \
  } fastscnn_##NAME;                        \
  int fastscnn_cuda_##NAME(const fastscnn_##NAME* op, fastscnn_stream stream);
FASTSCNN_OPS(FASTSCNN_DECLARE)
#undef FASTSCNN_DECLARE
#undef FASTSCNN_MEMBER

/* The slices with which a GPU of so many multiprocessors should end first, by the instructions that
 * its busiest executes; 0 for sizes that the op refuses. */
int fastscnn_cuda_inverted_residual_slices(const fastscnn_inverted_residual* op, int processors);

int fastscnn_cuda_inverted_residual_int8_slices(const fastscnn_inverted_residual_int8* op,
                                                int processors);

/* Bytes of `partials` and `counters` for these sizes and slices. */
void fastscnn_cuda_inverted_residual_scratch(const fastscnn_inverted_residual* op, size_t* partials,
                                             size_t* counters);
void fastscnn_cuda_inverted_residual_int8_scratch(const fastscnn_inverted_residual_int8* op,
                                                  size_t* partials, size_t* counters);

/* Bytes of `sums` and `shares` for these sizes. */
void fastscnn_cuda_pyramid_pooling_scratch(const fastscnn_pyramid_pooling* op, size_t* sums,
                                           size_t* shares);

/* What a status that is not 0 means: CUDA's own text, or which argument broke which rule. */
const char* fastscnn_cuda_message(int status);

#ifdef __cplusplus
}
#endif

#endif
