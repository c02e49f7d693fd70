// fastscnn_fast._cpu: addresses and sizes in, nothing of torch. Only bindings*.cpp know Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "bindings_training.h"
#include "cpu/engine.h"
#include "cpu/fingerprint.h"

namespace py = pybind11;
namespace fs = fastscnn;

namespace {

using Address = uintptr_t;
// (address, n, h, w) of dense channels-last elements.
using BatchArgs = std::tuple<Address, int, int, int>;
// (address, type, (n, c, h, w), (strides in elements))
using PictureArgs = std::tuple<Address, std::string, std::tuple<int, int, int, int>,
                               std::tuple<int64_t, int64_t, int64_t, int64_t>>;
// (isa, program, address of the weights, their bytes, threads)
using CallArgs = std::tuple<std::string, fs::Program, Address, size_t, int>;

fs::Batch batch(const BatchArgs& a) {
  return {reinterpret_cast<void*>(std::get<0>(a)), std::get<1>(a), std::get<2>(a), std::get<3>(a)};
}

fs::Type type(const std::string& name) {
  if (name == "float32") return fs::Type::f32;
  if (name == "bfloat16") return fs::Type::bf16;
  if (name == "uint8") return fs::Type::u8;
  throw std::invalid_argument("type must be float32, bfloat16 or uint8, got '" + name + "'");
}

fs::Picture picture(const PictureArgs& a) {
  const auto [n, c, h, w] = std::get<2>(a);
  const auto [sn, sc, sh, sw] = std::get<3>(a);
  const void* data = reinterpret_cast<const void*>(std::get<0>(a));
  return {data, type(std::get<1>(a)), n, c, h, w, sn, sc, sh, sw};
}

fs::Call call(const CallArgs& a) {
  return {std::get<0>(a), std::get<1>(a), reinterpret_cast<const void*>(std::get<2>(a)),
          std::get<3>(a), std::get<4>(a)};
}

fs::Output output(const std::string& name) {
  if (name == "logits") return fs::Output::logits;
  if (name == "probabilities") return fs::Output::probabilities;
  if (name == "labels") return fs::Output::labels;
  throw std::invalid_argument("output must be logits, probabilities or labels, got '" + name + "'");
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() =
      "The fused ops of Fast-SCNN on the CPU, called with raw addresses by fastscnn_fast.ops.";
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
#if defined(__VERSION__)
  m.attr("compiler") = __VERSION__;
#endif
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.def(
      "arithmetics",
      [] {
        std::vector<std::string> names;
        for (const fs::ArithmeticRecord& record : fs::kRecords) names.push_back(record.name);
        return names;
      },
      "Their names, in the order of their numbers.");
  m.def(
      "instruction_sets",
      [](const std::optional<std::string>& arithmetic) {
        return arithmetic ? fs::instruction_sets(fs::arithmetic_of(*arithmetic))
                          : fs::instruction_sets();
      },
      py::arg("arithmetic") = py::none(),
      "Those that this processor runs, the best last: all, or those with kernels of their own for "
      "the arithmetic.");
  m.def(
      "multiply_add_roof",
      [](const std::string& isa, const std::string& arithmetic, int threads, double seconds) {
        return fs::multiply_add_roof(isa, fs::arithmetic_of(arithmetic), threads, seconds);
      },
      unlocked, "Floating-point operations a second of a loop on registers alone.");
  m.def("scratch_bytes", &fs::scratch_bytes, "Bytes held by the pool of scratch buffers.");
  m.def("fill_scratch", &fs::fill_scratch, "Sets every byte of the idle scratch buffers (tests).");
  m.def("packed_bytes", [](const fs::Program& program, const std::string& arithmetic) {
    return fs::packed_bytes(program, fs::arithmetic_of(arithmetic));
  });
  m.def(
      "pack",
      [](const fs::Program& program, const std::string& arithmetic, Address plain, size_t bytes,
         Address packed) {
        fs::pack(program, fs::arithmetic_of(arithmetic), reinterpret_cast<const void*>(plain),
                 bytes, reinterpret_cast<void*>(packed));
      },
      unlocked);
  m.def(
      "stem_conv",
      [](const CallArgs& c, const PictureArgs& x, const BatchArgs& out) {
        fs::stem_conv(call(c), picture(x), batch(out));
      },
      unlocked);
  m.def(
      "dsconv",
      [](const CallArgs& c, const BatchArgs& x, const BatchArgs& out) {
        fs::dsconv(call(c), batch(x), batch(out));
      },
      unlocked);
  m.def(
      "inverted_residual",
      [](const CallArgs& c, const BatchArgs& x, const BatchArgs& out) {
        fs::inverted_residual(call(c), batch(x), batch(out));
      },
      unlocked);
  m.def(
      "pyramid_pooling",
      [](const CallArgs& c, const BatchArgs& x, const BatchArgs& out) {
        fs::pyramid_pooling(call(c), batch(x), batch(out));
      },
      unlocked);
  m.def(
      "feature_fusion",
      [](const CallArgs& c, const BatchArgs& high, const BatchArgs& low, const BatchArgs& out) {
        fs::feature_fusion(call(c), batch(high), batch(low), batch(out));
      },
      unlocked);
  m.def(
      "upsample_classify",
      [](const CallArgs& c, const BatchArgs& x, const std::string& kind, Address out, int h,
         int w) {
        fs::upsample_classify(call(c), batch(x), output(kind), reinterpret_cast<void*>(out), h, w);
      },
      unlocked);
  m.def(
      "network",
      [](const CallArgs& c, const PictureArgs& x, const std::string& kind, Address out) {
        fs::network(call(c), picture(x), output(kind), reinterpret_cast<void*>(out));
      },
      unlocked);
  m.def(
      "network_stages",
      [](const CallArgs& c, const PictureArgs& x, const std::string& kind, Address out) {
        return fs::network_stages(call(c), picture(x), output(kind), reinterpret_cast<void*>(out));
      },
      unlocked, "As network, on one picture: (name, seconds) of each stage.");
  m.def(
      "fingerprint",
      [](Address pieces, size_t count) {
        return fs::fingerprint(reinterpret_cast<const fs::Piece*>(pieces), count);
      },
      unlocked, "Of what lies in count pieces of memory, a table of (address, bytes).");
  bind_training(m);
}
