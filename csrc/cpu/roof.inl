// What the arithmetic's products can reach at most: the instruction that gemm.inl or gemm_amx*.inl
// multiplies with, on registers alone. Returns the floating-point operations done.
#if FASTSCNN_ARITHMETIC == FASTSCNN_INT8 && FASTSCNN_AMX
static double roof(int64_t iterations) {
  const Tiles tiles;
  static constexpr uint8_t zeros[kTile * kTileBytes] = {};
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, zeros, kTileBytes);
  _tile_loadd(6, zeros, kTileBytes);
  for (int64_t i = 0; i < iterations; i++) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 6);
    _tile_dpbusd(2, 4, 6);
    _tile_dpbusd(3, 4, 6);
  }
  return 2.0 * 4 * kTile * kTile * kTileBytes * double(iterations);
}
#elif FASTSCNN_ARITHMETIC == FASTSCNN_INT8
static double roof(int64_t iterations) {
  using B = WideBytes;
  constexpr int kChains = kLanes == 16 ? 24 : 12;
  volatile int32_t memory = 0x01010101;
  B::ints chains[kChains];
  for (B::ints& chain : chains) chain = B::fours(memory);
  const B::ints factor = B::fours(memory);
  for (int64_t i = 0; i < iterations; i++) {
#pragma GCC unroll 24
    for (B::ints& chain : chains) chain = B::multiply_add(factor, factor, chain);
  }
  B::ints sum = chains[0];
  for (int c = 1; c < kChains; c++) sum = B::add(sum, chains[c]);
  int32_t sums[kLanes];
  B::store(sums, sum);
  memory = sums[0];
  return 2.0 * B::kChannels * kChains * double(iterations);
}
#elif FASTSCNN_AMX
static double roof(int64_t iterations) {
  const Tiles tiles;
  begin<2, 2>(nullptr);
  static constexpr bf16 zeros[2 * kTile * kTileDepth] = {};
  load_a<2, 2>(zeros, kTileDepth);
  load_b<2>(zeros, kTileElements);
  for (int64_t i = 0; i < iterations; i++) multiply_add<2, 2>();
  constexpr int kProducts = FASTSCNN_ARITHMETIC == FASTSCNN_HIGH ? 3 : 1;  // for one of floats
  return 2.0 * 4 * kTile * kTileElements / kProducts * double(iterations);
}
#else
static double roof(int64_t iterations) {
  // Enough independent chains to hide the latency: 4 cycles, 2 a cycle; of 32 and of 16 registers.
  constexpr int kChains = kLanes == 16 ? 24 : 12;
  // Through volatile memory: the compiler may neither foresee the values nor find chains equal.
  volatile float memory = 0.75f;
  vf chains[kChains];
  for (vf& chain : chains) chain = splat(memory);
#if FASTSCNN_BF16
  const vi factor = (vi)splat(memory);
  constexpr int kProducts = 2 * kLanes;
  auto step = [&](vf& chain) { chain = multiply_add_units(factor, factor, chain); };
#else
  const vf half = splat(0.5f);  // x / 2 + 1/2 tends to 1: no overflow, no denormals
  constexpr int kProducts = kLanes;
  auto step = [&](vf& chain) { chain = fma(chain, half, half); };
#endif
  for (int64_t i = 0; i < iterations; i++) {
#pragma GCC unroll 24
    for (vf& chain : chains) step(chain);
  }
  vf sum = chains[0];
  for (int c = 1; c < kChains; c++) sum += chains[c];
  memory = sum[0];
  return 2.0 * kProducts * kChains * double(iterations);
}
#endif
