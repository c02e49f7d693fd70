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

// A field as Python sees it: pointers are addresses, bins a list.
template <class Arguments, class Field>
void bind_field(py::class_<Arguments>& bound, const char* name, Field Arguments::* field) {
  if constexpr (std::is_pointer_v<Field>) {
    bound.def_property(
        name, [field](const Arguments& self) { return reinterpret_cast<uintptr_t>(self.*field); },
        [field](Arguments& self, uintptr_t to) { self.*field = reinterpret_cast<Field>(to); });
  } else if constexpr (std::is_array_v<Field>) {
    constexpr size_t kMost = std::extent_v<Field>;
    using Values = std::vector<std::remove_extent_t<Field>>;
    bound.def_property(
        name, [field](const Arguments& self) { return Values(self.*field, self.*field + kMost); },
        [field, name](Arguments& self, const Values& to) {
          const std::string rule = std::string(name) + " must be at most " + std::to_string(kMost);
          fc::require(to.size() <= kMost, rule.c_str(), to.size());
          std::fill(std::copy(to.begin(), to.end(), self.*field), self.*field + kMost, 0);
        });
  } else {
    bound.def_readwrite(name, field);
  }
}

// Of an op the struct, with the names of its fields, and `op(arguments, stream, follows)`, a
// fastscnn_stream's two, and `describe(arguments)`.
template <class Arguments>
py::class_<Arguments> bind(py::module_& m, const char* op,
                           int (*call)(const Arguments*, fastscnn_stream)) {
  py::class_<Arguments> bound(m, (std::string(op) + "_arguments").c_str(), py::module_local());
  bound.def(py::init([] { return Arguments{}; }));
  m.attr("arguments")[op] = bound;
  m.def(
      op,
      [call, op](const Arguments& arguments, uintptr_t stream, bool follows) {
        const int status = call(&arguments, {reinterpret_cast<void*>(stream), follows});
        if (status == 0) return;
        const std::string what = std::string(op) + ": " + fastscnn_cuda_message(status);
        if (status == FASTSCNN_REFUSED) throw std::invalid_argument(what);
        throw std::runtime_error(what);
      },
      py::arg("arguments"), py::arg("stream"), py::arg("follows") = false,
      py::call_guard<py::gil_scoped_release>());
  m.def("describe", [call](const Arguments& arguments) {
    return fc::describe([&] { return call(&arguments, {}); });
  });
  return bound;
}

// Of both arithmetics under the same names.
template <class Arguments>
void bind_slices(py::module_& m, int (*slices)(const Arguments*, int),
                 void (*scratch)(const Arguments*, size_t*, size_t*)) {
  m.def("inverted_residual_slices", slices);
  m.def("inverted_residual_scratch", [scratch](const Arguments& arguments) {
    size_t partials = 0, counters = 0;
    scratch(&arguments, &partials, &counters);
    return py::make_tuple(partials, counters);
  });
}

}  // namespace

PYBIND11_MODULE(FASTSCNN_CUDA_MODULE, m) {
  m.doc() = "The fused ops of Fast-SCNN on NVIDIA GPUs, called with addresses and a stream.";
#ifdef FASTSCNN_CUDA_ON_HOST
  m.attr("on_host") = true;
  m.def("set_warp_order", &fc::emulation::set_warp_order);
  m.def("set_in_flight", &fc::emulation::set_in_flight);
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
      .def_readonly("follows", &fc::Described::follows)
      .def_readonly("parameters", &fc::Described::parameters);

  m.attr("arguments") = py::dict();  // the structs by op; each knows its fields but addresses
#define FIELD(TYPE, NAME)                     \
  bind_field(bound, #NAME, &Arguments::NAME); \
  if (!std::is_pointer_v<TYPE>) sizes.append(#NAME);
#define OP(NAME)                                                  \
  {                                                               \
    using Arguments = fastscnn_##NAME;                            \
    auto bound = bind<Arguments>(m, #NAME, fastscnn_cuda_##NAME); \
    py::list sizes;                                               \
    FASTSCNN_FIELDS_##NAME(FIELD);                                \
    bound.attr("sizes") = py::tuple(sizes);                       \
  }
  FASTSCNN_OPS(OP)
  bind_slices(m, fastscnn_cuda_inverted_residual_slices, fastscnn_cuda_inverted_residual_scratch);
  bind_slices(m, fastscnn_cuda_inverted_residual_int8_slices,
              fastscnn_cuda_inverted_residual_int8_scratch);
  m.def("pyramid_pooling_scratch", [](const fastscnn_pyramid_pooling& arguments) {
    size_t sums = 0, shares = 0;
    fastscnn_cuda_pyramid_pooling_scratch(&arguments, &sums, &shares);
    return py::make_tuple(sums, shares);
  });
}
