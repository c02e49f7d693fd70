// pyramid_pooling: adaptive average pools, a 1x1 + ReLU each, resize, concat, out-convolution +
// act.
//
// Neither the concatenation nor a resized grid exists: the out-convolution commutes with the resize
// tap by tap, so each branch's share of a tap is computed on its grid, and the resize is one more
// operand of the out-convolution (convolution.cuh). Three launches, every sum in a fixed order:
// 1. a thread has a vector of channels of one row and bin: sums over the bin's columns;
// 2. a block has a cell and a tap: sums over the cell's rows, mean, 1x1 + ReLU, share of the tap;
// 3. a block has a tile of pixels: out-convolution of x and of the grids.
// The first two are small, and short of threads rather than of arithmetic: no tensor cores.
#include "arguments.cuh"
#include "bins.cuh"
#include "convolution.cuh"

namespace fastscnn::cuda {
namespace {

constexpr int kThreads = 128;

// x (H, W, channels) -> sums (H, cells of one row of all grids, channels) over each cell's columns,
// row block % H of image block / H.
template <class T>
__global__ void __launch_bounds__(kThreads)
    row_sums_kernel(const T* x, float* __restrict__ sums, int height, int width, int channels,
                    int row_cells, int64_t bins, int64_t x_image, int x_pixel) {
  wait_for_launches_before();
  const int vectors = channels / kPerVector<T>;
  const int item = blockIdx.y * kThreads + threadIdx.x;
  if (item >= row_cells * vectors) return;
  const int c = item % vectors * kPerVector<T>;
  const RowCell cell(bins, item / vectors);
  x += int64_t{blockIdx.x / height} * x_image + int64_t{blockIdx.x % height} * width * x_pixel + c;
  sums += (int64_t{blockIdx.x} * row_cells + item / vectors) * channels + c;
  float2 total[kPerVector<T> / 2] = {};
  const int end = end_of(cell.column, cell.bins, width);
#pragma unroll 8
  for (int z = begin_of(cell.column, cell.bins, width); z < end; ++z) {
    const uint4 vector = *reinterpret_cast<const uint4*>(x + int64_t{z} * x_pixel);
    T values[kPerVector<T>];
    std::memcpy(static_cast<void*>(values), &vector, sizeof vector);
#pragma unroll
    for (int i = 0; i < kPerVector<T> / 2; ++i) {
      const float2 value = load_pair(values + 2 * i);
      total[i] = {total[i].x + value.x, total[i].y + value.y};
    }
  }
#pragma unroll
  for (int i = 0; i < kPerVector<T> / 2; i += 2) {
    *reinterpret_cast<float4*>(sums + 2 * i) =
        make_float4(total[i].x, total[i].y, total[i + 1].x, total[i + 1].y);
  }
}

// sums (H, row_cells, channels) -> shares (taps, cells, row) of cell block % cells of image
// block / cells, one tap.
template <class T>
__global__ void __launch_bounds__(kThreads)
    grids_kernel(const float* sums, const T* __restrict__ branch_weight,
                 const float* __restrict__ branch_bias, const T* __restrict__ grid_weight,
                 T* __restrict__ shares, int height, int width, int channels, int mid, int columns,
                 int taps, int cells, int row_cells, int64_t bins) {
  // Shared memory: the cell's means, the 1x1's partial sums, its result.
  float* const means = reinterpret_cast<float*>(shared_memory());
  const int parts = mid < kThreads ? kThreads / mid : 1;
  float* const partial = means + channels;
  float* const result = partial + parts * mid;
  const int64_t image = blockIdx.x / cells;
  const int number = blockIdx.x % cells, tap = blockIdx.y;
  const Cell cell(bins, number);
  const int top = begin_of(cell.row, cell.bins, height);
  const int rows = end_of(cell.row, cell.bins, height) - top;
  const int across =
      end_of(cell.column, cell.bins, width) - begin_of(cell.column, cell.bins, width);
  const float area = float(rows) * float(across);

  wait_for_launches_before();
#pragma unroll 1
  for (int c = threadIdx.x; c < channels; c += kThreads) {
    const float* from = sums + ((image * height + top) * row_cells + cell.row_cell) * channels + c;
    float total = 0;
#pragma unroll 8
    for (int y = 0; y < rows; ++y) total += from[int64_t{y} * row_cells * channels];
    means[c] = to_float(rounded<T>(total / area));
  }
  __syncthreads();

  branch_weight += int64_t{cell.branch} * channels * mid;
#pragma unroll 1
  for (int i = threadIdx.x; i < parts * mid; i += kThreads) {
    const int m = i % mid;
    float total = 0;
#pragma unroll 8
    for (int k = i / mid; k < channels; k += parts) {
      total = fmaf(means[k], to_float(branch_weight[int64_t{k} * mid + m]), total);
    }
    partial[i] = total;
  }
  __syncthreads();
#pragma unroll 1
  for (int m = threadIdx.x; m < mid; m += kThreads) {
    float total = branch_bias[cell.branch * mid + m];
    for (int part = 0; part < parts; ++part) total += partial[part * mid + m];
    result[m] = to_float(rounded<T>(bounded(total, 0, INFINITY)));
  }
  __syncthreads();

  grid_weight += (int64_t{cell.branch} * taps + tap) * mid * columns;
  shares += ((image * taps + tap) * cells + number) * columns;
#pragma unroll 1
  for (int o = threadIdx.x; o < columns; o += kThreads) {
    float total = 0;
#pragma unroll 8
    for (int m = 0; m < mid; ++m) {
      total = fmaf(result[m], to_float(grid_weight[int64_t{m} * columns + o]), total);
    }
    shares[o] = rounded<T>(total);
  }
}

template <class T>
void run(const fastscnn_pyramid_pooling& op, fastscnn_stream stream) {
  const Grids grids(op);
  const int channels = computed_channels(op.in_channels), columns = padded_columns(op.out_channels);
  const int mid = power_of_two(computed_channels(op.mid_channels));
  if (grids.cells) {
    const int64_t items = int64_t{grids.row_cells} * (channels / kPerVector<T>);
    const Shape rows{op.images * op.height, kThreads, 0, divided_up(items, kThreads)};
    FASTSCNN_LAUNCH((row_sums_kernel<T>), rows, stream, op.x, op.sums, op.height, op.width,
                    channels, grids.row_cells, grids.bins, op.x_image, op.x_pixel);
    const size_t floats = channels + (mid < kThreads ? kThreads : mid) + mid;
    const Shape blocks{op.images * grids.cells, kThreads, floats * sizeof(float), grids.taps};
    stream = after(stream);
    FASTSCNN_LAUNCH((grids_kernel<T>), blocks, stream, op.sums, op.branch_weight, op.branch_bias,
                    op.grid_weight, op.shares, op.height, op.width, channels, mid, columns,
                    grids.taps, grids.cells, grids.row_cells, grids.bins);
  }
  Convolution out{op.in_channels, op.out_channels, op.kernel,    op.activation,
                  op.images,      op.height,       op.width,     op.x_image,
                  op.x_pixel,     op.out_image,    op.out_pixel, op.x,
                  op.out_weight,  op.out_bias,     op.out};
  out.bins = grids.bins;
  out.cells = grids.cells;
  out.shares = op.shares;
  out.align_corners = op.align_corners;
  convolve<T>(out, stream);
}

}  // namespace
}  // namespace fastscnn::cuda

int fastscnn_cuda_pyramid_pooling(const fastscnn_pyramid_pooling* op, fastscnn_stream stream) {
  namespace fc = fastscnn::cuda;
  return fc::status_of([&] {
    const fc::Arguments rules(op->type, op->images, op->activation);
    rules.pyramid(*op);
    if (op->branches) {
      rules.aligned("branch_weight", op->branch_weight);
      rules.aligned("branch_bias", op->branch_bias);
      rules.aligned("grid_weight", op->grid_weight);
      rules.aligned("sums", op->sums);
      rules.aligned("shares", op->shares);
    }
    rules.aligned("out_weight", op->out_weight);
    rules.aligned("out_bias", op->out_bias);
    fc::with_type(op->type, [&](auto element) { fc::run<decltype(element)>(*op, stream); });
  });
}

void fastscnn_cuda_pyramid_pooling_scratch(const fastscnn_pyramid_pooling* op, size_t* sums,
                                           size_t* shares) {
  namespace fc = fastscnn::cuda;
  *sums = *shares = 0;
  fc::status_of([&] {  // the op says what is wrong
    const fc::Arguments rules(op->type, op->images);
    rules.channels("in_channels", op->in_channels);
    rules.channels("out_channels", op->out_channels);
    rules.at_least(1, "height", op->height);
    const fc::Grids grids(*op);
    const size_t element = op->type == FASTSCNN_FLOAT32 ? 4 : 2, images = op->images;
    *sums = images * op->height * grids.row_cells * fc::computed_channels(op->in_channels) *
            sizeof(float);
    *shares = images * grids.taps * grids.cells * fc::padded_columns(op->out_channels) * element;
  });
}
