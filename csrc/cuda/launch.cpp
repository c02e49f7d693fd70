#include "launch.h"

#include <new>

namespace fastscnn::cuda {
namespace {

thread_local std::string message;
thread_local std::vector<Described>* list = nullptr;

}  // namespace

CudaError::CudaError(int code) : std::runtime_error("CUDA"), code(code) {}

int status_of(const std::function<void()>& call) noexcept {
  try {
    call();
    return 0;
  } catch (const CudaError& error) {
    return error.code;
  } catch (const std::exception& error) {
    message = error.what();
    return FASTSCNN_REFUSED;
  }
}

std::vector<Described> describe(const std::function<int()>& call) {
  std::vector<Described> launches;
  list = &launches;
  const int status = call();
  list = nullptr;
  if (status != 0) throw Refused(fastscnn_cuda_message(status));
  return launches;
}

namespace detail {

std::vector<Described>* recording() { return list; }

#ifndef FASTSCNN_CUDA_ON_HOST
bool Overlap::possible(const void* kernel) {
  int device = 0;
  checked(cudaGetDevice(&device));
  if (device >= kDevices) return false;
  std::atomic<signed char>& known = known_[device];
  if (known == 0) {
    cudaFuncAttributes attributes;
    checked(cudaFuncGetAttributes(&attributes, kernel));
    known = attributes.ptxVersion >= 90 ? 1 : -1;
  }
  return known > 0;
}
#endif

void check(const Shape& shape) {
  require(shape.blocks >= 0 && shape.blocks < int64_t{1} << 31,
          "a grid must have from 0 to 2^31 - 1 blocks", shape.blocks);
  require(shape.rows >= 0 && shape.rows < 65536, "a grid must have from 0 to 65,535 rows",
          shape.rows);
}

// "... [with auto Kernel = NAME; ...]" or "... [auto Kernel = NAME]" -> NAME, without the & that
// Clang adds.
std::string template_id(const char* pretty_function) {
  const std::string text = pretty_function;
  const std::string before = "Kernel = ";
  size_t begin = text.find(before) + before.size();
  if (text[begin] == '&') ++begin;
  return text.substr(begin, text.find_first_of(";]", begin) - begin);
}

// "op.x, op.height" -> {"x", "height"}
std::vector<std::string> split(const char* names) {
  std::vector<std::string> all(1);
  for (const char* c = names; *c; ++c) {
    if (*c == ',') {
      all.emplace_back();
    } else if (*c == '.') {
      all.back().clear();
    } else if (*c != ' ' && *c != '\n') {
      all.back() += *c;
    }
  }
  return all;
}

}  // namespace detail
}  // namespace fastscnn::cuda

const char* fastscnn_cuda_message(int status) {
  namespace fc = fastscnn::cuda;
  if (status == FASTSCNN_REFUSED) return fc::message.c_str();
#ifdef FASTSCNN_CUDA_ON_HOST
  return status == 0 ? "no error" : "an error of CUDA";
#else
  fc::message = std::string(cudaGetErrorString(static_cast<cudaError_t>(status))) +
                " (CUDA error " + std::to_string(status) + ")";
  return fc::message.c_str();
#endif
}
