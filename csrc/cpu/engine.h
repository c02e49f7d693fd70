// Runs the fused ops on batches: checks, packed weights, threads, scratch memory, choice of
// instruction set. Errors are std::invalid_argument.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace fastscnn {

using Program = std::vector<int64_t>;

// The first 64 bytes of packed weights: what they are, so that nothing else is ever read as them.
struct alignas(64) Tag {
  uint32_t magic, version, layout, reserved;
  uint64_t program, bytes;
};

// Instruction sets that were compiled and that this processor runs, the best last.
std::vector<std::string> instruction_sets();

// Its kernels; throws where this processor does not run it.
const Kernels& kernels_of(const std::string& isa);

// A layer's or a network's packed size, tag included, and the packing of its plain float weights
// (each tensor of plan.py's Layer.weights() in turn).
size_t packed_bytes(const Program&);
void pack(const Program&, const float* plain, size_t floats, void* packed);

// Everything that a call has in common.
struct Call {
  std::string isa;
  Program program;
  const void* weights;
  size_t weight_bytes;
  int threads;
};

// A batch of dense channels-last activations, (n, h, w, padded(channels)) floats.
struct Batch {
  float* data;
  int n, h, w;
};

void stem_conv(const Call&, const Picture&, Batch out);
void dsconv(const Call&, Batch x, Batch out);
void inverted_residual(const Call&, Batch x, Batch out);
void pyramid_pooling(const Call&, Batch x, Batch out);
void feature_fusion(const Call&, Batch high, Batch low, Batch out);
void upsample_classify(const Call&, Batch x, Output, void* out, int h, int w);
void network(const Call&, const Picture&, Output, void* out);

// How many threads a call may use: one in a forked child, which has none of OpenMP's, and within a
// parallel region.
int allowed_threads(int threads);

// Bytes that the scratch pool holds.
size_t scratch_bytes();
// Sets every byte of the idle buffers: what scratch holds between calls never matters, as tests
// show.
void fill_scratch(int byte);

}  // namespace fastscnn
