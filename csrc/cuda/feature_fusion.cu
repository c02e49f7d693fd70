// feature_fusion: act(low_weight relu(refine(resize(low))) + high_weight high + bias); neither the
// resized nor the refined tensor exists in memory.
//
// A block owns a tile of pixels with up to 128 of their output channels. Both 1x1s are one product
// over the channels of low and then of high, chunk by chunk: low's are resized and refined by the
// threads, high's and the rows of the weights arrive asynchronously while the chunk before is
// computed.
#include "arguments.cuh"
#include "product.cuh"
#include "resize.cuh"

namespace fastscnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 4, kAcross = 16;  // of a tile
constexpr int kPixels = kRows * kAcross;
constexpr int kChunk = 32;  // channels
constexpr int kPairs = kChunk / 2;
static_assert(kThreads == kPairs * kAcross, "a thread refines two channels of a tile's column");

// What a tile samples, the same for all channels. `Side` x `Side` taps.
template <int Side>
struct Samples {
  static constexpr int kDown = Side * kRows, kMost = 2 * kDown;

  Sample down[kDown];             // of tap row and row; low < 0 outside the image
  Sample across[Side * kAcross];  // of tap column and column
  int last[kMost];                // whether no sample after has this row, low or high, too
  int rows;                       // of low that are touched
  int row[kMost];
  alignas(16) float shares[kMost][kDown];  // of a row in the samples; < 0: not touched

  // Fills the table from what is sampled at the tile's rows and columns; a barrier must follow.
  __device__ __forceinline__ void fill(int top, int start, int dilation, int height, int width,
                                       int low_height, int low_width, const Resize& y,
                                       const Resize& x) {
    const auto at = [&](int i, int tap, int size, const Resize& resize, int low_size) {
      const int64_t k = i + int64_t{tap - Side / 2} * dilation;
      return k >= 0 && k < size ? sample(int(k), resize, low_size) : Sample{-1, -1, 0};
    };
    const int i = threadIdx.x;
    if (i < kDown) {
      down[i] = at(top + i % kRows, i / kRows, height, y, low_height);
    } else if (i < kDown + Side * kAcross) {
      const int j = i - kDown;
      across[j] = at(start + j % kAcross, j / kAcross, width, x, low_width);
    }
    __syncthreads();
    const int mine = i >= kMost ? -1 : i % 2 ? down[i / 2].high : down[i / 2].low;
    bool is_last = mine >= 0;
#pragma unroll
    for (int j = 0; j < kDown; ++j) {
      if (2 * j > i && down[j].low == mine) is_last = false;
      if (2 * j + 1 > i && down[j].high == mine) is_last = false;
    }
    if (i < kMost) last[i] = is_last;
    __syncthreads();
    if (i >= kMost) return;
    int k = 0;
#pragma unroll
    for (int j = 0; j < kMost; ++j) k += j > i ? last[j] : 0;
    if (i == 0) rows = k + is_last;
    if (!is_last) return;
    row[k] = mine;
#pragma unroll
    for (int j = 0; j < kDown; ++j) {
      const Sample& s = down[j];
      float share = s.low == mine ? 1 - s.weight : 0;
      if (s.high == mine) share += s.weight;
      shares[k][j] = s.low == mine || s.high == mine ? share : -1;
    }
  }
};

// Sizes for Out channels, 0 if those are known only at run time. Shared memory in elements: the
// left and right matrices of two chunks, and in the same memory the result; then the samples.
template <class T, int Out, int Side>
struct Sizes {
  static constexpr int kColumns = Out ? padded_columns(Out) : 64;
  static constexpr int kLeft = kPixels * pitch<T>(kChunk);
  static constexpr int kRight = kChunk * pitch<T>(kColumns);
  static constexpr int kPipeline = 2 * (kLeft + kRight);
  static constexpr int kResult = kPixels * pitch<T>(kColumns);
  static constexpr int kTile = kPipeline > kResult ? kPipeline : kResult;
  static constexpr size_t kShared = kTile * sizeof(T) + sizeof(Samples<Side>);
};

// relu(refine(resize(low))) of one chunk, to `left`. A thread has two channels of a column of the
// tile. It passes once over the rows of low that the column's samples touch: the row's samples at
// the tap columns are weighted by each tap row, and those sums count for the pixels whose tap row
// touches the row.
template <class T, int Side>
__device__ __forceinline__ void refine(const T* low, T* left, const Samples<Side>& samples,
                                       const float* weight, const float* bias, int channels,
                                       int first, int64_t low_row, int low_pixel) {
  const int within = threadIdx.x % kPairs * 2, column = threadIdx.x / kPairs, c = first + within;
  const bool exists = c < channels;
  float2 taps[Side * Side], sums[kRows], start{0, 0};
  if constexpr (Side > 1) {
#pragma unroll
    for (int tap = 0; tap < Side * Side; ++tap) {
      taps[tap] = exists ? load_pair(weight + tap * channels + c) : float2{0, 0};
    }
    if (exists) start = load_pair(bias + c);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) sums[r] = start;
  const T *lows[Side], *highs[Side];
  float weights[Side];
  bool inside[Side];
#pragma unroll
  for (int x = 0; x < Side; ++x) {
    const Sample& s = samples.across[x * kAcross + column];
    inside[x] = exists && s.low >= 0;
    lows[x] = inside[x] ? low + int64_t{s.low} * low_pixel + c : low;
    highs[x] = inside[x] ? low + int64_t{s.high} * low_pixel + c : low;
    weights[x] = s.weight;
  }
#pragma unroll 1
  for (int i = 0; i < samples.rows; ++i) {
    const int64_t at = samples.row[i] * low_row;
    float2 across[Side];
#pragma unroll
    for (int x = 0; x < Side; ++x) {
      across[x] = blended(load_pair(lows[x] + at), load_pair(highs[x] + at), weights[x]);
      if (!inside[x]) across[x] = {0, 0};
    }
#pragma unroll
    for (int y = 0; y < Side; ++y) {
      const float4 four = *reinterpret_cast<const float4*>(samples.shares[i] + y * kRows);
      if (fmaxf(fmaxf(four.x, four.y), fmaxf(four.z, four.w)) < 0) continue;
      float2 sum = across[0];
      if constexpr (Side > 1) {
        sum = {0, 0};
#pragma unroll
        for (int x = 0; x < Side; ++x) sum = multiply_add(across[x], taps[Side * y + x], sum);
      }
      const float shares[kRows] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (shares[r] >= 0) sums[r] = multiply_add({shares[r], shares[r]}, sum, sums[r]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    store_pair(left + (r * kAcross + column) * pitch<T>(kChunk) + within,
               bounded(sums[r], 0, INFINITY));
  }
}

// high (H, W, high channels) and low (h, w, low channels) -> out (H, W, out channels), a tile of
// image block / (tiles down and across).
template <class T, int Low, int High, int Out, int Taps>
__global__ void __launch_bounds__(kThreads, 2)
    feature_fusion_kernel(const T* __restrict__ high, const T* __restrict__ low,
                          const float* __restrict__ refine_weight,
                          const float* __restrict__ refine_bias, const T* __restrict__ low_weight,
                          const T* __restrict__ high_weight, const float* __restrict__ bias,
                          T* __restrict__ out, int height, int width, int low_height, int low_width,
                          int tiles_down, int tiles_across, int low_channels, int high_channels,
                          int out_channels, int dilation, int64_t y_scale, int64_t y_shift,
                          int64_t y_divisor, int64_t x_scale, int64_t x_shift, int64_t x_divisor,
                          float least, float most, int64_t high_image, int high_pixel,
                          int64_t low_image, int low_pixel, int64_t out_image, int out_pixel) {
  constexpr int kSide = Taps == 9 ? 3 : 1;
  using S = Sizes<T, Out, kSide>;
  using Product = Shares<kPixels, S::kColumns, kWarps>;
  if (Low) low_channels = Low;
  if (High) high_channels = High;
  if (Out) out_channels = Out;
  const int row_pitch = padded_columns(out_channels);
  T* const memory = reinterpret_cast<T*>(shared_memory());
  auto& samples = *reinterpret_cast<Samples<kSide>*>(memory + S::kTile);
  const auto left = [&](int chunk) { return memory + chunk % 2 * S::kLeft; };
  const auto right = [&](int chunk) { return memory + 2 * S::kLeft + chunk % 2 * S::kRight; };

  const int across = blockIdx.x % tiles_across, down = blockIdx.x / tiles_across % tiles_down;
  const int64_t image = blockIdx.x / tiles_across / tiles_down;
  const int top = down * kRows, start = across * kAcross;
  high += image * high_image;
  low += image * low_image;
  out += image * out_image;
  const int first_column = blockIdx.y * S::kColumns;

  const int low_chunks = divided_up(low_channels, kChunk);
  const int chunks = low_chunks + divided_up(high_channels, kChunk);
  const auto queue = [&](int chunk) {
    const bool of_low = chunk < low_chunks;
    const int first = (of_low ? chunk : chunk - low_chunks) * kChunk;
    copy_matrix<kChunk, S::kColumns, pitch<T>(S::kColumns), kThreads>(
        right(chunk),
        (of_low ? low_weight : high_weight) + int64_t{first} * row_pitch + first_column, row_pitch,
        (of_low ? low_channels : high_channels) - first, row_pitch - first_column);
    if (!of_low) {
      constexpr int kVectors = kChunk / kPerVector<T>;
#pragma unroll 1
      for (int i = threadIdx.x; i < kPixels * kVectors; i += kThreads) {
        const int pixel = i / kVectors, within = i % kVectors * kPerVector<T>;
        const int y = top + pixel / kAcross, z = start + pixel % kAcross;
        const bool exists = y < height && z < width && first + within < high_channels;
        async_copy_16(left(chunk) + pixel * pitch<T>(kChunk) + within,
                      exists ? high + (int64_t{y} * width + z) * high_pixel + first + within : high,
                      exists);
      }
    }
    async_commit();
  };

  queue(0);
  typename Product::Tile total;
  const int own_column = first_column + Product::column();
  total.start(bias + own_column, row_pitch - own_column);
  samples.fill(top, start, dilation, height, width, low_height, low_width,
               {y_scale, y_shift, y_divisor}, {x_scale, x_shift, x_divisor});
  __syncthreads();
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    if (chunk < low_chunks) {
      refine<T, kSide>(low, left(chunk), samples, refine_weight, refine_bias, low_channels,
                       chunk * kChunk, int64_t{low_width} * low_pixel, low_pixel);
    }
    async_wait<0>();
    __syncthreads();  // after which nobody multiplies the chunk before
    if (chunk + 1 < chunks) queue(chunk + 1);
    multiply<kChunk, pitch<T>(S::kColumns)>(total, left(chunk) + Product::row() * pitch<T>(kChunk),
                                            pitch<T>(kChunk), right(chunk) + Product::column());
  }
  __syncthreads();

  T* const tile = memory;
  total.for_each([&](int row, int column, float2& pair) {
    store_pair(tile + (Product::row() + row) * pitch<T>(S::kColumns) + Product::column() + column,
               bounded(pair, least, most));
  });
  __syncthreads();
  store_tile<kRows, kAcross, S::kColumns, pitch<T>(S::kColumns), kThreads>(
      out + (int64_t{top} * width + start) * out_pixel + first_column, tile,
      int64_t{width} * out_pixel, out_pixel, height - top, width - start,
      out_channels - first_column);
}

template <class T, int Low, int High, int Out, int Taps>
void run(const fastscnn_feature_fusion& op, fastscnn_stream stream) {
  using S = Sizes<T, Out, Taps == 9 ? 3 : 1>;
  const Bounds end = bounds_of(op.activation);
  const Resize y = resize_of(op.low_height, op.height, op.align_corners);
  const Resize x = resize_of(op.low_width, op.width, op.align_corners);
  const int low_channels = computed_channels(op.low_channels),
            high_channels = computed_channels(op.high_channels);
  const int out_channels = computed_channels(op.out_channels);
  const int64_t tiles_down = divided_up(op.height, kRows);
  const int64_t tiles_across = divided_up(op.width, kAcross);
  const Shape shape{op.images * tiles_down * tiles_across, kThreads, S::kShared,
                    divided_up(out_channels, S::kColumns)};
  FASTSCNN_LAUNCH((feature_fusion_kernel<T, Low, High, Out, Taps>), shape, stream, op.high, op.low,
                  op.refine_weight, op.refine_bias, op.low_weight, op.high_weight, op.bias, op.out,
                  op.height, op.width, op.low_height, op.low_width, tiles_down, tiles_across,
                  low_channels, high_channels, out_channels, op.dilation, y.scale, y.shift,
                  y.divisor, x.scale, x.shift, x.divisor, end.low, end.high, op.high_image,
                  op.high_pixel, op.low_image, op.low_pixel, op.out_image, op.out_pixel);
}

// The instantiation for these channels, the general one for others.
template <class T, int Taps>
void select(const fastscnn_feature_fusion& op, fastscnn_stream stream) {
  if (computed_channels(op.low_channels) == 128 && computed_channels(op.high_channels) == 64 &&
      computed_channels(op.out_channels) == 128) {
    return run<T, 128, 64, 128, Taps>(op, stream);
  }
  run<T, 0, 0, 0, Taps>(op, stream);
}

// A dense refinement commutes with the resize: it runs at low's resolution, as this op without a
// low branch; what it leaves is resized.
template <class T>
void run_dense(const fastscnn_feature_fusion& op, fastscnn_stream stream) {
  fastscnn_feature_fusion refine = op, rest = op;
  refine.high = op.low;
  refine.high_channels = refine.out_channels = op.low_channels;
  refine.low_channels = 0;
  refine.activation = FASTSCNN_NONE;
  refine.height = op.low_height;
  refine.width = op.low_width;
  refine.high_image = op.low_image;
  refine.high_pixel = refine.out_pixel = op.low_pixel;
  refine.high_weight = op.refine_weight;
  refine.bias = op.refine_bias;
  rest.low = refine.out = op.refined;
  rest.low_image = refine.out_image = op.low_height * op.low_width * op.low_pixel;
  run<T, 0, 0, 0, 1>(refine, stream);
  select<T, 1>(rest, stream);
}

}  // namespace
}  // namespace fastscnn::cuda

int fastscnn_cuda_feature_fusion(const fastscnn_feature_fusion* op, fastscnn_stream stream) {
  namespace fc = fastscnn::cuda;
  return fc::status_of([&] {
    const fc::Arguments rules(op->type, op->images, op->activation);
    rules.channels("low_channels", op->low_channels);
    rules.channels("high_channels", op->high_channels);
    rules.channels("out_channels", op->out_channels);
    rules.at_least(1, "dilation", op->dilation);
    rules.at_least(1, "height", op->height);
    rules.at_least(1, "width", op->width);
    rules.at_least(1, "low_height", op->low_height);
    rules.at_least(1, "low_width", op->low_width);
    rules.plane("high", op->high, op->high_channels, op->high_image, op->high_pixel);
    rules.plane("low", op->low, op->low_channels, op->low_image, op->low_pixel);
    rules.aligned("refine_weight", op->refine_weight);
    rules.aligned("refine_bias", op->refine_bias);
    rules.aligned("low_weight", op->low_weight);
    rules.aligned("high_weight", op->high_weight);
    rules.aligned("bias", op->bias);
    if (op->dense) rules.aligned("refined", op->refined);
    rules.result(op->out, op->out_channels, op->height, op->width, op->out_image, op->out_pixel);
    fc::with_type(op->type, [&](auto element) {
      using T = decltype(element);
      op->dense ? fc::run_dense<T>(*op, stream) : fc::select<T, 9>(*op, stream);
    });
  });
}
