// Launches: checked, or written down instead of made; and how errors become the C interface's
// statuses.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "fastscnn_cuda.h"
#ifdef FASTSCNN_CUDA_ON_HOST
#include "host/emulation.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace fastscnn::cuda {

struct Parameter {
  std::string name, type;
  uint64_t value;  // the argument's bits
};

struct Described {
  std::string kernel;  // as a demangled symbol has it before its parameters
  unsigned grid[3];
  unsigned threads;
  size_t shared;
  bool follows;  // fastscnn_stream's
  std::vector<Parameter> parameters;
};

// The launches that `call` would make, none of which is made; `call` returns a status.
std::vector<Described> describe(const std::function<int()>& call);

// An argument that breaks a rule.
struct Refused : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

template <class Value>
void require(bool holds, const char* rule, Value got) {
  if (!holds) throw Refused(std::string(rule) + ", got " + std::to_string(got));
}

struct CudaError : std::runtime_error {
  explicit CudaError(int code);
  int code;
};

// Runs `call`; its exception as a status of the C interface.
int status_of(const std::function<void()>& call) noexcept;

struct Shape {
  int64_t blocks;  // grid (blocks, rows)
  int threads;
  size_t shared;  // dynamic, bytes
  int64_t rows = 1;
};

// The stream after a launch of the same call.
inline fastscnn_stream after(fastscnn_stream stream) { return {stream.queue, 1}; }

namespace detail {

// Where launches are written down, if they are, by this thread.
std::vector<Described>* recording();

std::string template_id(const char* pretty_function);
void check(const Shape& shape);
std::vector<std::string> split(const char* names);

#ifndef FASTSCNN_CUDA_ON_HOST
inline void checked(cudaError_t code) {
  if (code != cudaSuccess) throw CudaError(code);
}

// Whether a kernel waits for the launches before it (ptx.cuh): the code that the current device
// runs was compiled for 9.0 or later. On such a device it may be of less, from PTX. Asked once.
class Overlap {
 public:
  bool possible(const void* kernel);

 private:
  static constexpr int kDevices = 64;  // beyond them launches do not overlap
  std::atomic<signed char> known_[kDevices] = {};
};
#endif

template <class P, class A>
P converted(A argument) {
  if constexpr (std::is_pointer_v<P>) {
    return static_cast<P>(argument);
  } else {
    const P value = static_cast<P>(argument);
    if constexpr (std::is_integral_v<A>) {
      require(static_cast<A>(value) == argument, "a size must fit the kernel's parameter",
              argument);
    }
    return value;
  }
}

template <class P>
Parameter parameter(const std::string& name, P value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  if constexpr (std::is_pointer_v<P>) return {name, "pointer", bits};
  const std::string size = std::to_string(8 * sizeof value);
  return {name, (std::is_floating_point_v<P> ? "float" : "int") + size, bits};
}

template <auto Kernel>
std::string name_of() {
  return template_id(__PRETTY_FUNCTION__);
}

template <auto Kernel, class... P, size_t... I, class... A>
void launch(void (*)(P...), std::index_sequence<I...>, const char* names, const Shape& shape,
            fastscnn_stream stream, A... given) {
  static_assert(sizeof...(P) == sizeof...(A), "a launch has the kernel's parameters");
  check(shape);
  std::tuple<P...> arguments{converted<P>(given)...};
  if (auto* list = recording()) {
    const auto named = split(names);
    list->push_back({name_of<Kernel>(),
                     {unsigned(shape.blocks), unsigned(shape.rows), 1},
                     unsigned(shape.threads),
                     shape.shared,
                     stream.follows != 0,
                     {parameter(named[I], std::get<I>(arguments))...}});
    return;
  }
  if (shape.blocks == 0 || shape.rows == 0) return;
#ifdef FASTSCNN_CUDA_ON_HOST
  (void)stream;
  emulation::launch(unsigned(shape.blocks), unsigned(shape.rows), unsigned(shape.threads),
                    shape.shared, [&] { Kernel(std::get<I>(arguments)...); });
#else
  const void* kernel = reinterpret_cast<const void*>(Kernel);
  if (shape.shared > 48 * 1024) {  // more is given only where it is asked for
    checked(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(shape.shared)));
  }
  void* pointers[] = {&std::get<I>(arguments)...};
  static Overlap overlap;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t how{};
  how.gridDim = dim3(unsigned(shape.blocks), unsigned(shape.rows));
  how.blockDim = dim3(unsigned(shape.threads));
  how.dynamicSmemBytes = shape.shared;
  how.stream = static_cast<cudaStream_t>(stream.queue);
  how.attrs = &attribute;
  how.numAttrs = stream.follows && overlap.possible(kernel) ? 1 : 0;
  checked(cudaLaunchKernelExC(&how, kernel, pointers));
#endif
}

template <class... P>
std::index_sequence_for<P...> indices(void (*)(P...)) {
  return {};
}

}  // namespace detail
}  // namespace fastscnn::cuda

// Launches KERNEL, in parentheses, with arguments that are named as the kernel's parameters are
// described.
#define FASTSCNN_LAUNCH(KERNEL, SHAPE, STREAM, ...)                                          \
  ::fastscnn::cuda::detail::launch<KERNEL>(KERNEL, ::fastscnn::cuda::detail::indices KERNEL, \
                                           #__VA_ARGS__, SHAPE, STREAM, __VA_ARGS__)
