// What every product in AMX tiles needs; shape_tiles(pixels) is its own.
// Tiles can be used while this lives.
struct Tiles {
  Tiles() { shape_tiles(kTile); }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};
