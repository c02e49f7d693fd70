// pyramid_pooling: adaptive average pools, a 1x1 + ReLU each, resize, concat, out-convolution +
// act.
//
// Three launches without atomics, so that a result never depends on the order of blocks: sums of
// each row over every bin's columns; of each grid cell the sum over its rows, the mean, the 1x1 and
// the cell's shares of the out-convolution; and that convolution itself, convolution.cuh.
#include "convolution.cuh"

namespace fastscnn::cuda {
namespace {

constexpr int kThreads = 256;

// The bins of a branch: bytes of one integer, the first branch's lowest.
__device__ __forceinline__ int bins_of(int64_t bins, int branch) {
  return int(bins >> (8 * branch) & 255);
}

// x (H, W, channels) -> sums (H, bins of all branches, channels) over each bin's columns. A block
// owns 64 bytes of channels of a row; its threads take columns in turns, and their sums are added
// in a fixed order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    row_sums_kernel(const T* __restrict__ x, float* __restrict__ sums, int height, int width,
                    int channels, int branches, int64_t bins, int row_cells, int64_t x_image,
                    int x_pixel) {
  constexpr int kPairs = 32 / int(sizeof(T)), kGroups = kThreads / kPairs;
  float2* const partial = reinterpret_cast<float2*>(shared_memory());
  const int64_t image = blockIdx.x / height;
  const int row = blockIdx.x % height;
  const int pair = threadIdx.x % kPairs, group = threadIdx.x / kPairs;
  const int c = blockIdx.y * 2 * kPairs + 2 * pair;
  const bool exists = c < channels;
  x += image * x_image + int64_t{row} * width * x_pixel + c;
  sums += (image * height + row) * row_cells * channels + c;
  for (int branch = 0, cell = 0; branch < branches; ++branch) {
    const int count = bins_of(bins, branch);
    for (int bin = 0; bin < count; ++bin, ++cell) {
      const int begin = int(int64_t{bin} * width / count);
      const int end = int(divided_up(int64_t{bin + 1} * width, count));
      float2 sum{0, 0};
      if (exists) {
#pragma unroll 4
        for (int column = begin + group; column < end; column += kGroups) {
          const float2 value = load_pair(x + int64_t{column} * x_pixel);
          sum = {sum.x + value.x, sum.y + value.y};
        }
      }
      partial[threadIdx.x] = sum;
      __syncthreads();
      if (group == 0 && exists) {
        for (int other = 1; other < kGroups; ++other) {
          const float2 value = partial[other * kPairs + pair];
          sum = {sum.x + value.x, sum.y + value.y};
        }
        store_pair(sums + int64_t{cell} * channels, sum);
      }
      __syncthreads();
    }
  }
}

// sums -> shares (taps, cells, columns) of the out-convolution. A block owns a cell: its mean,
// rounded to T, its 1x1 (threads share the terms of each sum, whose parts are added in a fixed
// order), and its product with every tap.
template <class T>
__global__ void __launch_bounds__(kThreads)
    grids_kernel(const float* __restrict__ sums, const T* __restrict__ branch_weight,
                 const float* __restrict__ branch_bias, const T* __restrict__ grid_weight,
                 T* __restrict__ shares, int height, int width, int channels, int mid_columns,
                 int columns, int taps, int cells, int64_t bins, int row_cells) {
  float* const pooled = reinterpret_cast<float*>(shared_memory());
  float* const mid = pooled + channels;
  float* const partial = mid + mid_columns;
  const int64_t image = blockIdx.x / cells;
  const int cell = blockIdx.x % cells;
  int branch = 0, within = cell, row_cell = 0, count = bins_of(bins, 0);
  while (within >= count * count) {
    within -= count * count;
    row_cell += count;
    count = bins_of(bins, ++branch);
  }
  const int i = within / count, j = within % count;
  const int top = int(int64_t{i} * height / count);
  const int bottom = int(divided_up(int64_t{i + 1} * height, count));
  const int across = int(divided_up(int64_t{j + 1} * width, count) - int64_t{j} * width / count);
  const float area = float(bottom - top) * float(across);
  sums += (image * height * row_cells + row_cell + j) * channels;
  for (int c = threadIdx.x; c < channels; c += kThreads) {
    float sum = 0;
#pragma unroll 4
    for (int y = top; y < bottom; ++y) sum += sums[int64_t{y} * row_cells * channels + c];
    pooled[c] = to_float(rounded<T>(sum / area));
  }
  __syncthreads();

  branch_weight += int64_t{branch} * channels * mid_columns;
  const int side = mid_columns < kThreads ? mid_columns : kThreads, parts = kThreads / side;
  const int part = threadIdx.x / side;
  for (int m = threadIdx.x % side; m < mid_columns; m += side) {
    float sum = 0;
#pragma unroll 4
    for (int c = part; c < channels; c += parts) {
      sum = fmaf(pooled[c], to_float(branch_weight[int64_t{c} * mid_columns + m]), sum);
    }
    partial[part * mid_columns + m] = sum;
  }
  __syncthreads();
  for (int m = threadIdx.x; m < mid_columns; m += kThreads) {
    float sum = branch_bias[branch * mid_columns + m];
    for (int other = 0; other < parts; ++other) sum += partial[other * mid_columns + m];
    mid[m] = to_float(rounded<T>(bounded(sum, 0, INFINITY)));
  }
  __syncthreads();

  grid_weight += int64_t{branch} * taps * mid_columns * columns;
  shares += (image * taps * cells + cell) * columns;
  for (int i = threadIdx.x; i < taps * columns; i += kThreads) {
    const int tap = i / columns, o = i % columns;
    const T* const weight = grid_weight + int64_t{tap} * mid_columns * columns + o;
    float sum = 0;
#pragma unroll 4
    for (int m = 0; m < mid_columns; ++m) {
      sum = fmaf(mid[m], to_float(weight[int64_t{m} * columns]), sum);
    }
    shares[int64_t{tap} * cells * columns + o] = rounded<T>(sum);
  }
}

// What depends on the bins.
struct Grids {
  int64_t bins = 0;
  int row_cells = 0, cells = 0;

  explicit Grids(const fastscnn_pyramid_pooling& op) {
    require(op.branches >= 1 && op.branches <= FASTSCNN_MOST_BINS, "branches must be 1 to 8",
            op.branches);
    for (int branch = 0; branch < op.branches; ++branch) {
      const int count = op.bins[branch];
      require(count >= 1 && count <= 255, "bins must be from 1 to 255", count);
      bins |= int64_t{count} << (8 * branch);
      row_cells += count;
      cells += count * count;
    }
  }
};

int taps_of(const fastscnn_pyramid_pooling& op) { return op.kernel * op.kernel; }

template <class T>
void run(const fastscnn_pyramid_pooling& op, fastscnn_stream stream) {
  const Grids grids(op);
  const int channels = padded(op.in_channels), taps = taps_of(op);
  const int mid_columns = power_of_two(padded(op.mid_channels));
  const int columns = padded_columns(op.out_channels);
  constexpr int kChannels = 64 / int(sizeof(T));  // of a block
  const Shape rows{op.images * op.height, kThreads, kThreads * sizeof(float2),
                   divided_up(channels, kChannels)};
  FASTSCNN_LAUNCH((row_sums_kernel<T>), rows, stream, op.x, op.sums, op.height, op.width, channels,
                  op.branches, grids.bins, grids.row_cells, op.x_image, op.x_pixel);
  const int most = mid_columns < kThreads ? kThreads : mid_columns;
  const Shape cells{op.images * grids.cells, kThreads,
                    (channels + mid_columns + most) * sizeof(float)};
  FASTSCNN_LAUNCH((grids_kernel<T>), cells, stream, op.sums, op.branch_weight, op.branch_bias,
                  op.grid_weight, op.shares, op.height, op.width, channels, mid_columns, columns,
                  taps, grids.cells, grids.bins, grids.row_cells);
  convolve<T>({op.x, op.out_weight, op.out_bias, op.shares, op.out, op.in_channels, op.out_channels,
               op.kernel, bounds_of(op.activation), op.images, op.height, op.width, op.x_image,
               op.x_pixel, op.out_image, op.out_pixel, grids.cells, grids.bins, op.align_corners},
              stream);
}

}  // namespace
}  // namespace fastscnn::cuda

int fastscnn_cuda_pyramid_pooling(const fastscnn_pyramid_pooling* op, fastscnn_stream stream) {
  namespace fc = fastscnn::cuda;
  return fc::status_of([&] {
    fc::require(op->kernel == 1 || op->kernel == 3, "kernel must be 1 or 3", op->kernel);
    fc::with_type(op->type, [&](auto element) { fc::run<decltype(element)>(*op, stream); });
  });
}

void fastscnn_cuda_pyramid_pooling_scratch(const fastscnn_pyramid_pooling* op, size_t* sums,
                                           size_t* shares) {
  namespace fc = fastscnn::cuda;
  size_t row_cells = 0, cells = 0;
  for (int branch = 0; branch < op->branches && branch < FASTSCNN_MOST_BINS; ++branch) {
    row_cells += size_t(op->bins[branch]);
    cells += size_t(op->bins[branch]) * size_t(op->bins[branch]);
  }
  const size_t element = op->type == FASTSCNN_FLOAT32 ? 4 : 2;
  *sums = size_t(op->images * op->height) * row_cells * fc::padded(op->in_channels) * sizeof(float);
  *shares = size_t(op->images) * fc::taps_of(*op) * cells * fc::padded_columns(op->out_channels) *
            element;
}
