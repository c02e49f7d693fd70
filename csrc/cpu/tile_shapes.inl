// The shapes of AMX tiles.
// GCC's tile intrinsics do not say what memory they read: stores before them must stay before them.
FASTSCNN_INLINE void settle() { asm volatile("" ::: "memory"); }

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int rows_, int bytes_) {
    rows[tile] = uint8_t(rows_), bytes[tile] = uint16_t(bytes_);
  }
  void load() const {
    settle();
    _tile_loadconfig(this);
  }
};
