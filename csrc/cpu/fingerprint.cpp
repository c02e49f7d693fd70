#include "fingerprint.h"

#include <cstring>

namespace fastscnn {
namespace {

// A product is awaited for some six cycles, and another can start in each: so many chains at once.
constexpr int kChains = 8;
constexpr size_t kBlock = kChains * 2 * sizeof(uint64_t);

// All 128 bits of the product: its lower half alone would take the highest bits, the floats'
// signs, no further than one place of the next word.
inline uint64_t mix(uint64_t hash, uint64_t first, uint64_t second) {
  __extension__ typedef unsigned __int128 uint128;
  const uint128 product = uint128(hash ^ first) * (second ^ 0x9E3779B97F4A7C15u);
  return uint64_t(product) ^ uint64_t(product >> 64);
}

inline void mix_block(uint64_t (&hash)[kChains], const char* block) {
  for (int i = 0; i < kChains; i++) {
    uint64_t words[2];
    std::memcpy(words, block + i * sizeof words, sizeof words);
    hash[i] = mix(hash[i], words[0], words[1]);
  }
}

}  // namespace

uint64_t fingerprint(const Piece* pieces, size_t count) {
  uint64_t hash[kChains];
  for (int i = 0; i < kChains; i++) hash[i] = 0xD1B54A32D192ED03u * (2 * i + 1);
  for (const Piece* piece = pieces; piece != pieces + count; piece++) {
    const char* at = reinterpret_cast<const char*>(piece->address);
    size_t left = piece->bytes;
    for (; left >= kBlock; at += kBlock, left -= kBlock) mix_block(hash, at);
    if (left == 0) continue;
    char last[kBlock] = {};
    std::memcpy(last, at, left);
    mix_block(hash, last);
  }
  uint64_t all = count;
  for (const uint64_t one : hash) all = mix(all, one, count);
  return all;
}

}  // namespace fastscnn
