// inverted_residual: 1x1 + bias + act -> depthwise 3x3 + bias + act -> 1x1 + bias [+ x]; what is
// expanded stays in shared memory.
//
// A block owns a tile of pixels with all their output channels (at free widths 64). The tile's halo
// of x arrives once; then, chunk by chunk of expanded channels, 64 bytes of each pixel, the halo is
// expanded, summed up by the depthwise and projected onto sums that stay in registers. Of the
// weights, the next chunk's expanding columns arrive during the depthwise and the projection, the
// chunk's projecting rows during the expansion and the depthwise, so that one buffer of each is
// enough.
#include "arguments.cuh"
#include "depthwise.cuh"
#include "product.cuh"

namespace fastscnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Sizes for In and Out channels at Stride; channels are 0 where they are known only at run time,
// when x's halo arrives in steps of channels for each chunk anew, one step while the one before is
// multiplied.
template <class T, int In, int Out, int Stride>
struct Sizes {
  static constexpr int kAcross = 8;  // pixels of a tile's row
  static constexpr int kRows = Stride == 1 ? 8 : 4;
  static constexpr int kStrip = kRows / 2;
  static constexpr int kPixels = kRows * kAcross;
  static constexpr int kHaloRows = (kRows - 1) * Stride + 3;
  static constexpr int kHaloColumns = (kAcross - 1) * Stride + 3;
  static constexpr int kHaloPixels = kHaloRows * kHaloColumns;
  static constexpr int kTiles = divided_up(kHaloPixels, 16 * kWarps);  // a warp's, of 16 pixels
  static constexpr int kSlots = rounded_up(kHaloPixels, 16 * kTiles);
  static constexpr int kChunk = 64 / int(sizeof(T));  // expanded channels
  static constexpr int kStep = In ? In : kChunk;      // input channels
  static constexpr int kStages = In ? 1 : 2;
  static constexpr int kColumns = Out ? rounded_up(Out, 256 * kWarps / kPixels) : 64;

  static constexpr int kPixelPitch = pitch<T>(kStep);
  static constexpr int kHaloPitch = pitch<T>(kChunk);
  static constexpr int kLeftPitch = pitch<T>(kChunk);
  static constexpr int kColumnPitch = pitch<T>(kColumns);

  // Shared memory in elements: each stage's halo of x, its expanding columns, the expanded halo,
  // the depthwise result, the projecting rows.
  static constexpr int kInputStage = kSlots * kPixelPitch;
  static constexpr int kInput = kStages * kInputStage;
  static constexpr int kExpandStage = kStep * pitch<T>(kChunk);
  static constexpr int kExpand = kStages * kExpandStage;
  static constexpr int kHalo = kSlots * kHaloPitch;
  static constexpr int kLeft = kPixels * kLeftPitch;
  static constexpr int kProject = kChunk * kColumnPitch;
  static constexpr int kWork = kExpand + kHalo + kLeft + kProject;
  // In the end the result takes the place of all but x.
  static constexpr int kResult = kPixels * kColumnPitch;
  static constexpr int kElements = kInput + (kWork > kResult ? kWork : kResult);
  // And in floats: the depthwise's taps and bias, the expansion's bias.
  static constexpr int kTaps = 9 * kChunk;
  static constexpr size_t kShared = kElements * sizeof(T) + (kTaps + 2 * kChunk) * sizeof(float);
};

// The row and column of the halo's pixel that lies in a slot.
template <int Stride, int HaloColumns>
__device__ __forceinline__ int2 position(int at) {
  constexpr int kEven = (HaloColumns + 1) / 2;
  const int row = at / HaloColumns, column = at % HaloColumns;
  if (Stride == 1) return {row, column};
  return {row, column < kEven ? 2 * column : 2 * (column - kEven) + 1};
}

// x (H, W, in_channels) -> out (H', W', out_channels), a tile of image block / (tiles down and
// across).
template <class T, int In, int Out, int Stride>
__global__ void __launch_bounds__(kThreads, 2)
    inverted_residual_kernel(const T* __restrict__ x, const T* __restrict__ expand_weight,
                             const float* __restrict__ expand_bias,
                             const float* __restrict__ depthwise_weight,
                             const float* __restrict__ depthwise_bias,
                             const T* __restrict__ project_weight,
                             const float* __restrict__ project_bias, T* __restrict__ out,
                             int height, int width, int out_height, int out_width, int tiles_down,
                             int tiles_across, int in_channels, int mid_channels, int out_channels,
                             int residual, float low, float high, int64_t x_image, int x_pixel,
                             int64_t out_image, int out_pixel) {
  using S = Sizes<T, In, Out, Stride>;
  using Product = Shares<S::kPixels, S::kColumns, kWarps>;
  if (In) in_channels = In;
  if (Out) out_channels = Out;
  const int row_pitch = padded_columns(out_channels);
  T* const input = reinterpret_cast<T*>(shared_memory());
  T* const expand = input + S::kInput;
  T* const halo = expand + S::kExpand;
  T* const left = halo + S::kHalo;
  T* const project = left + S::kLeft;
  float* const taps = reinterpret_cast<float*>(input + S::kElements);
  float* const taps_bias = taps + S::kTaps;
  float* const expanded_bias = taps_bias + S::kChunk;

  const int across = blockIdx.x % tiles_across, down = blockIdx.x / tiles_across % tiles_down;
  const int64_t image = blockIdx.x / tiles_across / tiles_down;
  const int top = down * S::kRows, start = across * S::kAcross;
  x += image * x_image;
  out += image * out_image;
  const int first_column = blockIdx.y * S::kColumns;

  const auto pixel_of = [&](int at) {
    const int2 in_halo = position<Stride, S::kHaloColumns>(at);
    return int2{top * Stride + in_halo.x - 1, start * Stride + in_halo.y - 1};
  };
  const auto is_inside = [&](int at, int2 pixel) {
    return at < S::kHaloPixels && pixel.x >= 0 && pixel.x < height && pixel.y >= 0 &&
           pixel.y < width;
  };
  int stage = 0;
  const auto queue_input = [&](int first) {
    T* const to = input + stage * S::kInputStage;
    constexpr int kVectors = S::kStep / kPerVector<T>;
#pragma unroll 1
    for (int i = threadIdx.x; i < S::kSlots * kVectors; i += kThreads) {
      const int at = i / kVectors, within = i % kVectors * kPerVector<T>;
      const int2 pixel = pixel_of(at);
      const bool exists = is_inside(at, pixel) && first + within < in_channels;
      async_copy_16(
          to + at * S::kPixelPitch + within,
          exists ? x + (int64_t{pixel.x} * width + pixel.y) * x_pixel + first + within : x, exists);
    }
  };
  const auto queue_expand = [&](int first, int chunk) {
    copy_matrix<S::kStep, S::kChunk, kThreads>(
        expand + stage * S::kExpandStage, pitch<T>(S::kChunk),
        expand_weight + int64_t{first} * mid_channels + chunk, mid_channels, in_channels - first,
        S::kChunk);
  };
  const auto queue_row = [&](float* to, const float* from) {
    copy_matrix<1, S::kChunk, kThreads>(to, S::kChunk, from, 0, 1, S::kChunk);
  };

  // Of the pixels that this warp expands, the lane's that are inside the image.
  const int first_slot = threadIdx.x / 32 * S::kTiles * 16;
  const bool expands = first_slot < S::kSlots;
  unsigned inside = 0;
#pragma unroll
  for (int i = 0; i < 2 * S::kTiles; ++i) {
    const int at = first_slot + 8 * i + threadIdx.x % 32 / 4;
    if (is_inside(at, pixel_of(at))) inside |= 1u << i;
  }

  typename Product::Tile total;
  const int own_column = first_column + Product::column();
  total.start(project_bias + own_column, row_pitch - own_column);
  queue_input(0);
  queue_expand(0, 0);
  queue_row(expanded_bias, expand_bias);
  async_commit();
#pragma unroll 1
  for (int chunk = 0; chunk < mid_channels; chunk += S::kChunk) {
    async_wait<0>();
    __syncthreads();
    copy_matrix<9, S::kChunk, kThreads>(taps, S::kChunk, depthwise_weight + chunk, mid_channels, 9,
                                        S::kChunk);
    queue_row(taps_bias, depthwise_bias + chunk);
    async_commit();
    copy_matrix<S::kChunk, S::kColumns, kThreads>(
        project, S::kColumnPitch, project_weight + int64_t{chunk} * row_pitch + first_column,
        row_pitch, S::kChunk, row_pitch - first_column);
    async_commit();

    Accumulator<S::kTiles, S::kChunk / 8> expanded;
    expanded.start(expanded_bias);
    for (int first = 0; first < in_channels; first += S::kStep) {
      const int now = stage;
      if (!In) {
        if (first) {
          async_wait<0>();
          __syncthreads();
        }
        stage ^= 1;
        if (first + S::kStep < in_channels) {
          queue_input(first + S::kStep);
          queue_expand(first + S::kStep, chunk);
          async_commit();
        }
      }
      if (expands) {
        multiply<S::kStep>(expanded, input + now * S::kInputStage + first_slot * S::kPixelPitch,
                           S::kPixelPitch, expand + now * S::kExpandStage, pitch<T>(S::kChunk));
      }
    }
    if (expands) {
      // Outside the image it is the expanded value that is zero, not x.
      expanded.for_each([&](int row, int column, float2& pair) {
        const bool exists = inside >> row / 8 & 1;
        store_pair(halo + (first_slot + row) * S::kHaloPitch + column,
                   exists ? bounded(pair, low, high) : float2{0, 0});
      });
    }
    async_wait<1>();
    __syncthreads();
    if (const int next = chunk + S::kChunk; next < mid_channels) {
      if (!In) queue_input(0);
      queue_expand(0, next);
      queue_row(expanded_bias, expand_bias + next);
    }
    async_commit();
    depthwise<T, S, Stride, kThreads>(halo, left, taps, taps_bias, S::kChunk, 0, low, high);
    async_wait<1>();
    __syncthreads();
    multiply<S::kChunk>(total, left + Product::row() * S::kLeftPitch, S::kLeftPitch,
                        project + Product::column(), S::kColumnPitch);
  }
  __syncthreads();

  T* const result = expand;
  total.for_each([&](int row, int column, float2& pair) {
    const int pixel = Product::row() + row, o = Product::column() + column;
    if (In == Out && Stride == 1 && residual) {
      const int r = pixel / S::kAcross, c = pixel % S::kAcross;
      float2 own{0, 0};
      if constexpr (In != 0) {
        const int at = slot<Stride, S::kHaloColumns>(r + 1, c + 1);
        own = load_pair(input + at * S::kPixelPitch + o);
      } else if (top + r < height && start + c < width && first_column + o < in_channels) {
        own = load_pair(x + (int64_t{top + r} * width + start + c) * x_pixel + first_column + o);
      }
      pair = {pair.x + own.x, pair.y + own.y};
    }
    store_pair(result + pixel * S::kColumnPitch + o, pair);
  });
  __syncthreads();
  constexpr int kVectors = S::kColumns / kPerVector<T>;
#pragma unroll 1
  for (int i = threadIdx.x; i < S::kPixels * kVectors; i += kThreads) {
    const int pixel = i / kVectors, column = i % kVectors * kPerVector<T>;
    const int y = top + pixel / S::kAcross, z = start + pixel % S::kAcross;
    if (y >= out_height || z >= out_width || first_column + column >= out_channels) continue;
    copy_16(out + (int64_t{y} * out_width + z) * out_pixel + first_column + column,
            result + pixel * S::kColumnPitch + column);
  }
}

template <class T, int In, int Out, int Stride>
void run(const fastscnn_inverted_residual& op, fastscnn_stream stream) {
  using S = Sizes<T, In, Out, Stride>;
  const Bounds bounds = bounds_of(op.activation);
  const int in_channels = padded(op.in_channels), out_channels = padded(op.out_channels);
  const int mid_channels = rounded_up(op.mid_channels, 64);
  const int64_t tiles_down = divided_up(op.out_height, S::kRows);
  const int64_t tiles_across = divided_up(op.out_width, S::kAcross);
  const Shape shape{op.images * tiles_down * tiles_across, kThreads, S::kShared,
                    divided_up(out_channels, S::kColumns)};
  FASTSCNN_LAUNCH((inverted_residual_kernel<T, In, Out, Stride>), shape, stream, op.x,
                  op.expand_weight, op.expand_bias, op.depthwise_weight, op.depthwise_bias,
                  op.project_weight, op.project_bias, op.out, op.height, op.width, op.out_height,
                  op.out_width, tiles_down, tiles_across, in_channels, mid_channels, out_channels,
                  op.residual, bounds.low, bounds.high, op.x_image, op.x_pixel, op.out_image,
                  op.out_pixel);
}

// The instantiation for these channels and stride, the general one for others.
template <class T>
void select(const fastscnn_inverted_residual& op, fastscnn_stream stream) {
  const auto is = [&](int in, int out, int stride) {
    return padded(op.in_channels) == in && padded(op.out_channels) == out && op.stride == stride;
  };
  if (is(64, 64, 1)) return run<T, 64, 64, 1>(op, stream);
  if (is(64, 64, 2)) return run<T, 64, 64, 2>(op, stream);
  if (is(64, 96, 2)) return run<T, 64, 96, 2>(op, stream);
  if (is(96, 96, 1)) return run<T, 96, 96, 1>(op, stream);
  if (is(96, 128, 1)) return run<T, 96, 128, 1>(op, stream);
  if (is(128, 128, 1)) return run<T, 128, 128, 1>(op, stream);
  if (op.stride == 1) return run<T, 0, 0, 1>(op, stream);
  run<T, 0, 0, 2>(op, stream);
}

}  // namespace
}  // namespace fastscnn::cuda

int fastscnn_cuda_inverted_residual(const fastscnn_inverted_residual* op, fastscnn_stream stream) {
  namespace fc = fastscnn::cuda;
  return fc::status_of([&] {
    fc::require(op->stride == 1 || op->stride == 2, "stride must be 1 or 2", op->stride);
    const fc::Arguments rules(op->type, op->images, op->activation);
    rules.channels("in_channels", op->in_channels);
    rules.channels("mid_channels", op->mid_channels);
    rules.channels("out_channels", op->out_channels);
    rules.side("height", op->height, op->out_height, op->stride, 1, 1);
    rules.side("width", op->width, op->out_width, op->stride, 1, 1);
    rules.plane("x", op->x, op->in_channels, op->x_image, op->x_pixel);
    rules.aligned("expand_weight", op->expand_weight);
    rules.aligned("expand_bias", op->expand_bias);
    rules.aligned("depthwise_weight", op->depthwise_weight);
    rules.aligned("depthwise_bias", op->depthwise_bias);
    rules.aligned("project_weight", op->project_weight);
    rules.aligned("project_bias", op->project_bias);
    rules.result(op->out, op->out_channels, op->out_height, op->out_width, op->out_image,
                 op->out_pixel);
    fc::require(!op->residual || op->stride == 1, "stride must be 1 with residual", op->stride);
    fc::require(!op->residual || op->in_channels == op->out_channels,
                "out_channels must be in_channels with residual", op->out_channels);
    fc::with_type(op->type, [&](auto element) { fc::select<decltype(element)>(*op, stream); });
  });
}
