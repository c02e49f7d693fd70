// Sums that several blocks share, where one block a tile would leave most of a GPU idle: each takes
// a slice of what is summed up, and the one that arrives last adds all slices' sums in the slices'
// order, so that the result is the same whichever that is.
//
// One way for all architectures: partial sums pass through global memory (L2), a counter a tile
// says who is last. Counters are zero before a launch, and after it.
#pragma once

#include "product.cuh"

namespace fastscnn::cuda {

// Instructions a warp as counted for the network's layers on sm_90: of a block, of each chunk that
// it sums up, of giving its sums away; and of each slice's sums for the last.
struct Counted {
  int64_t block, chunk, give, take;
};

// How many slices let the busiest of so many multiprocessors end first.
inline int fewest_instructions(int64_t tiles, int chunks, int processors, const Counted& counted) {
  constexpr int kMostSlices = 16;
  int best = 1;
  int64_t least = INT64_MAX;
  for (int slices = 1; slices <= kMostSlices && slices <= chunks; ++slices) {
    const int own = divided_up(chunks, slices);
    if (divided_up(chunks, own) != slices) continue;
    const int64_t block = counted.block + own * counted.chunk + (slices > 1 ? counted.give : 0);
    const int64_t blocks = (tiles * slices + processors - 1) / processors;
    const int64_t all = blocks * block + (slices > 1 ? slices * counted.take : 0);
    if (all < least) best = slices, least = all;
  }
  return best;
}

// Four sums of a lane in memory.
__device__ __forceinline__ float4 four_of(const float* v) {
  return make_float4(v[0], v[1], v[2], v[3]);
}
__device__ __forceinline__ int4 four_of(const int* v) { return make_int4(v[0], v[1], v[2], v[3]); }

// The 16 bytes that each of a block's Threads keeps, and the tile's counter, are its share of
// `partials`, (tiles, slices, Rows Columns, Threads), and of `counters`, (tiles). Returns whether
// the block is the last: then `total` is the tile's. `word` is shared memory.
template <int Threads, template <int, int> class Tile, int Rows, int Columns, class Four>
__device__ __forceinline__ bool sum_slices(Tile<Rows, Columns>& total, Four* partials,
                                           int* counters, int64_t tile, int slice, int slices,
                                           int* word) {
  constexpr int kVectors = Rows * Columns;
  Four* const first = partials + tile * slices * (kVectors * Threads) + threadIdx.x;
  Four* const own = first + slice * (kVectors * Threads);
#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
    store_for_others(own + n * Threads, four_of(total.v[n / Columns][n % Columns]));
  }
  publish();
  __syncthreads();
  if (threadIdx.x == 0) *word = arrive(counters + tile);
  __syncthreads();
  if (*word != slices - 1) return false;
  publish();
  if (threadIdx.x == 0) counters[tile] = 0;
#pragma unroll 4
  for (int from = 0; from < slices; ++from) {
    const Four* const theirs = first + from * (kVectors * Threads);
#pragma unroll
    for (int n = 0; n < kVectors; ++n) {
      const Four more = load_from_others(theirs + n * Threads);
      auto* const v = total.v[n / Columns][n % Columns];
      v[0] = from ? v[0] + more.x : more.x;
      v[1] = from ? v[1] + more.y : more.y;
      v[2] = from ? v[2] + more.z : more.z;
      v[3] = from ? v[3] + more.w : more.w;
    }
  }
  return true;
}

}  // namespace fastscnn::cuda
