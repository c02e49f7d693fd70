// What all ops ask of their arguments, which are named as in the C interface.
#pragma once

#include "elements.cuh"

namespace fastscnn::cuda {

// The rules of a call for `images` in `type`.
class Arguments {
 public:
  Arguments(int type, int64_t images)
      : vector_(kVector / (type == FASTSCNN_FLOAT32 ? 4 : 2)), empty_(images == 0) {
    require(type >= FASTSCNN_FLOAT32 && type <= FASTSCNN_FLOAT16,
            "a type must be float32, bfloat16 or float16", type);
    at_least(0, "images", images);
  }

  static void at_least(int64_t least, const char* name, int64_t got) {
    if (got < least) refuse(name, "at least " + std::to_string(least), got);
  }

  // An output's side, of a 3x3 convolution.
  static void side(const char* name, int64_t got, int64_t size, int stride, int padding,
                   int dilation) {
    const int64_t expected = (size + 2 * padding - 2 * dilation - 1) / stride + 1;
    if (got != expected) refuse(name, std::to_string(expected) + " for these sizes", got);
  }

  // Memory that is accessed; without images none is.
  void present(const char* name, const void* address) const {
    if (address == nullptr && !empty_) refuse(name, "an address", 0);
  }

  // Memory that is accessed in whole vectors.
  void aligned(const char* name, const void* address) const {
    present(name, address);
    const auto bytes = reinterpret_cast<uintptr_t>(address);
    if (bytes % kVector) refuse(name, "aligned to 16 bytes", int64_t(bytes));
  }

  // An activation, with name_pixel and name_image.
  void plane(const char* name, const void* address, int channels, int64_t image,
             int64_t pixel) const {
    const std::string whole = "a multiple of " + std::to_string(vector_);
    aligned(name, address);
    if (pixel < padded(channels)) {
      refuse(std::string(name) + "_pixel", "at least " + std::to_string(padded(channels)), pixel);
    }
    if (pixel % vector_) refuse(std::string(name) + "_pixel", whole, pixel);
    if (image % vector_) refuse(std::string(name) + "_image", whole, image);
  }

 private:
  [[noreturn]] static void refuse(const std::string& name, const std::string& rule, int64_t got) {
    throw Refused(name + " must be " + rule + ", got " + std::to_string(got));
  }

  int vector_;
  bool empty_;
};

}  // namespace fastscnn::cuda
