// x -> act(conv(x) + bias), 1x1 or 3x3 at stride 1; and, tap by tap, of what grids of pooled cells
// would be after a bilinear resize, from their shares: grids times weights, in cells.
//
// A block owns 64 consecutive pixels of an image and 64 output channels: the pictures are small,
// and more blocks end sooner than larger ones. It walks one product of depth
// taps (channels + cells), 64 bytes of each pixel a step: x as it lies, zeros outside the image;
// then each cell's weight in the resize. The operands arrive kStages - 1 steps ahead, one 16-byte
// vector of either a thread and step.
#pragma once

#include "bins.cuh"
#include "product.cuh"

namespace fastscnn::cuda {

// `kernel` x `kernel`, 1 or 3, over x (images, height, width, channels). With cells, `bins` has a
// byte for each branch, whose grid has bins^2 cells, and `shares` are (images, taps, cells,
// padded_columns(out_channels)).
struct Convolution {
  int in_channels, out_channels, kernel, activation;
  int64_t images, height, width, x_image, x_pixel, out_image, out_pixel;
  const void *x, *weight, *bias;
  void* out;
  int64_t bins = 0, cells = 0;
  const void* shares = nullptr;
  bool align_corners = false;
};

namespace {

constexpr int kConvolutionThreads = 256;
constexpr int kConvolutionPixels = 64;
constexpr int kConvolutionColumns = 64;
constexpr int kConvolutionStages = 4;

// Shared memory in elements.
template <class T>
struct ConvolutionSizes {
  static constexpr int kChunk = 64 / int(sizeof(T));  // channels or cells of a step
  static constexpr int kLeft = kConvolutionPixels * pitch<T>(kChunk);
  static constexpr int kRight = kChunk * pitch<T>(kConvolutionColumns);
  static constexpr int kStage = kLeft + kRight;
  static constexpr size_t kBytes = kConvolutionStages * kStage * sizeof(T);
  static_assert(kConvolutionPixels * pitch<T>(kConvolutionColumns) <= kConvolutionStages * kStage);
};

// One side of a resize, seen from the grid: the weight of index `at` of `bins` in pixel i of
// `size`.
struct Hats {
  int shift, divisor;  // shift is 0 where corners are aligned
  float inverse;

  __device__ Hats(int size, bool align_corners)
      : shift(align_corners ? 0 : size),
        divisor(!align_corners ? 2 * size
                : size > 1     ? size - 1
                               : 1),
        inverse(1.0f / float(divisor)) {}

  __device__ __forceinline__ float weight(int i, int at, int bins) const {
    const int last = (bins - 1) * divisor;
    int sample = shift ? (2 * i + 1) * bins - shift : i * (bins - 1);
    sample = sample < 0 ? 0 : sample > last ? last : sample;
    const int distance = abs(sample - at * divisor);
    return distance < divisor ? 1 - float(distance) * inverse : 0.0f;
  }
};

// x (H, W, In), shares (taps, cells, Out's row) -> out (H, W, Out) of image block / tiles; 0 for
// channels that are known only at run time.
template <class T, int In, int Out>
__global__ void __launch_bounds__(kConvolutionThreads, 2)
    convolution_kernel(const T* x, const T* __restrict__ weight, const float* __restrict__ bias,
                       const T* shares, T* __restrict__ out, int height, int width, int tiles,
                       int in_channels, int out_channels, int kernel, int cells, int64_t bins,
                       int align_corners, float low, float high, int64_t x_image, int x_pixel,
                       int64_t out_image, int out_pixel) {
  using S = ConvolutionSizes<T>;
  using Product = Shares<kConvolutionPixels, kConvolutionColumns, kConvolutionThreads / 32>;
  constexpr int kChunk = S::kChunk, kStages = kConvolutionStages;
  constexpr int kLeftPitch = pitch<T>(kChunk), kRightPitch = pitch<T>(kConvolutionColumns);
  constexpr int kVectors = kConvolutionColumns / kPerVector<T>;
  if (In) in_channels = In;
  if (Out) out_channels = Out;
  const int row_pitch = padded_columns(out_channels);
  const int taps = kernel * kernel;
  const int chunks = divided_up(in_channels, kChunk);
  const int chunks_of_tap = chunks + divided_up(cells, kChunk);
  const int first_column = blockIdx.y * kConvolutionColumns;
  T* const memory = reinterpret_cast<T*>(shared_memory());

  const int64_t image = blockIdx.x / tiles;
  const int64_t first_pixel = int64_t{blockIdx.x % tiles} * kConvolutionPixels;
  const int64_t pixels = int64_t{height} * width;
  x += image * x_image;
  out += image * out_image;
  shares += image * taps * cells * row_pitch;

  // What the thread copies each step: a vector of a pixel, and of a row of the right operand. Eight
  // lanes write two pixels whose rows are four apart, and so all banks once.
  static_assert(kConvolutionPixels * kChunk == kConvolutionThreads * kPerVector<T>);
  static_assert(kConvolutionColumns * kChunk == kConvolutionThreads * kPerVector<T>);
  const int lane = threadIdx.x % 32;
  const int pixel = threadIdx.x / 32 * 8 + lane / 4 % 2 * 4 + lane / 8;
  const int within = lane % 4 * kPerVector<T>;
  const int right_row = threadIdx.x / kVectors;
  const int right_column = threadIdx.x % kVectors * kPerVector<T>;
  const bool column_exists = first_column + right_column < row_pitch;
  const bool exists = first_pixel + pixel < pixels;
  const int row = int((first_pixel + pixel) / width), column = int((first_pixel + pixel) % width);
  const Hats down(height, align_corners), across(width, align_corners);

  const auto left = [&](int step) { return memory + step % kStages * S::kStage; };
  const auto right = [&](int step) { return left(step) + S::kLeft; };
  const auto queue = [&](int step) {
    const int tap = step / chunks_of_tap, chunk = step % chunks_of_tap;
    const int y = row + tap / kernel - kernel / 2, z = column + tap % kernel - kernel / 2;
    const bool inside = exists && y >= 0 && y < height && z >= 0 && z < width;
    T* const to = left(step) + pixel * kLeftPitch + within;
    const T* from = weight;
    int k = chunk * kChunk, depth = in_channels;
    if (chunk < chunks) {
      const bool copied = inside && k + within < in_channels;
      async_copy_16(to, copied ? x + (int64_t{y} * width + z) * x_pixel + k + within : x, copied);
    } else {
      k = (chunk - chunks) * kChunk;
      depth = cells;
      from = shares;
      T weights[kPerVector<T>];
      const int first = k + within;
      Cell cell(bins, first < cells ? first : 0);
#pragma unroll
      for (int i = 0; i < kPerVector<T>; ++i) {
        float v = 0;
        if (inside && first + i < cells) {
          v = down.weight(y, cell.row, cell.bins) * across.weight(z, cell.column, cell.bins);
          cell.advance(bins);
        }
        weights[i] = rounded<T>(v);
      }
      uint4 vector;
      std::memcpy(&vector, static_cast<const void*>(weights), sizeof vector);
      *reinterpret_cast<uint4*>(to) = vector;
    }
    const bool copied = column_exists && k + right_row < depth;
    const int64_t at = (int64_t{tap} * depth + k + right_row) * row_pitch;
    async_copy_16(right(step) + right_row * kRightPitch + right_column,
                  copied ? from + at + first_column + right_column : weight, copied);
  };

  typename Product::Tile total;
  const int own_column = first_column + Product::column();
  total.start(bias + own_column, row_pitch - own_column);
  const int steps = taps * chunks_of_tap;
  wait_for_launches_before();
#pragma unroll 1
  for (int step = 1 - kStages; step < steps; ++step) {
    if (step >= 0) {
      async_wait<kStages - 2>();
      __syncthreads();
    }
    if (step + kStages - 1 < steps) queue(step + kStages - 1);
    async_commit();
    if (step < 0) continue;
    multiply<kChunk, kLeftPitch, kRightPitch>(total, left(step) + Product::row() * kLeftPitch,
                                              right(step) + Product::column());
  }

  __syncthreads();
  const Clamp<T> clamp(low, high);
  total.for_each([&](int r, int c, float2& pair) {
    put(memory + (Product::row() + r) * kRightPitch + Product::column() + c, clamp(pair));
  });
  __syncthreads();
  for (int i = threadIdx.x; i < kConvolutionPixels * kVectors; i += kConvolutionThreads) {
    const int p = i / kVectors, c = i % kVectors * kPerVector<T>;
    if (first_pixel + p >= pixels || first_column + c >= out_channels) continue;
    copy_16(out + (first_pixel + p) * out_pixel + first_column + c, memory + p * kRightPitch + c);
  }
}

template <class T, int In, int Out>
void launch_convolution(const Convolution& op, fastscnn_stream stream) {
  const Bounds bounds = bounds_of(op.activation);
  const int in_channels = computed_channels(op.in_channels),
            out_channels = computed_channels(op.out_channels);
  const int64_t tiles = divided_up(op.height * op.width, kConvolutionPixels);
  const Shape shape{op.images * tiles, kConvolutionThreads, ConvolutionSizes<T>::kBytes,
                    divided_up(out_channels, kConvolutionColumns)};
  FASTSCNN_LAUNCH((convolution_kernel<T, In, Out>), shape, stream, op.x, op.weight, op.bias,
                  op.shares, op.out, op.height, op.width, tiles, in_channels, out_channels,
                  op.kernel, op.cells, op.bins, op.align_corners, bounds.low, bounds.high,
                  op.x_image, op.x_pixel, op.out_image, op.out_pixel);
}

// The instantiation for these channels, the general one for others.
template <class T>
void convolve(const Convolution& op, fastscnn_stream stream) {
  require(op.kernel == 1 || op.kernel == 3, "kernel must be 1 or 3", op.kernel);
  if (computed_channels(op.in_channels) == 128 && computed_channels(op.out_channels) == 128) {
    return launch_convolution<T, 128, 128>(op, stream);
  }
  launch_convolution<T, 0, 0>(op, stream);
}

}  // namespace
}  // namespace fastscnn::cuda
