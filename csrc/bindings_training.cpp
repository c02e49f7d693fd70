// The training kernels of fastscnn_fast._cpu: addresses and sizes in, nothing of torch.
#include "bindings_training.h"

#include <pybind11/stl.h>

#include "cpu/training.h"

namespace py = pybind11;
namespace fs = fastscnn;

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

fs::Type type(bool bf16) { return bf16 ? fs::Type::bf16 : fs::Type::f32; }

}  // namespace

void bind_training(py::module_& m) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  using namespace py::literals;
  m.def(
      "upsampled_loss",
      [](const std::string& isa, int threads, bool bf16, Address logits,
         std::tuple<int, int, int, int> shape, Address labels, std::tuple<int, int> size,
         bool align_corners, Address targets, Address target_sums, Address gradient,
         Address surprise) {
        const auto [n, classes, h, w] = shape;
        const auto [height, width] = size;
        return fs::upsampled_loss(
            isa,
            {type(bf16), pointer<void>(logits), n, classes, h, w, pointer<uint8_t>(labels), height,
             width, align_corners, pointer<float>(targets), pointer<float>(target_sums),
             pointer<float>(gradient), pointer<float>(surprise)},
            threads);
      },
      unlocked);
  m.def(
      "soft_confusion",
      [](const std::string& isa, int threads, bool bf16, Address logits,
         std::tuple<int, int, int, int> shape, Address labels, std::tuple<int, int> size,
         bool align_corners, Address table, Address counted, Address gradient, Address confusion) {
        const auto [n, classes, h, w] = shape;
        const auto [height, width] = size;
        fs::upsampled_loss(
            isa,
            {type(bf16), pointer<void>(logits), n, classes, h, w, pointer<uint8_t>(labels), height,
             width, align_corners, pointer<float>(table), pointer<float>(counted),
             pointer<float>(gradient), nullptr, true, pointer<double>(confusion)},
            threads);
      },
      unlocked);
  m.def(
      "batch_norm_forward",
      [](const std::string& isa, int threads, bool bf16, int activation, size_t pixels,
         int channels, Address x, Address residual, Address gamma, Address beta, Address mean,
         Address inverse_std, float epsilon, float momentum, Address running_mean,
         Address running_variance, Address y) {
        fs::BatchNorm b{};
        b.type = type(bf16), b.activation = fs::Activation(activation);
        b.pixels = pixels, b.channels = channels;
        b.x = pointer<void>(x), b.residual = pointer<void>(residual);
        b.gamma = pointer<float>(gamma), b.beta = pointer<float>(beta);
        b.mean = pointer<float>(mean), b.inverse_std = pointer<float>(inverse_std);
        b.epsilon = epsilon, b.momentum = momentum;
        b.running_mean = pointer<float>(running_mean);
        b.running_variance = pointer<float>(running_variance);
        b.y = pointer<void>(y);
        fs::batch_norm_forward(isa, b, threads);
      },
      unlocked);
  m.def(
      "batch_norm_backward",
      [](const std::string& isa, int threads, bool bf16, int activation, size_t pixels,
         int channels, Address x, Address y, Address gamma, Address beta, Address mean,
         Address inverse_std, Address y_gradient, Address x_gradient, Address residual_gradient,
         Address gamma_gradient, Address beta_gradient) {
        fs::BatchNorm b{};
        b.type = type(bf16), b.activation = fs::Activation(activation);
        b.pixels = pixels, b.channels = channels;
        b.x = pointer<void>(x), b.y = pointer<void>(y), b.residual = b.y;
        b.gamma = pointer<float>(gamma), b.beta = pointer<float>(beta);
        b.mean = pointer<float>(mean), b.inverse_std = pointer<float>(inverse_std);
        b.y_gradient = pointer<void>(y_gradient), b.x_gradient = pointer<void>(x_gradient);
        b.residual_gradient = pointer<void>(residual_gradient);
        b.gamma_gradient = pointer<float>(gamma_gradient),
        b.beta_gradient = pointer<float>(beta_gradient);
        fs::batch_norm_backward(isa, b, threads);
      },
      unlocked);
  m.def(
      "depthwise_backward",
      [](const std::string& isa, int threads, bool bf16, std::tuple<int, int, int, int> shape,
         int stride, int dilation, Address x, Address y_gradient, Address weight,
         Address x_gradient, Address weight_gradient) {
        const auto [n, channels, h, w] = shape;
        fs::depthwise_backward(isa,
                               {type(bf16), n, h, w, channels, stride, dilation, pointer<void>(x),
                                pointer<void>(y_gradient), pointer<float>(weight),
                                pointer<void>(x_gradient), pointer<float>(weight_gradient)},
                               threads);
      },
      unlocked);
}
