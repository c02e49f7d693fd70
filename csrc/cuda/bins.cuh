// Bins of adaptive average pools and the grids of their cells; all branches' bins are a byte each
// of one number.
#pragma once

#include "elements.cuh"

namespace fastscnn::cuda {

// Where bin `at` of up to 255 `bins` begins, of a side of up to 2^21; it ends where the next would,
// rounded up.
__device__ __forceinline__ int begin_of(uint32_t at, uint32_t bins, uint32_t size) {
  return int(at * size / bins);
}
__device__ __forceinline__ int end_of(uint32_t at, uint32_t bins, uint32_t size) {
  return int(divided_up((at + 1) * size, bins));
}

// One of the cells of all branches' grids, which follow each other.
struct Cell {
  int branch, bins, row, column;
  int row_cell;  // of those of one row of all grids, sum(bins)

  __device__ Cell(int64_t all_bins, int cell) : branch(0), bins(int(all_bins & 255)), row_cell(0) {
    while (cell >= bins * bins) {
      cell -= bins * bins;
      row_cell += bins;
      bins = int(all_bins >> 8 * ++branch & 255);
    }
    row = cell / bins;
    column = cell % bins;
    row_cell += column;
  }

  __device__ __forceinline__ void advance(int64_t all_bins) {
    if (++column < bins) return;
    column = 0;
    if (++row < bins) return;
    row = 0;
    if (++branch < FASTSCNN_MOST_BINS) bins = int(all_bins >> 8 * branch & 255);
  }
};

// One of the cells of a row of all grids.
struct RowCell {
  int bins, column;

  __device__ __forceinline__ RowCell(int64_t all_bins, int cell)
      : bins(int(all_bins & 255)), column(cell) {
    for (int branch = 0; column >= bins;) {
      column -= bins;
      bins = int(all_bins >> 8 * ++branch & 255);
    }
  }
};

// Of a pyramid, all branches' grids: their cells follow each other.
struct Grids {
  int64_t bins = 0;  // a byte each
  int row_cells = 0, cells = 0, taps;

  template <class Op>
  explicit Grids(const Op& op) : taps(op.kernel * op.kernel) {
    require(op.branches >= 0 && op.branches <= FASTSCNN_MOST_BINS,
            "there must be at most 8 branches", op.branches);
    uint64_t packed = 0;
    for (int branch = 0; branch < op.branches; ++branch) {
      const int b = op.bins[branch];
      require(b >= 1 && b <= 255, "bins must be from 1 to 255", b);
      packed |= uint64_t(b) << 8 * branch;
      row_cells += b;
      cells += b * b;
    }
    bins = int64_t(packed);
  }
};

}  // namespace fastscnn::cuda
