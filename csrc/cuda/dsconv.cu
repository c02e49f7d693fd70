// dsconv: depthwise 3x3 + bias [+ act] -> 1x1 + bias + act [-> 1x1 + bias]; the depthwise result
// stays in shared memory.
//
// A block owns a tile of pixels with up to 128 of their output channels (of the last 1x1's 32).
// Chunk by chunk of input channels, 64 bytes of each pixel, the tile's halo and the chunk's rows of
// the 1x1 arrive asynchronously while the chunk before is computed.
#include "arguments.cuh"
#include "depthwise.cuh"
#include "product.cuh"

namespace fastscnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kLastColumns = 32;  // classes that a block computes

// Sizes for In channels, of whose results a block computes Out, at Stride. In is 0 where channels
// are known only at run time. Without a Stride the depthwise reads global memory, whatever its
// stride and dilation.
template <class T, int In, int Out, int Stride>
struct Sizes {
  static constexpr int kAcross = 16;  // pixels of a tile's row
  static constexpr int kRows = 4;     // of 8 the sums would take half of the registers
  static constexpr int kPixels = kRows * kAcross;
  static constexpr int kChunk = 64 / int(sizeof(T));  // input channels
  static constexpr int kChunkPitch = pitch<T>(kChunk);
  static constexpr int kRow = padded_columns(Out);  // of the 1x1's rows
  static constexpr int kRowPitch = pitch<T>(kRow);
  static constexpr int kHaloRows = Stride ? (kRows - 1) * Stride + 3 : 0;
  static constexpr int kHaloColumns = Stride ? (kAcross - 1) * Stride + 3 : 0;
  static constexpr int kStages = In && In <= kChunk ? 1 : 2;
  // A warp sums up 16 kUnit pixels of 8 channels.
  static constexpr int kUnit = kPixels * kChunk / (128 * kWarps);
  using Window = Halo<Stride, kAcross, kChunkPitch>;

  // Shared memory in elements: the halo of each stage, the chunk's rows of the 1x1, the depthwise
  // result.
  static constexpr int kHalo = kHaloRows * kHaloColumns * kChunkPitch;
  static constexpr int kRight = kChunk * kRowPitch;
  static constexpr int kLeft = kPixels * kChunkPitch;
  static constexpr int kPipeline = kStages * kHalo + kRight + kLeft;
  // After the 1x1, in the same memory: its result and the last 1x1's weights.
  static constexpr int kResult = kPixels * kRowPitch;
  static constexpr int kLast = kRow * pitch<T>(kLastColumns);
  static constexpr size_t kPipelineBytes = kPipeline * sizeof(T);
  static constexpr size_t kResultBytes = kResult * sizeof(T);
  static constexpr size_t kLastBytes = (kResult + kLast) * sizeof(T);

  static constexpr size_t kLastShared = kPipelineBytes > kLastBytes ? kPipelineBytes : kLastBytes;
  // After it the sums of the last 1x1, where more than Out channels follow each other.
  static constexpr int kSumsPitch = pitch<float>(kLastColumns);
  static constexpr size_t kSums = kPixels * kSumsPitch * sizeof(float);

  static constexpr size_t shared(bool last, int out_channels) {
    if (last) return kLastShared + (out_channels > Out ? kSums : 0);
    return kPipelineBytes > kResultBytes ? kPipelineBytes : kResultBytes;
  }
};

// What depthwise() does, from global memory, at any stride and dilation: a thread has a vector of
// channels throughout.
template <class T, class S>
__device__ __forceinline__ void depthwise_from_global(const T* x, T* left, const float* weight,
                                                      const float* bias, int channels, int first,
                                                      float low, float high, int top, int start,
                                                      int height, int width, int x_pixel,
                                                      int stride, int dilation) {
  constexpr int kVectors = S::kChunk / kPerVector<T>, kPairs = kPerVector<T> / 2;
  const int within = threadIdx.x % kVectors * kPerVector<T>, c = first + within;
  const bool exists = c < channels;
#pragma unroll 1
  for (int i = threadIdx.x / kVectors; i < S::kPixels; i += kThreads / kVectors) {
    float2 sums[kPairs] = {};
    if (exists) {
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) sums[pair] = load_pair(bias + c + 2 * pair);
#pragma unroll 3
      for (int tap = 0; tap < 9; ++tap) {
        const int y = (top + i / S::kAcross) * stride + (tap / 3 - 1) * dilation;
        const int z = (start + i % S::kAcross) * stride + (tap % 3 - 1) * dilation;
        if (y < 0 || y >= height || z < 0 || z >= width) continue;
        const uint4 vector =
            *reinterpret_cast<const uint4*>(x + (int64_t{y} * width + z) * x_pixel + c);
        T values[kPerVector<T>];
        std::memcpy(static_cast<void*>(values), &vector, sizeof vector);
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
          const float2 one = load_pair(weight + tap * channels + c + 2 * pair);
          sums[pair] = multiply_add(load_pair(values + 2 * pair), one, sums[pair]);
        }
      }
    }
    T results[kPerVector<T>];
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      store_pair(results + 2 * pair, bounded(sums[pair], low, high));
    }
    uint4 vector;
    std::memcpy(&vector, static_cast<const void*>(results), sizeof vector);
    *reinterpret_cast<uint4*>(left + i * S::kChunkPitch + within) = vector;
  }
}

// x (H, W, channels) -> out (H', W', channels or classes), a tile of image block / (tiles down and
// across).
template <class T, int In, int Out, int Stride, bool Last>
__global__ void __launch_bounds__(kThreads, 2)
    dsconv_kernel(const T* x, const float* __restrict__ depthwise_weight,
                  const float* __restrict__ depthwise_bias, const T* __restrict__ pointwise_weight,
                  const float* __restrict__ pointwise_bias, const T* __restrict__ last_weight,
                  const float* __restrict__ last_bias, void* __restrict__ out, int out_is_float,
                  int height, int width, int out_height, int out_width, int tiles_down,
                  int tiles_across, int in_channels, int out_channels, int row_pitch,
                  int last_channels, int last_columns, int stride, int dilation, float mid_low,
                  float mid_high, float low, float high, int64_t x_image, int x_pixel,
                  int64_t out_image, int out_pixel, int64_t out_channel) {
  using S = Sizes<T, In, Out, Stride>;
  using Product = Shares<S::kPixels, Out, kWarps>;
  using LastProduct = Shares<S::kPixels, kLastColumns, kWarps>;
  if (In) in_channels = In;
  if (In) out_channels = Out, row_pitch = S::kRow;
  T* const memory = reinterpret_cast<T*>(shared_memory());
  T* const right = memory + S::kStages * S::kHalo;
  T* const left = right + S::kRight;

  const int across = blockIdx.x % tiles_across, down = blockIdx.x / tiles_across % tiles_down;
  const int64_t image = blockIdx.x / tiles_across / tiles_down;
  const int top = down * S::kRows, start = across * S::kAcross;
  x += image * x_image;
  const int first_class = blockIdx.y * kLastColumns;
  const int first_column = Last ? 0 : blockIdx.y * Out;
  const int end_column = Last ? out_channels : first_column + Out;
  constexpr bool kWhole = In && In % S::kChunk == 0;  // chunks

  const auto queue_right = [&](int chunk, int o) {
    copy_matrix<S::kChunk, S::kRow, S::kRowPitch, kThreads>(
        right, pointwise_weight + int64_t{chunk} * S::kChunk * row_pitch + o, row_pitch,
        kWhole ? S::kChunk : in_channels - chunk * S::kChunk, In ? S::kRow : row_pitch - o);
  };
  queue_right(0, first_column);
  wait_for_launches_before();

  // Four threads have a pixel of the halo, of which they copy a chunk's 64 bytes.
  constexpr int kSharers = 4, kPass = kThreads / kSharers;
  constexpr int kHaloPixels = S::kHaloRows * S::kHaloColumns;
  constexpr int kPasses = divided_up(kHaloPixels, kPass);
  const int within = threadIdx.x % kSharers * kPerVector<T>;
  const T* from[kPasses + 1];
  bool inside[kPasses + 1];
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int pixel = pass * kPass + threadIdx.x / kSharers;
    const int2 in_halo = S::Window::position(pixel);
    const int y = top * Stride + in_halo.x - 1, z = start * Stride + in_halo.y - 1;
    inside[pass] = y >= 0 && y < height && z >= 0 && z < width;
    from[pass] = (inside[pass] ? x + (int64_t{y} * width + z) * x_pixel : x) + within;
  }
  const auto halo = [&](int chunk) { return memory + chunk % S::kStages * S::kHalo; };
  const auto queue_halo = [&](int chunk) {
    T* const to = halo(chunk) + threadIdx.x / kSharers * S::kChunkPitch + within;
    const int c = chunk * S::kChunk;
    const bool exists = kWhole || c + within < in_channels;
    unrolled<kPasses>([&](auto pass) {
      if (pass + 1 == kPasses && kHaloPixels % kPass &&
          threadIdx.x >= kHaloPixels % kPass * kSharers) {
        return;
      }
      async_copy_16<pass * kPass * S::kChunkPitch* int(sizeof(T))>(to, from[pass] + c,
                                                                   exists && inside[pass]);
    });
  };

  const int chunks = divided_up(in_channels, S::kChunk);
  // What this warp sums up.
  constexpr int kUnitsAcross = S::kPixels / (16 * S::kUnit);
  const int unit_channel = threadIdx.x / 32 / kUnitsAcross * 8;
  const int unit_pixel = threadIdx.x / 32 % kUnitsAcross * 16 * S::kUnit;
  const Depthwise<S::kUnit, S::kChunkPitch, false, T, typename S::Window> depthwise({}, unit_pixel);
  const Clamp<T> clamp(mid_low, mid_high), end_clamp(low, high);
  typename LastProduct::Tile result;
  for (int o = first_column; o < end_column; o += Out) {
    queue_halo(0);
    async_commit();
    async_commit();  // of later chunks this group has the rows of the 1x1
    typename Product::Tile total;
    const int own = o + Product::column();
    total.start(pointwise_bias + own, In ? S::kRow : row_pitch - own);
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if (chunk + 1 < chunks) queue_halo(chunk + 1);
      async_commit();
      const int c = chunk * S::kChunk + unit_channel;
      const bool exists = kWhole || c < in_channels;
      const Filter<T> filter(Filter<T>::own(depthwise_weight + (exists ? c : 0)), in_channels);
      async_wait<2>();
      __syncthreads();
      if constexpr (Stride != 0) {
        if (exists) {
          depthwise(halo(chunk) + unit_channel, left + unit_channel, filter, depthwise_bias + c,
                    clamp);
        } else {
          clear<S::kUnit, S::kChunkPitch>(left + unit_pixel * S::kChunkPitch + unit_channel);
        }
      } else {
        depthwise_from_global<T, S>(x, left, depthwise_weight, depthwise_bias, in_channels,
                                    chunk * S::kChunk, mid_low, mid_high, top, start, height, width,
                                    x_pixel, stride, dilation);
      }
      async_wait<1>();
      __syncthreads();
      multiply<S::kChunk, S::kChunkPitch, S::kRowPitch>(
          total, left + Product::row() * S::kChunkPitch, right + Product::column());
      __syncthreads();
      if (chunk + 1 < chunks) queue_right(chunk + 1, o);
      async_commit();
    }

    T* const tile = memory;
    T* const last = memory + S::kResult;
    if constexpr (Last) {
      copy_matrix<S::kRow, kLastColumns, pitch<T>(kLastColumns), kThreads>(
          last, last_weight + int64_t{o} * last_columns + first_class, last_columns,
          In ? S::kRow : row_pitch - o, last_columns - first_class);
      async_commit();
    }
    total.for_each([&](int row, int column, float2& pair) {
      put(tile + (Product::row() + row) * S::kRowPitch + Product::column() + column,
          end_clamp(pair));
    });
    async_wait<0>();
    __syncthreads();
    if constexpr (Last) {
      // A lane's sums of the classes wait in shared memory for what comes of further channels.
      float* const sums = reinterpret_cast<float*>(shared_memory() + S::kLastShared) +
                          LastProduct::row() * S::kSumsPitch + LastProduct::column();
      if (o == 0) {
        const int k = first_class + LastProduct::column();
        result.start(last_bias + k, last_columns - k);
      } else {
        result.for_each([&](int row, int column, float2& pair) {
          pair = load_pair(sums + row * S::kSumsPitch + column);
        });
      }
      multiply<Out, S::kRowPitch, pitch<T>(kLastColumns)>(
          result, tile + LastProduct::row() * S::kRowPitch, last + LastProduct::column());
      if (o + Out < out_channels) {
        result.for_each([&](int row, int column, float2& pair) {
          store_pair(sums + row * S::kSumsPitch + column, pair);
        });
      }
    } else {
      store_tile<S::kRows, S::kAcross, S::kRow, S::kRowPitch, kThreads>(
          static_cast<T*>(out) + image * out_image +
              (int64_t{top} * out_width + start) * out_pixel + o,
          tile, int64_t{out_width} * out_pixel, out_pixel, out_height - top, out_width - start,
          min(out_channels - o, Out));
    }
    __syncthreads();
    if (o + Out < end_column) queue_right(0, o + Out);
  }
  if constexpr (Last) {
    const auto store = [&](auto* first) {
      using Y = std::remove_reference_t<decltype(*first)>;
      result.for_each([&](int row, int column, float2& pair) {
        const int pixel = LastProduct::row() + row;
        const int y = top + pixel / S::kAcross, z = start + pixel % S::kAcross;
        if (y >= out_height || z >= out_width) return;
        Y* const to = first + (int64_t{y} * out_width + z) * out_pixel;
        const int k = first_class + LastProduct::column() + column;
        if (k < last_channels) to[k * out_channel] = rounded<Y>(pair.x);
        if (k + 1 < last_channels) to[(k + 1) * out_channel] = rounded<Y>(pair.y);
      });
    };
    if (out_is_float) {
      store(static_cast<float*>(out) + image * out_image);
    } else {
      store(static_cast<T*>(out) + image * out_image);
    }
  }
}

template <class T, int In, int Out, int Stride, bool Last>
void run(const fastscnn_dsconv& op, fastscnn_stream stream) {
  using S = Sizes<T, In, Out, Stride>;
  const Bounds mid = bounds_of(op.mid_activation), end = bounds_of(op.activation);
  const int in_channels = computed_channels(op.in_channels),
            out_channels = computed_channels(op.out_channels);
  const int last_channels =
      is_interleaved(op) ? computed_channels(op.last_channels) : op.last_channels;
  const int row_pitch = padded_columns(out_channels);
  const int last_columns = Last ? power_of_two(computed_channels(op.last_channels)) : 0;
  const int out_is_float = op.out_type == FASTSCNN_FLOAT32;
  const int64_t tiles_down = divided_up(op.out_height, S::kRows);
  const int64_t tiles_across = divided_up(op.out_width, S::kAcross);
  const Shape shape{op.images * tiles_down * tiles_across, kThreads, S::shared(Last, out_channels),
                    Last ? divided_up(last_columns, kLastColumns) : divided_up(out_channels, Out)};
  FASTSCNN_LAUNCH((dsconv_kernel<T, In, Out, Stride, Last>), shape, stream, op.x,
                  op.depthwise_weight, op.depthwise_bias, op.pointwise_weight, op.pointwise_bias,
                  op.last_weight, op.last_bias, op.out, out_is_float, op.height, op.width,
                  op.out_height, op.out_width, tiles_down, tiles_across, in_channels, out_channels,
                  row_pitch, last_channels, last_columns, op.stride, op.dilation, mid.low, mid.high,
                  end.low, end.high, op.x_image, op.x_pixel, op.out_image, op.out_pixel,
                  op.out_channel);
}

// The instantiation for these channels and stride, a general one for others.
template <class T>
void select(const fastscnn_dsconv& op, fastscnn_stream stream) {
  const bool last = op.last_channels != 0;
  const auto is = [&](int in, int out, int stride) {
    return computed_channels(op.in_channels) == in && computed_channels(op.out_channels) == out &&
           op.stride == stride && op.dilation == 1;
  };
  if (is(128, 128, 1)) {
    return last ? run<T, 128, 128, 1, true>(op, stream) : run<T, 128, 128, 1, false>(op, stream);
  }
  if (is(32, 48, 2) && !last) return run<T, 32, 48, 2, false>(op, stream);
  if (is(48, 64, 2) && !last) return run<T, 48, 64, 2, false>(op, stream);
  with_columns(op.out_channels, [&](auto columns) {
    if (op.dilation == 1 && op.stride == 1) {
      return last ? run<T, 0, columns, 1, true>(op, stream)
                  : run<T, 0, columns, 1, false>(op, stream);
    }
    if (op.dilation == 1 && op.stride == 2 && !last) {
      return run<T, 0, columns, 2, false>(op, stream);
    }
    last ? run<T, 0, columns, 0, true>(op, stream) : run<T, 0, columns, 0, false>(op, stream);
  });
}

}  // namespace
}  // namespace fastscnn::cuda

int fastscnn_cuda_dsconv(const fastscnn_dsconv* op, fastscnn_stream stream) {
  namespace fc = fastscnn::cuda;
  return fc::status_of([&] {
    const fc::Arguments rules(op->type, op->images, op->activation);
    rules.channels("in_channels", op->in_channels);
    rules.channels("out_channels", op->out_channels);
    if (op->last_channels) rules.channels("last_channels", op->last_channels);
    rules.at_least(1, "stride", op->stride);
    rules.at_least(1, "dilation", op->dilation);
    rules.side("height", op->height, op->out_height, op->stride, op->dilation, op->dilation);
    rules.side("width", op->width, op->out_width, op->stride, op->dilation, op->dilation);
    rules.plane("x", op->x, op->in_channels, op->x_image, op->x_pixel);
    rules.aligned("depthwise_weight", op->depthwise_weight);
    rules.aligned("depthwise_bias", op->depthwise_bias);
    rules.aligned("pointwise_weight", op->pointwise_weight);
    rules.aligned("pointwise_bias", op->pointwise_bias);
    if (op->last_channels) {
      rules.aligned("last_weight", op->last_weight);
      rules.aligned("last_bias", op->last_bias);
    }
    fc::require(op->out_type == op->type || (op->last_channels && op->out_type == FASTSCNN_FLOAT32),
                "out_type must be type, or float32 with last_channels", op->out_type);
    const int64_t height = op->out_height, width = op->out_width;
    if (!op->last_channels) {
      rules.result(op->out, op->out_channels, height, width, op->out_image, op->out_pixel);
    } else {
      rules.classes(*op, fc::is_interleaved(*op), op->out_type);
    }
    fc::with_type(op->type, [&](auto element) { fc::select<decltype(element)>(*op, stream); });
  });
}
