// Sums that several blocks share, where one block a tile would leave most of a GPU idle: each takes
// a slice of what is summed up, and the one that arrives last adds all slices' sums in the slices'
// order, so that the result is the same whichever that is.
//
// One way for all architectures: partial sums pass through global memory (L2), a counter a tile
// says who is last. Counters are zero before a launch, and after it.
#pragma once

#include "product.cuh"

namespace fastscnn::cuda {

// How many slices let the busiest of so many multiprocessors end first, in instructions a warp as
// counted for the network's layers on sm_90: of a block, of each chunk that it sums up, of giving
// its sums away; and of each slice's sums for the last.
inline int fewest_instructions(int64_t tiles, int chunks, int processors) {
  constexpr int64_t kBlock = 240, kChunk = 260, kGive = 30, kTake = 30;
  constexpr int kMostSlices = 16;
  int best = 1;
  int64_t least = INT64_MAX;
  for (int slices = 1; slices <= kMostSlices && slices <= chunks; ++slices) {
    const int own = divided_up(chunks, slices);
    if (divided_up(chunks, own) != slices) continue;
    const int64_t block = kBlock + own * kChunk + (slices > 1 ? kGive : 0);
    const int64_t blocks = (tiles * slices + processors - 1) / processors;
    const int64_t all = blocks * block + (slices > 1 ? slices * kTake : 0);
    if (all < least) best = slices, least = all;
  }
  return best;
}

// The float4 that each of a block's Threads keeps, and the tile's counter, are its share of
// `partials`, (tiles, slices, Rows Columns, Threads), and of `counters`, (tiles). Returns whether
// the block is the last: then `total` is the tile's. `word` is shared memory.
template <int Threads, int Rows, int Columns>
__device__ __forceinline__ bool sum_slices(Accumulator<Rows, Columns>& total, float4* partials,
                                           int* counters, int64_t tile, int slice, int slices,
                                           int* word) {
  constexpr int kVectors = Rows * Columns;
  float4* const first = partials + tile * slices * (kVectors * Threads) + threadIdx.x;
  float4* const own = first + slice * (kVectors * Threads);
#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
    const float* v = total.v[n / Columns][n % Columns];
    store_for_others(own + n * Threads, make_float4(v[0], v[1], v[2], v[3]));
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
    const float4* const theirs = first + from * (kVectors * Threads);
#pragma unroll
    for (int n = 0; n < kVectors; ++n) {
      const float4 more = load_from_others(theirs + n * Threads);
      float* v = total.v[n / Columns][n % Columns];
      v[0] = from ? v[0] + more.x : more.x;
      v[1] = from ? v[1] + more.y : more.y;
      v[2] = from ? v[2] + more.z : more.z;
      v[3] = from ? v[3] + more.w : more.w;
    }
  }
  return true;
}

}  // namespace fastscnn::cuda
