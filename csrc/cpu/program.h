// From the package's integers to layers, and the tag of packed weights.
#pragma once
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine.h"

namespace fastscnn {

constexpr uint32_t kMagic = 0x4E435346;  // "FSCN"
constexpr uint32_t kVersion = 1;
// The tag's layout of weights packed for this backend: kLayoutCpu + the arithmetic (layer.h, Gemm).
constexpr uint32_t kLayoutCpu = 1;

// The encoding of plan.py's Layer.encode(): a length, then that many values, per layer.
inline std::vector<Layer> decode(const Program& program) {
  constexpr size_t kFields = 14;
  constexpr int kFarthest = 1 << 10;  // of dilation and bins: squared, and times channels, an int
  std::vector<Layer> layers;
  for (size_t at = 0; at < program.size(); at += 1 + size_t(program[at])) {
    const int64_t length = program[at];
    const int64_t bins = length - int64_t(kFields);
    if (bins > kMaxBins)
      throw std::invalid_argument("pyramid_bins must be at most " + std::to_string(kMaxBins) +
                                  " values, got " + std::to_string(bins));
    if (bins < 0 || at + size_t(length) >= program.size())
      throw std::invalid_argument("program must hold whole layers, got a layer of length " +
                                  std::to_string(length));
    const int64_t* v = &program[at + 1];
    for (int64_t i = 0; i < length; i++)
      if (v[i] < 0 || v[i] > (1 << 20))
        throw std::invalid_argument("program must hold values from 0 to 2^20, got " +
                                    std::to_string(v[i]));
    Layer l{};
    l.op = Op(v[0]);
    l.in = int(v[1]), l.out = int(v[2]), l.mid = int(v[3]), l.last = int(v[4]);
    l.stride = int(v[5]), l.dilation = int(v[6]), l.padding = int(v[7]), l.kernel = int(v[8]);
    l.activation = Activation(v[9]), l.mid_activation = Activation(v[10]);
    l.residual = v[11] != 0, l.dense = v[12] != 0, l.align_corners = v[13] != 0;
    l.bin_count = int(bins);
    for (int64_t b = 0; b < bins; b++) l.bins[b] = int(v[kFields + b]);
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
      throw std::invalid_argument("program must hold layers as plan.py encodes them, got layer " +
                                  std::to_string(layers.size()) + " of op " + std::to_string(v[0]));
    layers.push_back(l);
  }
  return layers;
}

inline uint64_t hash(const Program& program) {
  uint64_t h = 0xcbf29ce484222325u;  // FNV-1a over the integers
  for (int64_t v : program) h = (h ^ uint64_t(v)) * 0x100000001b3u;
  return h;
}

inline Tag make_tag(const Program& program, Arithmetic arithmetic, size_t bytes) {
  return {kMagic, kVersion, kLayoutCpu + uint32_t(arithmetic), 0, hash(program), bytes};
}

// The arithmetic that the weights are packed for.
inline Arithmetic check_tag(const Program& program, const void* weights, size_t bytes) {
  Tag tag{};
  if (bytes >= sizeof(Tag)) std::memcpy(&tag, weights, sizeof(Tag));
  if (tag.magic != kMagic)
    throw std::invalid_argument("weights must be packed by pack(), got an untagged tensor of " +
                                std::to_string(bytes) + " bytes");
  if (tag.version != kVersion || tag.layout < kLayoutCpu ||
      tag.layout >= kLayoutCpu + uint32_t(kArithmetics))
    throw std::invalid_argument(
        "weights must have a layout of the cpu backend (version " + std::to_string(kVersion) +
        "), got layout " + std::to_string(tag.layout) + ", version " + std::to_string(tag.version));
  if (tag.program != hash(program) || tag.bytes != bytes)
    throw std::invalid_argument(
        "weights must be packed for these layers, got weights of other layers");
  return Arithmetic(tag.layout - kLayoutCpu);
}

}  // namespace fastscnn
