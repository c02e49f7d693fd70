// Runs the fused ops on batches: checks, packed weights, threads, scratch memory, choice of
// instruction set. Errors are std::invalid_argument.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace fastscnn {

inline void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

using Program = std::vector<int64_t>;

// The first 64 bytes of packed weights: what they are, so that nothing else is ever read as them.
struct alignas(64) Tag {
  uint32_t magic, version, layout, arithmetic;
  uint64_t program, bytes;
};

// Instruction sets that this processor runs, the best last: all, or those that were compiled with
// kernels of their own for that arithmetic.
std::vector<std::string> instruction_sets();
std::vector<std::string> instruction_sets(Arithmetic);
// By its record's name.
Arithmetic arithmetic_of(const std::string& name);

// What that instruction set runs; throws where this processor does not run it, or where it has
// nothing for the arithmetic.
const Ops& ops_of(const std::string& isa, Arithmetic);
const TrainingKernels& training_kernels_of(const std::string& isa);

// Floating-point operations a second of so many threads that multiply and add in registers alone.
double multiply_add_roof(const std::string& isa, Arithmetic, int threads, double seconds);

// A layer's or a network's plain weights (each tensor of Layer.weights(), in int8 of
// quantised_weights(), in program/layers.py in turn, from a multiple of eight bytes on), their
// packed size, tag included, and their packing. The tag says for which arithmetic.
size_t plain_bytes(const Program&, Arithmetic);
size_t packed_bytes(const Program&, Arithmetic);
void pack(const Program&, Arithmetic, const void* plain, size_t bytes, void* packed);

// Everything that a call has in common.
struct Call {
  std::string isa;
  Program program;
  const void* weights;
  size_t weight_bytes;
  int threads;
};

// A batch of dense channels-last activations, (n, h, w, pixel_pitch(channels)) elements.
struct Batch {
  void* data;
  int n, h, w;
};

void stem_conv(const Call&, const Picture&, Batch out);
void dsconv(const Call&, Batch x, Batch out);
void inverted_residual(const Call&, Batch x, Batch out);
void pyramid_pooling(const Call&, Batch x, Batch out);
void feature_fusion(const Call&, Batch high, Batch low, Batch out);
void upsample_classify(const Call&, Batch x, Output, void* out, int h, int w);
void network(const Call&, const Picture&, Output, void* out);

// The network on one picture, and the seconds that each of its stages took.
using StageTimes = std::vector<std::pair<std::string, double>>;
StageTimes network_stages(const Call&, const Picture&, Output, void* out);

// Bytes that the scratch pool holds.
size_t scratch_bytes();
// Sets every byte of the idle buffers: what scratch holds between calls never matters, as tests
// show.
void fill_scratch(int byte);

}  // namespace fastscnn
