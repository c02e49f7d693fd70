// A 1x1 or 3x3 convolution + bias + act as one product over K = taps x channels, to which small
// grids may add.
//
// Concatenating resized grids to x and convolving commutes tap by tap: what a grid cell contributes
// to a tap's outputs (its share) is computed on the grid, and interpolating is a product with a
// matrix of hat functions, made in shared memory. So K grows by taps x cells, and neither a resized
// grid nor a concatenation exists.
#pragma once

#include "product.cuh"

namespace fastscnn::cuda {

struct Convolution {
  const void *x, *weight, *bias,
      *shares;  // shares: (images, taps, cells, columns), if there are cells
  void* out;
  int in_channels, out_channels, side;  // of the kernel: 1 or 3
  Bounds bounds;
  int64_t images, height, width, x_image, x_pixel, out_image, out_pixel;
  int cells;
  int64_t bins;  // of each branch a byte, the first lowest: its grid is bins x bins
  int align_corners;
};

namespace {

constexpr int kConvolutionThreads = 256;

template <class T, int Out>
struct ConvolutionSizes {
  static constexpr int kRows = 4, kAcross = 16;
  static constexpr int kPixels = kRows * kAcross;
  static constexpr int kChunk = 64 / int(sizeof(T));  // channels, or cells
  static constexpr int kColumns = Out ? padded_columns(Out) : 64;
  static constexpr int kLeft = kPixels * pitch<T>(kChunk);
  static constexpr int kStage = kLeft + kChunk * pitch<T>(kColumns);
  static constexpr int kResult = kPixels * pitch<T>(kColumns);
  static constexpr size_t kShared = (2 * kStage > kResult ? 2 * kStage : kResult) * sizeof(T);
};

// The weight with which output `i` of a resize from `bins` to `size` counts the grid's index `at`.
__device__ __forceinline__ float hat(int64_t i, int at, int bins, int size, bool align_corners) {
  const int64_t divisor = align_corners ? (size > 1 ? size - 1 : 1) : 2 * int64_t{size};
  int64_t sample = align_corners ? i * (bins - 1) : (2 * i + 1) * bins - size;
  const int64_t last = (bins - 1) * divisor;
  sample = sample < 0 ? 0 : sample > last ? last : sample;
  const int64_t distance = sample - at * divisor;
  const float weight = 1 - float(distance < 0 ? -distance : distance) / float(divisor);
  return weight > 0 ? weight : 0;
}

// x (H, W, channels) -> out (H, W, channels), a tile of image block / (tiles down and across).
template <class T, int In, int Out>
__global__ void __launch_bounds__(kConvolutionThreads, 2)
    convolution_kernel(const T* __restrict__ x, const T* __restrict__ weight,
                       const float* __restrict__ bias, const T* __restrict__ shares,
                       T* __restrict__ out, int height, int width, int tiles_down, int tiles_across,
                       int in_channels, int out_channels, int side, int cells, int64_t bins,
                       int align_corners, float low, float high, int64_t x_image, int x_pixel,
                       int64_t out_image, int out_pixel) {
  using S = ConvolutionSizes<T, Out>;
  using Product = Shares<S::kPixels, S::kColumns, kConvolutionThreads / 32>;
  if (In) in_channels = In;
  if (Out) out_channels = Out;
  const int row_pitch = padded_columns(out_channels), taps = side * side;
  T* const memory = reinterpret_cast<T*>(shared_memory());
  const auto left = [&](int step) { return memory + step % 2 * S::kStage; };
  const auto right = [&](int step) { return left(step) + S::kLeft; };

  const int across = blockIdx.x % tiles_across, down = blockIdx.x / tiles_across % tiles_down;
  const int64_t image = blockIdx.x / tiles_across / tiles_down;
  const int top = down * S::kRows, start = across * S::kAcross;
  const int o = blockIdx.y * S::kColumns;
  x += image * x_image;
  out += image * out_image;
  shares += image * taps * cells * row_pitch;
  const auto inside = [&](int y, int z) { return y >= 0 && y < height && z >= 0 && z < width; };
  const auto row_of = [&](int pixel, int tap) {
    return top + pixel / S::kAcross + tap / side - side / 2;
  };
  const auto column_of = [&](int pixel, int tap) {
    return start + pixel % S::kAcross + tap % side - side / 2;
  };

  const int chunks = divided_up(in_channels, S::kChunk), steps = taps * chunks;
  const auto queue = [&](int step) {
    const int tap = step / chunks, c0 = step % chunks * S::kChunk;
    constexpr int kVectors = S::kChunk / kPerVector<T>;
#pragma unroll 1
    for (int i = threadIdx.x; i < S::kPixels * kVectors; i += kConvolutionThreads) {
      const int pixel = i / kVectors, within = i % kVectors * kPerVector<T>;
      const int y = row_of(pixel, tap), z = column_of(pixel, tap), c = c0 + within;
      const bool exists = inside(y, z) && c < in_channels;
      async_copy_16(left(step) + pixel * pitch<T>(S::kChunk) + within,
                    exists ? x + (int64_t{y} * width + z) * x_pixel + c : x, exists);
    }
    copy_matrix<S::kChunk, S::kColumns, kConvolutionThreads>(
        right(step), pitch<T>(S::kColumns),
        weight + (int64_t{tap} * in_channels + c0) * row_pitch + o, row_pitch, in_channels - c0,
        row_pitch - o);
  };
  const auto add = [&](typename Product::Tile& total, int step) {
    multiply<S::kChunk>(total, left(step) + Product::row() * pitch<T>(S::kChunk),
                        pitch<T>(S::kChunk), right(step) + Product::column(),
                        pitch<T>(S::kColumns));
  };

  typename Product::Tile total;
  total.start(bias + o + Product::column());
  queue(0);
  async_commit();
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) queue(step + 1);
    async_commit();
    async_wait<1>();
    __syncthreads();
    add(total, step);
    __syncthreads();
  }

  // The grids: a thread has one cell of a chunk throughout.
  const int cell_chunks = divided_up(cells, S::kChunk);
#pragma unroll 1
  for (int step = 0; step < taps * cell_chunks; ++step) {
    const int tap = step / cell_chunks, first = step % cell_chunks * S::kChunk;
    copy_matrix<S::kChunk, S::kColumns, kConvolutionThreads>(
        right(step), pitch<T>(S::kColumns), shares + (int64_t{tap} * cells + first) * row_pitch + o,
        row_pitch, cells - first, row_pitch - o);
    async_commit();
    int within = first + threadIdx.x % S::kChunk, side_of = bins & 255;
    for (int branch = 1; within >= side_of * side_of && branch < 8; ++branch) {
      within -= side_of * side_of;
      side_of = bins >> (8 * branch) & 255;
    }
    const bool is_cell = first + int(threadIdx.x % S::kChunk) < cells;
#pragma unroll 1
    for (int pixel = threadIdx.x / S::kChunk; pixel < S::kPixels;
         pixel += kConvolutionThreads / S::kChunk) {
      const int y = row_of(pixel, tap), z = column_of(pixel, tap);
      float value = 0;
      if (is_cell && inside(y, z)) {
        value = hat(y, within / side_of, side_of, height, align_corners) *
                hat(z, within % side_of, side_of, width, align_corners);
      }
      left(step)[pixel * pitch<T>(S::kChunk) + threadIdx.x % S::kChunk] = rounded<T>(value);
    }
    async_wait<0>();
    __syncthreads();
    add(total, step);
    __syncthreads();
  }

  total.for_each([&](int row, int column, float2& pair) {
    store_pair(memory + (Product::row() + row) * pitch<T>(S::kColumns) + Product::column() + column,
               bounded(pair, low, high));
  });
  __syncthreads();
  constexpr int kVectors = S::kColumns / kPerVector<T>;
  for (int i = threadIdx.x; i < S::kPixels * kVectors; i += kConvolutionThreads) {
    const int pixel = i / kVectors, column = i % kVectors * kPerVector<T>;
    const int y = top + pixel / S::kAcross, z = start + pixel % S::kAcross;
    if (y >= height || z >= width || o + column >= out_channels) continue;
    copy_16(out + (int64_t{y} * width + z) * out_pixel + o + column,
            memory + pixel * pitch<T>(S::kColumns) + column);
  }
}

template <class T, int In, int Out>
void convolve_by(const Convolution& op, fastscnn_stream stream) {
  using S = ConvolutionSizes<T, Out>;
  const int in_channels = padded(op.in_channels), out_channels = padded(op.out_channels);
  const int64_t tiles_down = divided_up(op.height, S::kRows);
  const int64_t tiles_across = divided_up(op.width, S::kAcross);
  const Shape shape{op.images * tiles_down * tiles_across, kConvolutionThreads, S::kShared,
                    divided_up(out_channels, S::kColumns)};
  FASTSCNN_LAUNCH((convolution_kernel<T, In, Out>), shape, stream, op.x, op.weight, op.bias,
                  op.shares, op.out, op.height, op.width, tiles_down, tiles_across, in_channels,
                  out_channels, op.side, op.cells, op.bins, op.align_corners, op.bounds.low,
                  op.bounds.high, op.x_image, op.x_pixel, op.out_image, op.out_pixel);
}

template <class T>
void convolve(const Convolution& op, fastscnn_stream stream) {
  if (padded(op.in_channels) == 128 && padded(op.out_channels) == 128) {
    return convolve_by<T, 128, 128>(op, stream);
  }
  convolve_by<T, 0, 0>(op, stream);
}

}  // namespace
}  // namespace fastscnn::cuda
