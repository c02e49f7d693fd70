// What all ops ask of their arguments, which are named as in the C interface.
#pragma once

#include <algorithm>
#include <climits>

#include "elements.cuh"

namespace fastscnn::cuda {

constexpr int64_t kMostChannels = 1 << 20;

inline int64_t bytes_of(int type) {
  return type == FASTSCNN_UINT8 ? 1 : type == FASTSCNN_FLOAT32 ? 4 : 2;
}

// The rules of a call for `images` in `type`, or of bytes.
class Arguments {
 public:
  Arguments(int type, int64_t images, int activation = FASTSCNN_NONE)
      : vector_(kVector / bytes_of(type)), multiple_(computed_channels(1)), images_(images) {
    require(type >= FASTSCNN_FLOAT32 && type <= FASTSCNN_FLOAT16,
            "a type must be float32, bfloat16 or float16", type);
    at_least(0, "images", images);
    bounds_of(activation);
  }
  explicit Arguments(int64_t images) : vector_(kVector), multiple_(32), images_(images) {
    at_least(0, "images", images);
  }

  static void at_least(int64_t least, const char* name, int64_t got) {
    if (got < least) refuse(name, "at least " + std::to_string(least), got);
  }

  static void channels(const char* name, int64_t got) {
    at_least(1, name, got);
    if (got > kMostChannels) refuse(name, "at most " + std::to_string(kMostChannels), got);
  }

  // One side of a 3x3 convolution, in and out.
  static void side(const char* name, int64_t in, int64_t out, int stride, int padding,
                   int dilation) {
    at_least(std::max<int64_t>(1, 2 * (int64_t{dilation} - padding) + 1), name, in);
    const int64_t expected = (in + 2 * (int64_t{padding} - dilation) - 1) / stride + 1;
    if (out == expected) return;
    refuse(std::string("out_") + name, std::to_string(expected) + " for these sizes", out);
  }

  // Memory that is accessed by elements of the type; without images none is.
  void present(const char* name, const void* address, int type) const {
    aligned_to(bytes_of(type), name, address);
  }

  // Memory that is accessed in whole vectors.
  void aligned(const char* name, const void* address) const { aligned_to(kVector, name, address); }

  // An activation, with name_pixel and name_image.
  void plane(const char* name, const void* address, int channels, int64_t image,
             int64_t pixel) const {
    aligned(name, address);
    const auto distance = [&](const char* part, const char* rule, int64_t bound, int64_t got) {
      refuse(std::string(name) + part, rule + std::to_string(bound), got);
    };
    const int held = rounded_up(channels, multiple_);
    if (pixel < held) distance("_pixel", "at least ", held, pixel);
    if (pixel > INT_MAX) distance("_pixel", "at most ", INT_MAX, pixel);
    if (pixel % vector_) distance("_pixel", "a multiple of ", vector_, pixel);
    if (image % vector_) distance("_image", "a multiple of ", vector_, image);
  }

  // The activation that is written: its images may not share elements.
  void result(const void* address, int channels, int64_t height, int64_t width, int64_t image,
              int64_t pixel) const {
    plane("out", address, channels, image, pixel);
    if (images_ > 1) holds("out_image", image, height, width, pixel);
  }

  // Classes of `type` that are written, a plane each or, `interleaved`, as channels are.
  template <class Op>
  void classes(const Op& op, bool interleaved, int type) const {
    present("out", op.out, type);
    at_least(1, "out_pixel", op.out_pixel);
    if (!interleaved) {
      holds("out_channel", op.out_channel, op.out_height, op.out_width, op.out_pixel);
    }
    if (images_ <= 1) return;
    if (interleaved) {
      holds("out_image", op.out_image, op.out_height, op.out_width, op.out_pixel);
    } else {
      holds("out_image", op.out_image, op.last_channels, 1, op.out_channel);
    }
  }

  // The sizes, activations and result of feature_fusion.
  template <class Op>
  void fusion(const Op& op) const {
    channels("low_channels", op.low_channels);
    channels("high_channels", op.high_channels);
    channels("out_channels", op.out_channels);
    at_least(1, "dilation", op.dilation);
    at_least(1, "height", op.height);
    at_least(1, "width", op.width);
    at_least(1, "low_height", op.low_height);
    at_least(1, "low_width", op.low_width);
    plane("high", op.high, op.high_channels, op.high_image, op.high_pixel);
    plane("low", op.low, op.low_channels, op.low_image, op.low_pixel);
    if (op.dense) aligned("refined", op.refined);
    result(op.out, op.out_channels, op.height, op.width, op.out_image, op.out_pixel);
  }

  // The same of pyramid_pooling.
  template <class Op>
  void pyramid(const Op& op) const {
    require(op.kernel == 1 || op.kernel == 3, "kernel must be 1 or 3", op.kernel);
    channels("in_channels", op.in_channels);
    channels("out_channels", op.out_channels);
    if (op.branches) channels("mid_channels", op.mid_channels);
    // Twice a side times its bins is an int in the kernels.
    const int64_t most = 1 << 21;
    require(op.height >= 1 && op.height <= most, "height must be from 1 to 2^21", op.height);
    require(op.width >= 1 && op.width <= most, "width must be from 1 to 2^21", op.width);
    plane("x", op.x, op.in_channels, op.x_image, op.x_pixel);
    result(op.out, op.out_channels, op.height, op.width, op.out_image, op.out_pixel);
  }

  // A distance that is at least that of `height` rows of `width` pixels, each `pixel` elements.
  static void holds(const char* name, int64_t got, int64_t height, int64_t width, int64_t pixel) {
    if (got / pixel / width >= height) return;
    refuse(name,
           "at least " + std::to_string(height) + " x " + std::to_string(width) + " x " +
               std::to_string(pixel),
           got);
  }

 private:
  [[noreturn]] static void refuse(const std::string& name, const std::string& rule, int64_t got) {
    throw Refused(name + " must be " + rule + ", got " + std::to_string(got));
  }

  void aligned_to(int64_t bytes, const char* name, const void* address) const {
    if (address == nullptr && images_ > 0) refuse(name, "an address", 0);
    const auto at = reinterpret_cast<uintptr_t>(address);
    if (at % bytes) refuse(name, "aligned to " + std::to_string(bytes) + " bytes", int64_t(at));
  }

  int64_t vector_;  // elements
  int multiple_;    // of channels, which a pixel has
  int64_t images_;
};

// Whether the classes of a pixel lie next to each other, padded with zeros, as channels do. Planes
// of one pixel have an out_channel of 1 too, but an out_pixel that holds no padding.
template <class Op>
bool is_interleaved(const Op& op) {
  return op.out_channel == 1 && op.out_pixel >= computed_channels(op.last_channels);
}

}  // namespace fastscnn::cuda
