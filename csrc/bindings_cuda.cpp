// fastscnn_fast._cuda: the C interface of csrc/cuda to Python, nothing of torch. Arguments are
// structs, which are filled by name and called many times.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <sstream>

#include "cuda/launch.h"

#ifndef FASTSCNN_CUDA_MODULE
#define FASTSCNN_CUDA_MODULE _cuda
#endif
#ifndef FASTSCNN_CUDA_ARCHITECTURES
#define FASTSCNN_CUDA_ARCHITECTURES sm
#define FASTSCNN_CUDA_PTX 0
#endif

namespace py = pybind11;
namespace fc = fastscnn::cuda;

#define TEXT_OF(WORD) #WORD
#define TEXT(MACRO) TEXT_OF(MACRO)

namespace {

// "sm_80_90" -> {80, 90}
std::vector<int> numbers(std::istringstream&& word) {
  std::vector<int> all;
  std::string part;
  std::getline(word, part, '_');
  while (std::getline(word, part, '_')) all.push_back(std::stoi(part));
  return all;
}

// A field as Python sees it: pointers are addresses.
template <class Arguments, class Field>
void bind_field(py::class_<Arguments>& bound, const char* name, Field Arguments::* field) {
  if constexpr (std::is_pointer_v<Field>) {
    bound.def_property(
        name, [field](const Arguments& self) { return reinterpret_cast<uintptr_t>(self.*field); },
        [field](Arguments& self, uintptr_t to) { self.*field = reinterpret_cast<Field>(to); });
  } else {
    bound.def_readwrite(name, field);
  }
}

// The struct, and `function(arguments, stream)` and `describe(arguments)` of it.
template <class Arguments>
py::class_<Arguments> bind(py::module_& m, const char* name, const char* function,
                           int (*call)(const Arguments*, fastscnn_stream)) {
  py::class_<Arguments> bound(m, name, py::module_local());
  bound.def(py::init([] { return Arguments{}; }));
  m.def(
      function,
      [call, function](const Arguments& arguments, uintptr_t stream) {
        const int status = call(&arguments, reinterpret_cast<fastscnn_stream>(stream));
        if (status == 0) return;
        const std::string what = std::string(function) + ": " + fastscnn_cuda_message(status);
        if (status == FASTSCNN_REFUSED) throw std::invalid_argument(what);
        throw std::runtime_error(what);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("describe", [call](const Arguments& arguments) {
    return fc::describe([&] { return call(&arguments, nullptr); });
  });
  return bound;
}

}  // namespace

// Of the struct at hand.
#define FIELD(NAME) bind_field(bound, #NAME, &Arguments::NAME)

PYBIND11_MODULE(FASTSCNN_CUDA_MODULE, m) {
  m.doc() = "The fused ops of Fast-SCNN on NVIDIA GPUs, called with addresses and a stream.";
#ifdef FASTSCNN_CUDA_ON_HOST
  m.attr("on_host") = true;
  m.def("set_warp_order", &fc::emulation::set_warp_order);
#else
  m.attr("on_host") = false;
#endif
  m.attr("architectures") = numbers(std::istringstream(TEXT(FASTSCNN_CUDA_ARCHITECTURES)));
  m.attr("ptx") = FASTSCNN_CUDA_PTX;  // of the architecture that is compiled as PTX too, 0 for none

  py::class_<fc::Parameter>(m, "Parameter", py::module_local())
      .def_readonly("name", &fc::Parameter::name)
      .def_readonly("type", &fc::Parameter::type)
      .def_readonly("value", &fc::Parameter::value);
  py::class_<fc::Described>(m, "Described", py::module_local())
      .def_readonly("kernel", &fc::Described::kernel)
      .def_property_readonly(
          "grid",
          [](const fc::Described& d) { return py::make_tuple(d.grid[0], d.grid[1], d.grid[2]); })
      .def_readonly("threads", &fc::Described::threads)
      .def_readonly("shared", &fc::Described::shared)
      .def_readonly("parameters", &fc::Described::parameters);
  {
    using Arguments = fastscnn_stem_conv;
    auto bound = bind<Arguments>(m, "StemConv", "stem_conv", fastscnn_cuda_stem_conv);
    FIELD(type);
    FIELD(x_type);
    FIELD(channels);
    FIELD(out_channels);
    FIELD(stride);
    FIELD(padding);
    FIELD(activation);
    FIELD(images);
    FIELD(height);
    FIELD(width);
    FIELD(out_height);
    FIELD(out_width);
    FIELD(x_image);
    FIELD(x_channel);
    FIELD(x_row);
    FIELD(x_column);
    FIELD(out_image);
    FIELD(out_pixel);
    FIELD(x);
    FIELD(weight);
    FIELD(bias);
    FIELD(scale);
    FIELD(shift);
    FIELD(out);
  }
  {
    using Arguments = fastscnn_dsconv;
    auto bound = bind<Arguments>(m, "DSConv", "dsconv", fastscnn_cuda_dsconv);
    FIELD(type);
    FIELD(out_type);
    FIELD(in_channels);
    FIELD(out_channels);
    FIELD(last_channels);
    FIELD(stride);
    FIELD(dilation);
    FIELD(mid_activation);
    FIELD(activation);
    FIELD(images);
    FIELD(height);
    FIELD(width);
    FIELD(out_height);
    FIELD(out_width);
    FIELD(x_image);
    FIELD(x_pixel);
    FIELD(out_image);
    FIELD(out_pixel);
    FIELD(out_channel);
    FIELD(x);
    FIELD(depthwise_weight);
    FIELD(depthwise_bias);
    FIELD(pointwise_weight);
    FIELD(pointwise_bias);
    FIELD(last_weight);
    FIELD(last_bias);
    FIELD(out);
  }
  {
    using Arguments = fastscnn_inverted_residual;
    auto bound = bind<Arguments>(m, "InvertedResidual", "inverted_residual",
                                 fastscnn_cuda_inverted_residual);
    FIELD(type);
    FIELD(in_channels);
    FIELD(mid_channels);
    FIELD(out_channels);
    FIELD(stride);
    FIELD(residual);
    FIELD(activation);
    FIELD(images);
    FIELD(height);
    FIELD(width);
    FIELD(out_height);
    FIELD(out_width);
    FIELD(x_image);
    FIELD(x_pixel);
    FIELD(out_image);
    FIELD(out_pixel);
    FIELD(x);
    FIELD(expand_weight);
    FIELD(expand_bias);
    FIELD(depthwise_weight);
    FIELD(depthwise_bias);
    FIELD(project_weight);
    FIELD(project_bias);
    FIELD(out);
  }
  {
    using Arguments = fastscnn_pyramid_pooling;
    auto bound =
        bind<Arguments>(m, "PyramidPooling", "pyramid_pooling", fastscnn_cuda_pyramid_pooling);
    FIELD(type);
    FIELD(in_channels);
    FIELD(mid_channels);
    FIELD(out_channels);
    FIELD(kernel);
    FIELD(activation);
    FIELD(align_corners);
    FIELD(branches);
    FIELD(images);
    FIELD(height);
    FIELD(width);
    FIELD(x_image);
    FIELD(x_pixel);
    FIELD(out_image);
    FIELD(out_pixel);
    FIELD(x);
    FIELD(branch_weight);
    FIELD(branch_bias);
    FIELD(grid_weight);
    FIELD(out_weight);
    FIELD(out_bias);
    FIELD(sums);
    FIELD(shares);
    FIELD(out);
    bound.def_property(
        "bins",
        [](const Arguments& self) {
          return std::vector<int>(self.bins, self.bins + FASTSCNN_MOST_BINS);
        },
        [](Arguments& self, const std::vector<int>& bins) {
          fc::require(bins.size() <= FASTSCNN_MOST_BINS, "bins must be at most 8", bins.size());
          std::fill(std::copy(bins.begin(), bins.end(), self.bins), self.bins + FASTSCNN_MOST_BINS,
                    0);
        });
    m.def("pyramid_pooling_scratch", [](const Arguments& arguments) {
      size_t sums = 0, shares = 0;
      fastscnn_cuda_pyramid_pooling_scratch(&arguments, &sums, &shares);
      return py::make_tuple(sums, shares);
    });
  }
  {
    using Arguments = fastscnn_feature_fusion;
    auto bound =
        bind<Arguments>(m, "FeatureFusion", "feature_fusion", fastscnn_cuda_feature_fusion);
    FIELD(type);
    FIELD(low_channels);
    FIELD(high_channels);
    FIELD(out_channels);
    FIELD(dilation);
    FIELD(dense);
    FIELD(activation);
    FIELD(align_corners);
    FIELD(images);
    FIELD(height);
    FIELD(width);
    FIELD(low_height);
    FIELD(low_width);
    FIELD(high_image);
    FIELD(high_pixel);
    FIELD(low_image);
    FIELD(low_pixel);
    FIELD(out_image);
    FIELD(out_pixel);
    FIELD(high);
    FIELD(low);
    FIELD(refine_weight);
    FIELD(refine_bias);
    FIELD(low_weight);
    FIELD(high_weight);
    FIELD(bias);
    FIELD(refined);
    FIELD(out);
  }
  {
    using Arguments = fastscnn_upsample_classify;
    auto bound = bind<Arguments>(m, "UpsampleClassify", "upsample_classify",
                                 fastscnn_cuda_upsample_classify);
    FIELD(type);
    FIELD(out_type);
    FIELD(classes);
    FIELD(output);
    FIELD(align_corners);
    FIELD(images);
    FIELD(low_height);
    FIELD(low_width);
    FIELD(height);
    FIELD(width);
    FIELD(x_image);
    FIELD(x_class);
    FIELD(x_row);
    FIELD(x_column);
    FIELD(x);
    FIELD(out);
  }
}
