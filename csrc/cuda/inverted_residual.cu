// inverted_residual: 1x1 + bias + act -> depthwise 3x3 + bias + act -> 1x1 + bias [+ x]; what is
// expanded stays in shared memory.
//
// A block owns a tile of pixels with all their output channels (at free widths 64 or 128 of them).
// The tile's halo
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

// Sizes for In channels, of which a block computes Out, at Stride. In is 0 where both are known
// only at run time: then x's halo lies whole in shared memory where that has room for it, and else
// arrives in steps of channels for each chunk anew, one step while the one before is multiplied.
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
  static constexpr int kColumns = rounded_up(Out, 256 * kWarps / kPixels);

  static constexpr int kHaloPitch = pitch<T>(kChunk);
  static constexpr int kLeftPitch = pitch<T>(kChunk);
  static constexpr int kColumnPitch = pitch<T>(kColumns);

  // Shared memory in elements: each stage's halo of x, its expanding columns, the expanded halo,
  // the depthwise result, the projecting rows.
  static constexpr int kHalo = kSlots * kHaloPitch;
  static constexpr int kLeft = kPixels * kLeftPitch;
  static constexpr int kProject = kChunk * kColumnPitch;
  // In the end the result takes the place of all but x.
  static constexpr int kResult = kPixels * kColumnPitch;
  // And in floats: the depthwise's taps and bias, the expansion's bias.
  static constexpr int kTaps = 9 * kChunk;

  // Where x's channels come in steps of `step`, and the next step's lie beside those in use.
  struct Input {
    int step, stages;

    __host__ __device__ constexpr int pixel_pitch() const { return pitch<T>(step); }
    __host__ __device__ constexpr int stage() const { return kSlots * pixel_pitch(); }
    __host__ __device__ constexpr int expand_stage() const { return step * pitch<T>(kChunk); }
    __host__ __device__ constexpr int elements() const {
      const int work = stages * expand_stage() + kHalo + kLeft + kProject;
      return stages * stage() + (work > kResult ? work : kResult);
    }
    __host__ __device__ constexpr size_t shared() const {
      return elements() * sizeof(T) + (kTaps + 2 * kChunk) * sizeof(float);
    }
  };
  // A block's share of the smallest shared memory that runs the type: sm_75's, sm_86's.
  static constexpr size_t kMostShared = (sizeof(T) == 2 ? 64 : 99) * 1024;

  __host__ __device__ static constexpr Input input(int in_channels) {
    const Input whole{in_channels, 1};
    if (In || whole.shared() <= kMostShared) return whole;
    return {kChunk, 2};
  }
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
  if (In) out_channels = Out;
  const int row_pitch = padded_columns(out_channels);
  const int mid_pitch = In ? mid_channels : rounded_up(mid_channels, 64);
  const auto sizes = S::input(in_channels);
  T* const input = reinterpret_cast<T*>(shared_memory());
  T* const expand = input + sizes.stages * sizes.stage();
  T* const halo = expand + sizes.stages * sizes.expand_stage();
  T* const left = halo + S::kHalo;
  T* const project = left + S::kLeft;
  float* const taps = reinterpret_cast<float*>(input + sizes.elements());
  float* const taps_bias = taps + S::kTaps;
  float* const expanded_bias = taps_bias + S::kChunk;

  const int across = blockIdx.x % tiles_across, down = blockIdx.x / tiles_across % tiles_down;
  const int64_t image = blockIdx.x / tiles_across / tiles_down;
  const int top = down * S::kRows, start = across * S::kAcross;
  x += image * x_image;
  out += image * out_image;
  const int first_column = blockIdx.y * S::kColumns;
  const int stored = computed_channels(out_channels);

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
    T* const to = input + stage * sizes.stage();
    const int vectors = sizes.step / kPerVector<T>;
#pragma unroll 1
    for (int i = threadIdx.x; i < S::kSlots * vectors; i += kThreads) {
      const int at = i / vectors, within = i % vectors * kPerVector<T>;
      const int2 pixel = pixel_of(at);
      const bool exists = is_inside(at, pixel) && first + within < in_channels;
      async_copy_16(
          to + at * sizes.pixel_pitch() + within,
          exists ? x + (int64_t{pixel.x} * width + pixel.y) * x_pixel + first + within : x, exists);
    }
  };
  const auto queue_expand = [&](int first, int chunk) {
    copy_matrix<S::kChunk, kThreads>(sizes.step, expand + stage * sizes.expand_stage(),
                                     pitch<T>(S::kChunk),
                                     expand_weight + int64_t{first} * mid_pitch + chunk, mid_pitch,
                                     in_channels - first, S::kChunk);
  };
  const auto queue_row = [&](float* to, const float* from) {
    copy_matrix<S::kChunk, kThreads>(1, to, S::kChunk, from, 0, 1, S::kChunk);
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
    copy_matrix<S::kChunk, kThreads>(9, taps, S::kChunk, depthwise_weight + chunk, mid_pitch, 9,
                                     S::kChunk);
    queue_row(taps_bias, depthwise_bias + chunk);
    async_commit();
    copy_matrix<S::kColumns, kThreads>(S::kChunk, project, S::kColumnPitch,
                                       project_weight + int64_t{chunk} * row_pitch + first_column,
                                       row_pitch, S::kChunk, row_pitch - first_column);
    async_commit();

    Accumulator<S::kTiles, S::kChunk / 8> expanded;
    expanded.start(expanded_bias);
    for (int first = 0; first < in_channels; first += sizes.step) {
      const int now = stage;
      if (sizes.stages > 1) {
        if (first) {
          async_wait<0>();
          __syncthreads();
        }
        stage ^= 1;
        if (first + sizes.step < in_channels) {
          queue_input(first + sizes.step);
          queue_expand(first + sizes.step, chunk);
          async_commit();
        }
      }
      if (!expands) continue;
      const T* const x_now = input + now * sizes.stage() + first_slot * sizes.pixel_pitch();
      const T* const expand_now = expand + now * sizes.expand_stage();
      if constexpr (In != 0) {
        multiply<In>(expanded, x_now, sizes.pixel_pitch(), expand_now, pitch<T>(S::kChunk));
      } else {
#pragma unroll 1
        for (int k = 0; k < sizes.step; k += 16) {
          multiply<16>(expanded, x_now + k, sizes.pixel_pitch(),
                       expand_now + k * pitch<T>(S::kChunk), pitch<T>(S::kChunk));
        }
      }
    }
    if (expands) {
      // Outside the image it is the expanded value that is zero, not x. Channels that exist only in
      // memory are zero even where x is infinite.
      const int channels = mid_channels - chunk;
      expanded.for_each([&](int row, int column, float2& pair) {
        const bool exists = inside >> row / 8 & 1;
        float2 value = exists ? bounded(pair, low, high) : float2{0, 0};
        if (In == 0 && column >= channels) value.x = 0;
        if (In == 0 && column + 1 >= channels) value.y = 0;
        store_pair(halo + (first_slot + row) * S::kHaloPitch + column, value);
      });
    }
    async_wait<1>();
    __syncthreads();
    if (const int next = chunk + S::kChunk; next < mid_channels) {
      if (sizes.stages > 1) queue_input(0);
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
  constexpr int kVectors = S::kColumns / kPerVector<T>;
  const bool adds = Stride == 1 && (In == 0 || In == Out) && residual;
  if (adds && sizes.stages > 1) {  // x where the result will lie
#pragma unroll 1
    for (int i = threadIdx.x; i < S::kPixels * kVectors; i += kThreads) {
      const int pixel = i / kVectors, column = i % kVectors * kPerVector<T>;
      const int y = top + pixel / S::kAcross, z = start + pixel % S::kAcross;
      const bool exists = y < height && z < width && first_column + column < in_channels;
      async_copy_16(result + pixel * S::kColumnPitch + column,
                    exists ? x + (int64_t{y} * width + z) * x_pixel + first_column + column : x,
                    exists);
    }
    async_commit();
    async_wait<0>();
    __syncthreads();
  }
  total.for_each([&](int row, int column, float2& pair) {
    const int pixel = Product::row() + row, o = Product::column() + column;
    T* const to = result + pixel * S::kColumnPitch + o;
    if (adds) {
      const int at = slot<Stride, S::kHaloColumns>(pixel / S::kAcross + 1, pixel % S::kAcross + 1);
      const float2 own = load_pair(
          sizes.stages > 1 ? to : input + at * sizes.pixel_pitch() + (In ? o : first_column + o));
      pair = {pair.x + own.x, pair.y + own.y};
    }
    if (In == 0 && first_column + o >= out_channels) pair.x = 0;
    if (In == 0 && first_column + o + 1 >= out_channels) pair.y = 0;
    store_pair(to, pair);
  });
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < S::kPixels * kVectors; i += kThreads) {
    const int pixel = i / kVectors, column = i % kVectors * kPerVector<T>;
    const int y = top + pixel / S::kAcross, z = start + pixel % S::kAcross;
    if (y >= out_height || z >= out_width || first_column + column >= stored) continue;
    copy_16(out + (int64_t{y} * out_width + z) * out_pixel + first_column + column,
            result + pixel * S::kColumnPitch + column);
  }
}

template <class T, int In, int Out, int Stride>
void run(const fastscnn_inverted_residual& op, fastscnn_stream stream) {
  using S = Sizes<T, In, Out, Stride>;
  const Bounds bounds = bounds_of(op.activation);
  const int in_channels = computed_channels(op.in_channels);
  const int64_t tiles_down = divided_up(op.out_height, S::kRows);
  const int64_t tiles_across = divided_up(op.out_width, S::kAcross);
  const Shape shape{op.images * tiles_down * tiles_across, kThreads, S::input(in_channels).shared(),
                    divided_up(op.out_channels, S::kColumns)};
  FASTSCNN_LAUNCH((inverted_residual_kernel<T, In, Out, Stride>), shape, stream, op.x,
                  op.expand_weight, op.expand_bias, op.depthwise_weight, op.depthwise_bias,
                  op.project_weight, op.project_bias, op.out, op.height, op.width, op.out_height,
                  op.out_width, tiles_down, tiles_across, in_channels, op.mid_channels,
                  op.out_channels, op.residual, bounds.low, bounds.high, op.x_image, op.x_pixel,
                  op.out_image, op.out_pixel);
}

// The instantiation for these channels and stride, the general one for others: it is the one that
// knows expanded and output channels which exist only in memory.
template <class T>
void select(const fastscnn_inverted_residual& op, fastscnn_stream stream) {
  const auto is = [&](int in, int out, int stride) {
    return computed_channels(op.in_channels) == in && op.out_channels == out &&
           op.mid_channels % 64 == 0 && op.stride == stride;
  };
  if (is(64, 64, 1)) return run<T, 64, 64, 1>(op, stream);
  if (is(64, 64, 2)) return run<T, 64, 64, 2>(op, stream);
  if (is(64, 96, 2)) return run<T, 64, 96, 2>(op, stream);
  if (is(96, 96, 1)) return run<T, 96, 96, 1>(op, stream);
  if (is(96, 128, 1)) return run<T, 96, 128, 1>(op, stream);
  if (is(128, 128, 1)) return run<T, 128, 128, 1>(op, stream);
  const bool narrow = op.out_channels <= 64;
  if (op.stride == 1) return narrow ? run<T, 0, 64, 1>(op, stream) : run<T, 0, 128, 1>(op, stream);
  narrow ? run<T, 0, 64, 2>(op, stream) : run<T, 0, 128, 2>(op, stream);
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
