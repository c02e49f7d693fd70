// From the package's integers to layers, how each computes, and the tag of packed weights.
#pragma once
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine.h"

namespace fastscnn {

constexpr uint32_t kMagic = 0x4E435346;  // "FSCN"
constexpr uint32_t kVersion = 2;
// The tag's layout says which backend's kernels read the weights: 0 reference, 1 cpu, 2 GPUs. How
// the cpu's lie follows from the layers and the arithmetic (layer.h, Gemm).
constexpr uint32_t kLayoutCpu = 1;

inline std::string arithmetic_names() {
  std::string names;
  for (int a = 0; a < kArithmetics; a++)
    names += (a == 0 ? "" : a + 1 < kArithmetics ? ", " : " or ") + std::string(kRecords[a].name);
  return names;
}

// The encoding of Layer.encode() in program/layers.py: a length, then that many values, per layer.
inline std::vector<Layer> decode(const Program& program) {
  constexpr size_t kFields = 16;      // before the inputs and the bins
  constexpr int kFarthest = 1 << 10;  // of dilation and bins: squared, and times channels, an int
  std::vector<Layer> layers;
  for (size_t at = 0; at < program.size(); at += 1 + size_t(program[at])) {
    const int64_t length = program[at];
    if (length < int64_t(kFields) || at + size_t(length) >= program.size())
      throw std::invalid_argument("program must hold whole layers, got a layer of length " +
                                  std::to_string(length));
    const std::string index = std::to_string(layers.size());
    const int64_t* v = &program[at + 1];
    for (int64_t i = 0; i < length; i++)
      if (v[i] < 0 || v[i] > (1 << 20))
        throw std::invalid_argument("program must hold values from 0 to 2^20, got " +
                                    std::to_string(v[i]));
    const int64_t inputs = v[15], bins = length - int64_t(kFields) - inputs;
    if (bins > kMaxBins)
      throw std::invalid_argument("pyramid_bins must be at most " + std::to_string(kMaxBins) +
                                  " values, got " + std::to_string(bins));
    if (v[14] > kArithmetics)
      throw std::invalid_argument("arithmetic of layer " + index + " must be " +
                                  arithmetic_names() + " on the cpu backend, got number " +
                                  std::to_string(v[14] - 1));
    Layer l{};
    l.op = Op(v[0]);
    l.in = int(v[1]), l.out = int(v[2]), l.mid = int(v[3]), l.last = int(v[4]);
    l.stride = int(v[5]), l.dilation = int(v[6]), l.padding = int(v[7]), l.kernel = int(v[8]);
    l.activation = Activation(v[9]), l.mid_activation = Activation(v[10]);
    l.residual = v[11] != 0, l.dense = v[12] != 0, l.align_corners = v[13] != 0;
    l.arithmetic = int(v[14]);
    const int wanted_inputs = l.op == Op::feature_fusion ? 2 : 1;
    bool edges = bins >= 0 && (inputs == 0 || inputs == wanted_inputs);
    if (edges) {
      l.input_count = int(inputs);
      for (int64_t i = 0; i < inputs; i++) {
        l.inputs[i] = int(v[kFields + i]) - 1;
        edges &= l.inputs[i] < int(layers.size());
      }
    }
    if (!edges)
      throw std::invalid_argument("layer " + index + " of op " + std::to_string(v[0]) +
                                  " must read " + std::to_string(wanted_inputs) +
                                  " of the picture and the layers before it");
    l.bin_count = int(bins);
    for (int64_t b = 0; b < bins; b++) l.bins[b] = int(v[kFields + inputs + b]);
    const bool known = v[0] <= int(Op::upsample_classify) && v[9] <= 2 && v[10] <= 2;
    const bool pyramid = l.op == Op::pyramid_pooling;
    const bool needs_mid = pyramid || l.op == Op::inverted_residual || l.op == Op::feature_fusion;
    bool sound = l.in >= 1 && l.out >= 1 && (l.mid >= 1 || !needs_mid) &&
                 (l.last == 0 || l.op == Op::dsconv) && (l.stride == 1 || l.stride == 2) &&
                 l.dilation >= 1 && l.dilation <= kFarthest && l.padding <= 1 &&
                 (l.kernel == 1 || l.kernel == 3) &&
                 (l.op != Op::stem_conv || (l.in <= 4 && l.stride == 2)) &&
                 (!l.residual || (l.stride == 1 && l.in == l.out)) && pyramid == (bins > 0);
    for (int b = 0; b < l.bin_count; b++) sound &= l.bins[b] >= 1 && l.bins[b] <= kFarthest;
    if (!known || !sound)
      throw std::invalid_argument("program must hold layers as encode() writes them, got layer " +
                                  index + " of op " + std::to_string(v[0]));
    layers.push_back(l);
  }
  return layers;
}

// How a layer of a program computes whose weights are packed for `arithmetic`.
inline Arithmetic arithmetic_of(const Layer& l, Arithmetic arithmetic) {
  const Arithmetic own = l.arithmetic ? Arithmetic(l.arithmetic - 1) : arithmetic;
  if ((l.op == Op::stem_conv && record_of(own).stem != own) ||
      (l.op == Op::upsample_classify && record_of(own).upsample != own))
    throw std::invalid_argument(
        std::string(l.op == Op::stem_conv ? "stem_conv" : "upsample_classify") +
        " has no kernels in arithmetic " + record_of(own).name +
        ", its layer must name another (float32)");
  return own;
}

inline uint64_t hash(const Program& program) {
  uint64_t h = 0xcbf29ce484222325u;  // FNV-1a over the integers
  for (int64_t v : program) h = (h ^ uint64_t(v)) * 0x100000001b3u;
  return h;
}

inline Tag make_tag(const Program& program, Arithmetic arithmetic, size_t bytes) {
  return {kMagic, kVersion, kLayoutCpu, uint32_t(arithmetic), hash(program), bytes};
}

// The arithmetic that the weights are packed for.
inline Arithmetic check_tag(const Program& program, const void* weights, size_t bytes) {
  Tag tag{};
  if (bytes >= sizeof(Tag)) std::memcpy(&tag, weights, sizeof(Tag));
  if (tag.magic != kMagic)
    throw std::invalid_argument("weights must be packed by pack(), got an untagged tensor of " +
                                std::to_string(bytes) + " bytes");
  if (tag.version != kVersion || tag.layout != kLayoutCpu)
    throw std::invalid_argument(
        "weights must have the cpu backend's layout " + std::to_string(kLayoutCpu) +
        " of version " + std::to_string(kVersion) + ", got layout " + std::to_string(tag.layout) +
        ", version " + std::to_string(tag.version));
  if (tag.arithmetic >= uint32_t(kArithmetics))
    throw std::invalid_argument("weights must be packed for " + arithmetic_names() +
                                ", got arithmetic number " + std::to_string(tag.arithmetic));
  if (tag.program != hash(program) || tag.bytes != bytes)
    throw std::invalid_argument(
        "weights must be packed for these layers, got weights of other layers");
  return Arithmetic(tag.arithmetic);
}

}  // namespace fastscnn
