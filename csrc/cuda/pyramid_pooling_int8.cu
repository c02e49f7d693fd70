// pyramid_pooling in int8: adaptive average pools, a 1x1 each, resize, concat, out-convolution,
// bytes each.
//
// The concatenation exists nowhere: the out-convolution resizes the branches' grids where it
// multiplies them (convolution_int8.cuh). Three launches, of integers alone but for the means:
// 1. a thread has 16 channels of one row and bin: sums over the bin's columns;
// 2. a block has a cell: sums over the cell's rows, means, 1x1;
// 3. a block has a tile of pixels: out-convolution of x and of the grids.
// The first two are small, and short of threads rather than of arithmetic: no tensor cores.
#include "arguments.cuh"
#include "bins.cuh"
#include "convolution_int8.cuh"

namespace fastscnn::cuda {
namespace {

constexpr int kThreads = 128;

// x (H, W, terms) -> sums (H, cells of one row of all grids, terms) over each cell's columns, row
// block % H of image block / H.
__global__ void __launch_bounds__(kThreads)
    row_sums_int8_kernel(const Byte* x, int* __restrict__ sums, int height, int width, int terms,
                         int row_cells, int64_t bins, int64_t x_image, int x_pixel) {
  wait_for_launches_before();
  const int vectors = terms / kVector;
  const int item = blockIdx.y * kThreads + threadIdx.x;
  if (item >= row_cells * vectors) return;
  const int c = item % vectors * kVector;
  const RowCell cell(bins, item / vectors);
  x += int64_t{blockIdx.x / height} * x_image + int64_t{blockIdx.x % height} * width * x_pixel + c;
  sums += (int64_t{blockIdx.x} * row_cells + item / vectors) * terms + c;
  uint32_t total[4][4] = {};
  const int end = end_of(cell.column, cell.bins, width);
#pragma unroll 4
  for (int z = begin_of(cell.column, cell.bins, width); z < end; ++z) {
    const uint4 vector = *reinterpret_cast<const uint4*>(x + int64_t{z} * x_pixel);
    const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) total[i][k] = add_dot4(words[i], 1u << 8 * k, total[i][k]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    *reinterpret_cast<uint4*>(sums + 4 * i) =
        make_uint4(total[i][0], total[i][1], total[i][2], total[i][3]);
  }
}

// sums (H, row_cells, terms) -> grids (cells, mid) of cell block % cells of image block / cells.
__global__ void __launch_bounds__(kThreads)
    grids_int8_kernel(const int* sums, const Byte* __restrict__ branch_weight,
                      const int* __restrict__ branch_bias,
                      const float* __restrict__ branch_multiplier,
                      const int* __restrict__ branch_zero, Byte* __restrict__ grids, int height,
                      int width, int terms, int mid, int cells, int row_cells, int64_t bins) {
  // Shared memory: the cell's means as factors; of each mid channel the parts' sums.
  Byte* const means = shared_memory();
  int* const partial = reinterpret_cast<int*>(means + terms);
  const int64_t image = blockIdx.x / cells;
  const int number = blockIdx.x % cells;
  const Cell cell(bins, number);
  const int top = begin_of(cell.row, cell.bins, height);
  const int rows = end_of(cell.row, cell.bins, height) - top;
  const int across =
      end_of(cell.column, cell.bins, width) - begin_of(cell.column, cell.bins, width);
  const float share = 1.0f / float(int64_t{rows} * across);

  wait_for_launches_before();
  const Rounding unmoved(0);
#pragma unroll 1
  for (int c = 4 * threadIdx.x; c < terms; c += 4 * kThreads) {
    const int* from = sums + ((image * height + top) * row_cells + cell.row_cell) * terms + c;
    int64_t total[4] = {};
#pragma unroll 4
    for (int y = 0; y < rows; ++y) {
      const int4 four = *reinterpret_cast<const int4*>(from + int64_t{y} * row_cells * terms);
      total[0] += four.x, total[1] += four.y, total[2] += four.z, total[3] += four.w;
    }
    int mean[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) mean[k] = unmoved(__fmul_rn(float(total[k]), share));
    *reinterpret_cast<uint32_t*>(means + c) =
        factors(saturated(mean[0], mean[1], mean[2], mean[3]));
  }
  __syncthreads();

  const int parts = mid < kThreads ? kThreads / mid : 1;
  branch_weight += int64_t{cell.branch} * mid * terms;
#pragma unroll 1
  for (int i = threadIdx.x; i < parts * mid; i += kThreads) {
    const int part = i % parts, m = i / parts;
    int total = 0;
#pragma unroll 2
    for (int c = part * kVector; c < terms; c += parts * kVector) {
      const uint4 a = *reinterpret_cast<const uint4*>(means + c);
      const uint4 b = *reinterpret_cast<const uint4*>(branch_weight + int64_t{m} * terms + c);
      total = add_dot4(int(a.x), int(b.x), total);
      total = add_dot4(int(a.y), int(b.y), total);
      total = add_dot4(int(a.z), int(b.z), total);
      total = add_dot4(int(a.w), int(b.w), total);
    }
    partial[part * mid + m] = total;
  }
  __syncthreads();
  const Rounding rounding(branch_zero[cell.branch]);
#pragma unroll 1
  for (int m = 4 * threadIdx.x; m < mid; m += 4 * kThreads) {
    const int at = cell.branch * mid + m;
    const int4 bias = *reinterpret_cast<const int4*>(branch_bias + at);
    int total[4] = {bias.x, bias.y, bias.z, bias.w};
    for (int part = 0; part < parts; ++part) {
      const int4 more = *reinterpret_cast<const int4*>(partial + part * mid + m);
      total[0] += more.x, total[1] += more.y, total[2] += more.z, total[3] += more.w;
    }
    const float4 multiplier = *reinterpret_cast<const float4*>(branch_multiplier + at);
    *reinterpret_cast<uint32_t*>(grids + (image * cells + number) * mid + m) =
        requantised(make_int4(total[0], total[1], total[2], total[3]), multiplier, rounding);
  }
}

void run(const fastscnn_pyramid_pooling_int8& op, fastscnn_stream stream) {
  const Grids grids(op);
  const int terms = padded_terms(op.in_channels);
  const int mid = power_of_two(padded_terms(op.mid_channels));
  if (grids.cells) {
    const int64_t items = int64_t{grids.row_cells} * (terms / kVector);
    const Shape rows{op.images * op.height, kThreads, 0, divided_up(items, kThreads)};
    FASTSCNN_LAUNCH((row_sums_int8_kernel), rows, stream, op.x, op.sums, op.height, op.width, terms,
                    grids.row_cells, grids.bins, op.x_image, op.x_pixel);
    stream = after(stream);
    const size_t shared = terms + (mid < kThreads ? kThreads : mid) * sizeof(int);
    const Shape blocks{op.images * grids.cells, kThreads, shared};
    FASTSCNN_LAUNCH((grids_int8_kernel), blocks, stream, op.sums, op.branch_weight, op.branch_bias,
                    op.branch_multiplier, op.branch_zero, op.grids, op.height, op.width, terms, mid,
                    grids.cells, grids.row_cells, grids.bins);
    stream = after(stream);
  }
  IntegerConvolution out{
      op.in_channels, op.out_channels,   op.kernel,    op.images,     op.height, op.width,
      op.x_image,     op.x_pixel,        op.out_image, op.out_pixel,  op.x,      op.out_weight,
      op.out_bias,    op.out_multiplier, op.out_zero,  op.input_zero, op.out};
  out.grid_channels = op.branches * mid;
  out.mid = mid;
  out.bins = grids.bins;
  out.grid_image = int64_t{grids.cells} * mid;
  out.grid_pixel = mid;
  out.grids = op.grids;
  out.grid_weight = op.grid_weight;
  out.align_corners = op.align_corners;
  convolve(out, stream);
}

}  // namespace
}  // namespace fastscnn::cuda

int fastscnn_cuda_pyramid_pooling_int8(const fastscnn_pyramid_pooling_int8* op,
                                       fastscnn_stream stream) {
  namespace fc = fastscnn::cuda;
  return fc::status_of([&] {
    const fc::Arguments rules(op->images);
    rules.pyramid(*op);
    if (op->branches) {
      rules.aligned("branch_weight", op->branch_weight);
      rules.aligned("branch_bias", op->branch_bias);
      rules.aligned("branch_multiplier", op->branch_multiplier);
      rules.aligned("branch_zero", op->branch_zero);
      rules.aligned("grid_weight", op->grid_weight);
      rules.aligned("sums", op->sums);
      rules.aligned("grids", op->grids);
    }
    rules.aligned("out_weight", op->out_weight);
    rules.aligned("out_bias", op->out_bias);
    rules.aligned("out_multiplier", op->out_multiplier);
    rules.aligned("out_zero", op->out_zero);
    rules.aligned("input_zero", op->input_zero);
    fc::run(*op, stream);
  });
}
