// stem_conv: 3x3 + bias + act from a picture of any strides, of floats or of raw uint8 that are
// normalised on the way.
//
// A block owns a tile of pixels and 32 output channels. It reads the tile's halo once, along
// whichever axis is contiguous, and keeps it as (rows, columns, channels): a pixel's terms are then
// three runs of 9, which a thread joins to a row of the product's left matrix.
#include "arguments.cuh"
#include "product.cuh"

namespace fastscnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kAcross = 32;               // pixels of a tile's row
constexpr int kRows = 8;                  // rows of a tile
constexpr int kPixels = kRows * kAcross;  // one a thread
constexpr int kColumns = 32;              // output channels
constexpr int kChunk = 32;                // terms, (ky, kx, c), of a product
constexpr int kMostNormalised = 4;        // channels that scale and shift have
static_assert(kPixels == kThreads);

// Sizes for these Channels at Stride; 0 for what is known only at run time, when a thread reads its
// pixel's terms from global memory, a chunk after the other.
template <class T, int Channels, int Stride>
struct Sizes {
  static constexpr bool kStaged = Channels != 0;
  static constexpr int kTerms = 9 * Channels;
  static constexpr int kHaloRows = (kRows - 1) * Stride + 3;
  static constexpr int kHaloColumns = (kAcross - 1) * Stride + 3;
  static constexpr int kLine = kHaloColumns * Channels;  // elements of a halo's row
  // Before and after a line what its first and last vector reach beyond it.
  static constexpr int kPadding = rounded_up(4 * Channels, 2);
  static constexpr int kHaloPitch = rounded_up(kLine + 1, 2) + 2 * kPadding;
  static_assert(!kStaged || (kTerms <= kChunk && Stride * Channels % 2 == 0));
  // FFMA counts every term; tensor cores count 16 at a time.
  static constexpr int kDepth = kStaged && sizeof(T) == 4 ? rounded_up(kTerms, 2) : kChunk;

  // Shared memory in elements: the terms, afterwards the result; the weights; the halo.
  static constexpr int kLeft = kPixels * pitch<T>(kChunk);
  static constexpr int kRight = kChunk * pitch<T>(kColumns);
  static constexpr int kHalo = kStaged ? kHaloRows * kHaloPitch : 0;
  static constexpr size_t kShared = (kLeft + kRight + kHalo) * sizeof(T);
};

// A picture's pixels as T; outside of the picture all are zero.
template <class T, class X>
struct Picture {
  static constexpr bool kRaw = sizeof(X) == 1;
  const X* x;
  const float *scale, *shift;
  int height, width;
  int64_t channel, row, column;  // strides

  __device__ __forceinline__ T converted(X value, int c) const {
    if constexpr (kRaw) {
      return rounded<T>(fmaf(float(value), scale[c], shift[c]));
    } else {
      return value;
    }
  }
  __device__ __forceinline__ T at(int c, int y, int z) const {
    const bool inside = y >= 0 && y < height && z >= 0 && z < width;
    return inside ? converted(x[c * channel + y * row + z * column], c) : rounded<T>(0);
  }
};

// The halo whose first pixel is (top, start), from lines of adjacent elements: rows of Interleaved
// channels, or rows of each channel's plane. A line is covered by aligned vectors of four, of which
// the first and the last may reach into the line's padding; a vector that leaves the picture is
// read element by element. A thread has the same vector of several lines.
template <bool Interleaved, class T, class X, int Channels, int Stride>
__device__ __forceinline__ void load_lines(T* halo, const Picture<T, X>& picture, int top,
                                           int start) {
  using S = Sizes<T, Channels, Stride>;
  using Four = Vector<X, 4>;
  constexpr int kStep = Interleaved ? 1 : Channels;
  constexpr int kLines = kStep * S::kHaloRows, kLength = S::kLine / kStep;
  constexpr int kVectors = divided_up(kLength + 3, 4), kPass = kThreads / kVectors;
  static_assert(S::kPadding >= 3 * kStep && S::kPadding >= (4 * kVectors - kLength) * kStep);
  const int first = start * (Channels / kStep), end = picture.width * (Channels / kStep);
  const int vector = threadIdx.x % kVectors * 4;
#pragma unroll 1
  for (int line = threadIdx.x / kVectors; line < kLines; line += kPass) {
    if (threadIdx.x >= kPass * kVectors) break;
    const int plane = Interleaved ? 0 : line / S::kHaloRows, row = line - plane * S::kHaloRows;
    const int y = top + row;
    const bool exists = y >= 0 && y < picture.height;
    const X* const from =
        picture.x + plane * picture.channel + (exists ? y : 0) * picture.row + first;
    const int skew = int(reinterpret_cast<uintptr_t>(from) / sizeof(X) % 4);
    const int within = vector - skew, e = first + within;
    T values[4];
    const auto convert = [&](int j, X value) {
      const int c = Interleaved ? (within + 4 * Channels + j) % Channels : plane;
      values[j] = picture.converted(value, c);
    };
    if (exists && e >= 0 && e + 4 <= end) {
      const Four four = *reinterpret_cast<const Four*>(from + within);
#pragma unroll
      for (int j = 0; j < 4; ++j) convert(j, four.v[j]);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        values[j] = rounded<T>(0);
        if (exists && e + j >= 0 && e + j < end) convert(j, from[within + j]);
      }
    }
    // From the padding on, so that no offset is negative.
    T* const to =
        kept_at(halo - S::kPadding, S::kPadding + row * S::kHaloPitch + within * kStep + plane);
#pragma unroll
    for (int j = 0; j < 4; ++j) to[j * kStep] = values[j];
  }
}

// The same from a picture of any strides.
template <class T, class X, int Channels, int Stride>
__device__ __forceinline__ void load_halo(T* halo, const Picture<T, X>& picture, int top,
                                          int start) {
  using S = Sizes<T, Channels, Stride>;
  if (picture.channel == 1 && picture.column == Channels) {
    return load_lines<true, T, X, Channels, Stride>(halo, picture, top, start);
  }
  if (picture.column == 1) {
    return load_lines<false, T, X, Channels, Stride>(halo, picture, top, start);
  }
  const bool down = picture.row < picture.column;
  const int fast = down ? S::kHaloRows : S::kHaloColumns;
#pragma unroll 1
  for (int i = threadIdx.x; i < S::kHaloRows * S::kLine; i += kThreads) {
    const int c = i % Channels, pixel = i / Channels;
    const int row = down ? pixel % fast : pixel / fast, column = down ? pixel / fast : pixel % fast;
    halo[row * S::kHaloPitch + column * Channels + c] = picture.at(c, top + row, start + column);
  }
}

// A pixel's terms from the halo to its row of the left matrix. Pixels next to each other read
// 3 words apart (float: 6), and pitch() sets their vectors apart: no two lanes meet in a bank.
template <class T, int Channels, int Stride>
__device__ __forceinline__ void join_terms(T* left, const T* halo) {
  using S = Sizes<T, Channels, Stride>;
  constexpr int kRun = 3 * Channels;
  Vector<T, kPerVector<T>> terms[kChunk / kPerVector<T>]{};
#pragma unroll
  for (int k = 0; k < kRun; k += 2) {
#pragma unroll
    for (int ky = 0; ky < 3; ++ky) {
      const auto pair = *reinterpret_cast<const Vector<T, 2>*>(halo + ky * S::kHaloPitch + k);
#pragma unroll
      for (int j = 0; j < 2 && k + j < kRun; ++j) {
        const int term = ky * kRun + k + j;
        terms[term / kPerVector<T>].v[term % kPerVector<T>] = pair.v[j];
      }
    }
  }
#pragma unroll
  for (int v = 0; v < kChunk / kPerVector<T>; ++v) copy_16(left + v * kPerVector<T>, terms[v].v);
}

// x (channels, H, W) -> 32 channels of out (H', W', out_channels), a tile of image block / (tiles
// down and across).
template <class T, class X, int Channels, int Stride>
__global__ void __launch_bounds__(kThreads, Channels ? 3 : 2)
    stem_conv_kernel(const X* x, const T* __restrict__ weight, const float* __restrict__ bias,
                     const float* __restrict__ scale, const float* __restrict__ shift,
                     T* __restrict__ out, int height, int width, int out_height, int out_width,
                     int tiles_down, int tiles_across, int channels, int out_channels, int stride,
                     int padding, float low, float high, int64_t x_image, int64_t x_channel,
                     int64_t x_row, int64_t x_column, int64_t out_image, int out_pixel) {
  using S = Sizes<T, Channels, Stride>;
  using Product = Shares<kPixels, kColumns, kWarps>;
  if (Channels) channels = Channels;
  const int row_pitch = padded_columns(out_channels), rows = power_of_two(9 * channels);
  T* const left = reinterpret_cast<T*>(shared_memory());
  T* const right = left + S::kLeft;

  const int across = blockIdx.x % tiles_across, down = blockIdx.x / tiles_across % tiles_down;
  const int64_t image = blockIdx.x / tiles_across / tiles_down;
  const int top = down * kRows, start = across * kAcross, first = blockIdx.y * kColumns;
  const int row = threadIdx.x / kAcross, column = threadIdx.x % kAcross;
  T* const mine = left + threadIdx.x * pitch<T>(kChunk);
  const Picture<T, X> picture{x + image * x_image, scale, shift,   height, width,
                              x_channel,           x_row, x_column};
  out += image * out_image;

  typename Product::Tile total;
  const auto start_total = [&] {
    const int own = first + Product::column();
    total.start(bias + own, row_pitch - own);
  };
  const auto queue = [&](int chunk) {
    copy_matrix<kChunk, kColumns, pitch<T>(kColumns), kThreads>(
        right, weight + int64_t{chunk} * kChunk * row_pitch + first, row_pitch,
        rows - chunk * kChunk, row_pitch - first);
    async_commit();
  };
  const auto multiply_chunk = [&] {
    async_wait<0>();
    __syncthreads();
    multiply<S::kDepth, pitch<T>(kChunk), pitch<T>(kColumns)>(
        total, left + Product::row() * pitch<T>(kChunk), right + Product::column());
    __syncthreads();
  };
  if constexpr (S::kStaged) {
    T* const halo = right + S::kRight + S::kPadding;
    queue(0);
    wait_for_launches_before();
    load_halo<T, X, Channels, Stride>(halo, picture, top * Stride - padding,
                                      start * Stride - padding);
    start_total();
    __syncthreads();
    join_terms<T, Channels, Stride>(
        mine, halo + row * Stride * S::kHaloPitch + column * Stride * Channels);
    multiply_chunk();
  } else {
    const int y = (top + row) * stride - padding, z = (start + column) * stride - padding;
    int c = 0, tap = 0;
    start_total();
    wait_for_launches_before();
#pragma unroll 1
    for (int chunk = 0; chunk * kChunk < 9 * channels; ++chunk) {
      queue(chunk);
#pragma unroll 1
      for (int k = 0; k < kChunk; ++k) {
        mine[k] = tap < 9 ? picture.at(c, y + tap / 3, z + tap % 3) : rounded<T>(0);
        if (++c == channels) c = 0, ++tap;
      }
      multiply_chunk();
    }
  }

  const Clamp<T> clamp(low, high);
  total.for_each([&](int row, int column, float2& pair) {
    put(left + (Product::row() + row) * pitch<T>(kColumns) + Product::column() + column,
        clamp(pair));
  });
  __syncthreads();
  store_tile<kRows, kAcross, kColumns, pitch<T>(kColumns), kThreads>(
      out + (int64_t{top} * out_width + start) * out_pixel + first, left,
      int64_t{out_width} * out_pixel, out_pixel, out_height - top, out_width - start,
      out_channels - first);
}

template <class T, class X, int Channels, int Stride>
void run(const fastscnn_stem_conv& op, fastscnn_stream stream) {
  using S = Sizes<T, Channels, Stride>;
  const Bounds end = bounds_of(op.activation);
  const int out_channels = computed_channels(op.out_channels);
  const int64_t tiles_down = divided_up(op.out_height, kRows);
  const int64_t tiles_across = divided_up(op.out_width, kAcross);
  const Shape shape{op.images * tiles_down * tiles_across, kThreads, S::kShared,
                    divided_up(out_channels, kColumns)};
  FASTSCNN_LAUNCH((stem_conv_kernel<T, X, Channels, Stride>), shape, stream, op.x, op.weight,
                  op.bias, op.scale, op.shift, op.out, op.height, op.width, op.out_height,
                  op.out_width, tiles_down, tiles_across, op.channels, out_channels, op.stride,
                  op.padding, end.low, end.high, op.x_image, op.x_channel, op.x_row, op.x_column,
                  op.out_image, op.out_pixel);
}

template <class T, class X>
void select(const fastscnn_stem_conv& op, fastscnn_stream stream) {
  if (op.channels == 3 && op.stride == 2) return run<T, X, 3, 2>(op, stream);
  run<T, X, 0, 0>(op, stream);
}

}  // namespace
}  // namespace fastscnn::cuda

int fastscnn_cuda_stem_conv(const fastscnn_stem_conv* op, fastscnn_stream stream) {
  namespace fc = fastscnn::cuda;
  return fc::status_of([&] {
    const fc::Arguments rules(op->type, op->images, op->activation);
    rules.channels("channels", op->channels);
    rules.channels("out_channels", op->out_channels);
    rules.at_least(1, "stride", op->stride);
    rules.at_least(0, "padding", op->padding);
    rules.side("height", op->height, op->out_height, op->stride, op->padding, 1);
    rules.side("width", op->width, op->out_width, op->stride, op->padding, 1);
    rules.aligned("weight", op->weight);
    rules.aligned("bias", op->bias);
    rules.result(op->out, op->out_channels, op->out_height, op->out_width, op->out_image,
                 op->out_pixel);
    fc::require(op->x_type == op->type || op->x_type == FASTSCNN_UINT8,
                "x_type must be type or uint8", op->x_type);
    rules.present("x", op->x, op->x_type);
    if (op->x_type == FASTSCNN_UINT8) {
      fc::require(op->channels <= fc::kMostNormalised, "channels of uint8 must be at most 4",
                  op->channels);
      rules.present("scale", op->scale, FASTSCNN_FLOAT32);
      rules.present("shift", op->shift, FASTSCNN_FLOAT32);
    }
    fc::with_type(op->type, [&](auto element) {
      using T = decltype(element);
      if (op->x_type == FASTSCNN_UINT8) return fc::select<T, uint8_t>(*op, stream);
      fc::select<T, T>(*op, stream);
    });
  });
}
