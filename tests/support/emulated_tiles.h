// AMX tiles in memory, for processors without them: forced into csrc/cpu/isa_amx.cpp (-include)
// and, as a definition, into engine.cpp. What Intel's manual says of TILELOADD, TILESTORED,
// TDPBF16PS and TDPBUSD, for the shapes that were loaded.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulated_tiles {

struct Shapes {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
inline thread_local Shapes shapes{};
inline thread_local uint8_t tiles[8][16][64];

inline void require(bool holds) {
  if (!holds) std::abort();  // where a processor would raise #UD
}
inline void load_shapes(const void* p) {
  std::memcpy(&shapes, p, sizeof shapes);
  std::memset(tiles, 0, sizeof tiles);
}
inline void load(int tile, const void* base, int64_t stride) {
  require(shapes.palette == 1);
  std::memset(tiles[tile], 0, sizeof tiles[tile]);
  for (int r = 0; r < shapes.rows[tile]; r++)
    std::memcpy(tiles[tile][r], static_cast<const char*>(base) + r * stride, shapes.bytes[tile]);
}
inline void store(int tile, void* base, int64_t stride) {
  require(shapes.palette == 1);
  for (int r = 0; r < shapes.rows[tile]; r++)
    std::memcpy(static_cast<char*>(base) + r * stride, tiles[tile][r], shapes.bytes[tile]);
}
inline void zero(int tile) { std::memset(tiles[tile], 0, sizeof tiles[tile]); }

template <class Sum, class Four>
inline void multiply(int c, int a, int b, Four four) {
  require(shapes.palette == 1 && shapes.rows[c] == shapes.rows[a] &&
          shapes.bytes[a] == 4 * shapes.rows[b] && shapes.bytes[c] == shapes.bytes[b]);
  for (int m = 0; m < shapes.rows[c]; m++)
    for (int n = 0; n < shapes.bytes[c] / 4; n++) {
      Sum sum;
      std::memcpy(&sum, &tiles[c][m][4 * n], 4);
      for (int k = 0; k < shapes.bytes[a] / 4; k++)
        sum = four(sum, &tiles[a][m][4 * k], &tiles[b][k][4 * n]);
      std::memcpy(&tiles[c][m][4 * n], &sum, 4);
    }
}
inline void bytes(int c, int a, int b) {
  multiply<int32_t>(c, a, b, [](int32_t sum, const uint8_t* x, const uint8_t* y) {
    for (int i = 0; i < 4; i++) sum += int32_t(x[i]) * int8_t(y[i]);
    return sum;
  });
}
inline float of_bf16(const uint8_t* p) {
  const uint32_t bits = (uint32_t(p[0]) | uint32_t(p[1]) << 8) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline void halves(int c, int a, int b) {
  multiply<float>(c, a, b, [](float sum, const uint8_t* x, const uint8_t* y) {
    sum += of_bf16(x) * of_bf16(y);
    return sum + of_bf16(x + 2) * of_bf16(y + 2);
  });
}

}  // namespace emulated_tiles

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbusd
#define _tile_loadconfig emulated_tiles::load_shapes
#define _tile_release() (emulated_tiles::shapes = {})
#define _tile_loadd emulated_tiles::load
#define _tile_stored emulated_tiles::store
#define _tile_zero emulated_tiles::zero
#define _tile_dpbf16ps emulated_tiles::halves
#define _tile_dpbusd emulated_tiles::bytes
