// Whether memory holds what it held: a hash of 64 bits.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastscnn {

struct Piece {
  uint64_t address, bytes;
};

// The same for the same pieces with the same contents in the same order; others agree by chance
// alone, about once in 2^64.
uint64_t fingerprint(const Piece* pieces, size_t count);

}  // namespace fastscnn
