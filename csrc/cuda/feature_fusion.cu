// feature_fusion: act(low_weight relu(refine(resize(low))) + high_weight high + bias); neither the
// resized nor the refined tensor exists in memory.
//
// A block owns a tile of pixels with up to 128 of their output channels. Both 1x1s are one product
// over the channels of low and then of high, chunk by chunk: low's are resized at the pixels that
// the tile's taps read, and refined from there; high's and the rows of the weights arrive
// asynchronously while the chunk before is computed.
#include "arguments.cuh"
#include "depthwise.cuh"
#include "resize.cuh"

namespace fastscnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 4;  // of a tile
constexpr int kMostDilation = 8;

// The distinct positions of `size` adjacent outputs' taps, in order, as a slot each: their number,
// how far a tap lies from the next, and where a position is, from the first output on. Without a
// dilation the outputs themselves.
struct Positions {
  int count, apart;

  __host__ __device__ Positions(int size, int dilation)
      : count(dilation < size ? size + 2 * dilation : 3 * size),
        apart(dilation < size ? dilation : size) {}

  __device__ __forceinline__ int64_t at(int slot, int size, int dilation) const {
    if (apart == dilation) return slot - dilation;
    return slot % size + int64_t{slot / size - 1} * dilation;
  }
};

// Sizes for tiles of Across columns, of whose channels a block computes Out; Side x Side taps.
template <class T, int Out, int Side, int Across>
struct Sizes {
  static constexpr int kPixels = kRows * Across;
  static constexpr int kChunk = 64 / int(sizeof(T));  // channels
  static constexpr int kChunkPitch = pitch<T>(kChunk);
  static constexpr int kRow = padded_columns(Out);  // of the weights
  static constexpr int kRowPitch = pitch<T>(kRow);
  static constexpr int kMostRows = Side * kRows;
  static constexpr int kMostColumns = Side == 1 ? Across : Across == 16 ? 32 : 24;
  // A warp refines 16 kUnit pixels of 8 channels.
  static constexpr int kUnit = sizeof(T) == 2 ? 2 : 1;
  static constexpr int kUnitsAcross = kPixels / (16 * kUnit);
  static constexpr int kUnits = kUnitsAcross * (kChunk / 8);

  // Shared memory in elements: the left and right matrices of two chunks, and in the same memory
  // the result; then what is resized of a chunk.
  static constexpr int kLeft = kPixels * kChunkPitch;
  static constexpr int kRight = kChunk * kRowPitch;
  static constexpr int kPipeline = 2 * (kLeft + kRight);
  static constexpr int kResult = kPixels * kRowPitch;
  static constexpr int kTile = kPipeline > kResult ? kPipeline : kResult;

  // What a tile samples at the rows and columns of its taps; low < 0 outside the image, and after
  // the last row.
  struct alignas(16) Position {
    Sample sample;
    float rest;  // the weight of the lower index
  };
  struct Samples {
    Position down[kMostRows + 1], across[kMostColumns];
  };

  static size_t shared(int dilation) {
    const int resized =
        Side == 1 ? 0 : Positions(kRows, dilation).count * Positions(Across, dilation).count;
    return (kTile + resized * kChunkPitch) * sizeof(T) + sizeof(Samples);
  }
};

// One chunk of low at the samples' positions, to slots of `to`; with Refined, after a ReLU. A
// thread has four channels of a column and walks down: a row of low is blended along the column
// once, since what is below one row is above the next.
template <bool Refined, class T, class S>
__device__ __forceinline__ void resize(const T* low, T* to, const typename S::Samples& samples,
                                       int rows, int columns, int channels, int64_t low_row,
                                       int low_pixel) {
  constexpr int kOwn = 4, kSharers = S::kChunk / kOwn;
  struct Own {
    Pair<T> v[kOwn / 2];
  };
  using Raw = Vector<uint32_t, sizeof(Own) / sizeof(uint32_t)>;
  const int c = threadIdx.x % kSharers * kOwn;
  const Clamp<T> clamp(Refined ? 0.0f : -INFINITY, INFINITY);
  const auto load = [](const T* from) {
    const Raw raw = *reinterpret_cast<const Raw*>(from);
    Own own;
    std::memcpy(static_cast<void*>(&own), &raw, sizeof raw);
    return own;
  };
  const auto store = [](T* at, const Own& own) {
    Raw raw;
    std::memcpy(&raw, static_cast<const void*>(&own), sizeof raw);
    *reinterpret_cast<Raw*>(at) = raw;
  };
#pragma unroll 1
  for (int column = threadIdx.x / kSharers; column < columns; column += kThreads / kSharers) {
    T* at = to + column * S::kChunkPitch + c;
    const int down_pitch = columns * S::kChunkPitch;
    const typename S::Position along = samples.across[column];
    const bool inside = along.sample.low >= 0 && c < channels;
    const T* const left = low + (inside ? int64_t{along.sample.low} * low_pixel + c : 0);
    const T* const right = low + (inside ? int64_t{along.sample.high} * low_pixel + c : 0);
    const auto blend_row = [&](int row, float2(&values)[2]) {
      const int64_t down = row * low_row;
      const Own a = load(left + down), b = load(right + down);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        values[i] = blended(unpacked(a.v[i]), unpacked(b.v[i]), along.sample.weight, along.rest);
      }
    };
    float2 above[2], below[2];
    int row_below = -1;
    const typename S::Position *down = samples.down, *const end = down + rows;
    while (down < end) {
      const Sample now = down->sample;
      if (!inside || now.low < 0) {
        store(at, Own{});
        ++down, at += down_pitch;
        continue;
      }
      if (now.low == row_below) {
        above[0] = below[0], above[1] = below[1];
      } else {
        blend_row(now.low, above);
      }
      blend_row(now.high, below);
      row_below = now.high;
#pragma unroll 1
      do {  // of all rows between the same two
        Own own;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 value = blended(above[i], below[i], down->sample.weight, down->rest);
          own.v[i] = Refined ? clamp(value) : packed(value, T{});
        }
        store(at, own);
        ++down, at += down_pitch;
      } while (down->sample.low == now.low);
    }
  }
}

// high (H, W, high channels) and low (h, w, low channels) -> out (H, W, out channels), a tile of
// image block / (tiles down and across).
template <class T, int Low, int High, int Out, int Taps, int Across>
__global__ void __launch_bounds__(kThreads, 2)
    feature_fusion_kernel(const T* high, const T* low, const float* __restrict__ refine_weight,
                          const float* __restrict__ refine_bias, const T* __restrict__ low_weight,
                          const T* __restrict__ high_weight, const float* __restrict__ bias,
                          T* __restrict__ out, int height, int width, int low_height, int low_width,
                          int tiles_down, int tiles_across, int low_channels, int high_channels,
                          int out_channels, int row_pitch, int dilation, int64_t y_scale,
                          int64_t y_shift, int64_t y_divisor, int64_t x_scale, int64_t x_shift,
                          int64_t x_divisor, float least, float most, int64_t high_image,
                          int high_pixel, int64_t low_image, int low_pixel, int64_t out_image,
                          int out_pixel) {
  constexpr int kSide = Taps == 9 ? 3 : 1;
  using S = Sizes<T, Out, kSide, Across>;
  using Product = Shares<S::kPixels, Out, kWarps>;
  if (Low) low_channels = Low;
  if (High) high_channels = High;
  if (Low) out_channels = Out, row_pitch = S::kRow;
  if (kSide == 1) dilation = 0;
  const Positions down_at(kRows, dilation), along_at(Across, dilation);
  T* const memory = reinterpret_cast<T*>(shared_memory());
  auto& samples = *reinterpret_cast<typename S::Samples*>(memory + S::kTile);
  T* const resized = reinterpret_cast<T*>(&samples + 1);
  const auto left = [&](int chunk) { return memory + chunk % 2 * S::kLeft; };
  const auto right = [&](int chunk) { return memory + 2 * S::kLeft + chunk % 2 * S::kRight; };

  const int across = blockIdx.x % tiles_across, down = blockIdx.x / tiles_across % tiles_down;
  const int64_t image = blockIdx.x / tiles_across / tiles_down;
  const int top = down * kRows, start = across * Across;
  high += image * high_image;
  low += image * low_image;
  out += image * out_image;
  const int first_column = blockIdx.y * Out;

  const int low_chunks = divided_up(low_channels, S::kChunk);
  const int chunks = low_chunks + divided_up(high_channels, S::kChunk);
  const auto queue_right = [&](int chunk) {
    const bool of_low = chunk < low_chunks;
    const int first = (of_low ? chunk : chunk - low_chunks) * S::kChunk;
    copy_matrix<S::kChunk, S::kRow, S::kRowPitch, kThreads>(
        right(chunk),
        (of_low ? low_weight : high_weight) + int64_t{first} * row_pitch + first_column, row_pitch,
        Low && High ? S::kChunk : (of_low ? low_channels : high_channels) - first,
        Low ? S::kRow : row_pitch - first_column);
  };
  const auto queue_left = [&](int chunk) {  // of low it is computed
    if (const int first = (chunk - low_chunks) * S::kChunk; first >= 0) {
      constexpr int kVectors = S::kChunk / kPerVector<T>;
#pragma unroll
      for (int i = 0; i < S::kPixels * kVectors; i += kThreads) {
        const int at = i + threadIdx.x, pixel = at / kVectors;
        const int within = at % kVectors * kPerVector<T>;
        if (S::kPixels * kVectors < kThreads && at >= S::kPixels * kVectors) break;
        const int y = top + pixel / Across, z = start + pixel % Across;
        const bool exists = y < height && z < width && (High || first + within < high_channels);
        async_copy_16(left(chunk) + pixel * S::kChunkPitch + within,
                      exists ? high + (int64_t{y} * width + z) * high_pixel + first + within : high,
                      exists);
      }
    }
  };

  queue_right(0);
  typename Product::Tile total;
  const int own_column = first_column + Product::column();
  total.start(bias + own_column, Low ? S::kRow : row_pitch - own_column);
  const auto position = [&](int64_t at, int size, int64_t scale, int64_t shift, int64_t divisor,
                            int low_size) {
    const bool exists = at >= 0 && at < size;
    const Sample one =
        exists ? sample(int(at), {scale, shift, divisor}, low_size) : Sample{-1, -1, 0};
    return typename S::Position{one, 1 - one.weight};
  };
  if (const int i = threadIdx.x; i <= down_at.count) {
    const int64_t at = i < down_at.count ? top + down_at.at(i, kRows, dilation) : -1;
    samples.down[i] = position(at, height, y_scale, y_shift, y_divisor, low_height);
  } else if (const int j = i - kThreads / 2; j >= 0 && j < along_at.count) {
    samples.across[j] = position(start + along_at.at(j, Across, dilation), width, x_scale, x_shift,
                                 x_divisor, low_width);
  }
  // What this warp refines, if it does.
  const int warp = threadIdx.x / 32;
  const int unit_channel = warp / S::kUnitsAcross * 8 % S::kChunk;
  const int unit_pixel = warp % S::kUnitsAcross * 16 * S::kUnit;
  using Window = DilatedHalo<Across, S::kChunkPitch>;
  const Depthwise<S::kUnit, S::kChunkPitch, Low == 0, T, Window> depthwise(
      {along_at.count, down_at.apart, along_at.apart}, unit_pixel);
  const Clamp<T> relu(0, INFINITY), clamp(least, most);
  __syncthreads();
  wait_for_launches_before();
  queue_left(0);
  async_commit();
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    if (chunk < low_chunks) {
      const int first = chunk * S::kChunk, c = first + unit_channel;
      const bool exists = Low || c < low_channels;
      resize<kSide == 1, T, S>(low + first, kSide == 1 ? left(chunk) : resized, samples,
                               down_at.count, along_at.count, low_channels - first,
                               int64_t{low_width} * low_pixel, low_pixel);
      if constexpr (kSide > 1) {
        const Filter<T> filter(Filter<T>::own(refine_weight + (exists ? c : 0)), low_channels);
        __syncthreads();
        if (S::kUnits >= kWarps || warp < S::kUnits) {
          if (exists) {
            depthwise(resized + unit_channel, left(chunk) + unit_channel, filter, refine_bias + c,
                      relu);
          } else {
            clear<S::kUnit, S::kChunkPitch>(left(chunk) + unit_pixel * S::kChunkPitch +
                                            unit_channel);
          }
        }
      }
    }
    async_wait<0>();
    __syncthreads();  // after which nobody multiplies the chunk before
    if (chunk + 1 < chunks) {
      queue_right(chunk + 1);
      queue_left(chunk + 1);
      async_commit();
    }
    multiply<S::kChunk, S::kChunkPitch, S::kRowPitch>(
        total, left(chunk) + Product::row() * S::kChunkPitch, right(chunk) + Product::column());
  }
  __syncthreads();

  T* const tile = memory;
  total.for_each([&](int row, int column, float2& pair) {
    put(tile + (Product::row() + row) * S::kRowPitch + Product::column() + column, clamp(pair));
  });
  __syncthreads();
  store_tile<kRows, Across, S::kRow, S::kRowPitch, kThreads>(
      out + (int64_t{top} * width + start) * out_pixel + first_column, tile,
      int64_t{width} * out_pixel, out_pixel, height - top, width - start,
      min(out_channels - first_column, Out));
}

template <class T, int Low, int High, int Out, int Taps, int Across = 16>
void run(const fastscnn_feature_fusion& op, fastscnn_stream stream) {
  using S = Sizes<T, Out, Taps == 9 ? 3 : 1, Across>;
  const Bounds end = bounds_of(op.activation);
  const Resize y = resize_of(op.low_height, op.height, op.align_corners);
  const Resize x = resize_of(op.low_width, op.width, op.align_corners);
  const int low_channels = computed_channels(op.low_channels),
            high_channels = computed_channels(op.high_channels);
  const int out_channels = computed_channels(op.out_channels);
  const int row_pitch = padded_columns(out_channels);
  const int64_t tiles_down = divided_up(op.height, kRows);
  const int64_t tiles_across = divided_up(op.width, Across);
  const Shape shape{op.images * tiles_down * tiles_across, kThreads, S::shared(op.dilation),
                    divided_up(out_channels, Out)};
  FASTSCNN_LAUNCH((feature_fusion_kernel<T, Low, High, Out, Taps, Across>), shape, stream, op.high,
                  op.low, op.refine_weight, op.refine_bias, op.low_weight, op.high_weight, op.bias,
                  op.out, op.height, op.width, op.low_height, op.low_width, tiles_down,
                  tiles_across, low_channels, high_channels, out_channels, row_pitch, op.dilation,
                  y.scale, y.shift, y.divisor, x.scale, x.shift, x.divisor, end.low, end.high,
                  op.high_image, op.high_pixel, op.low_image, op.low_pixel, op.out_image,
                  op.out_pixel);
}

// The instantiation for these channels, the general one for others; with narrower tiles where the
// taps of wide ones would touch more columns than shared memory holds.
template <class T, int Taps>
void select(const fastscnn_feature_fusion& op, fastscnn_stream stream) {
  if constexpr (Taps == 9) {
    if (op.dilation > kMostDilation) return run<T, 0, 0, kMostColumns, Taps, 8>(op, stream);
  }
  if (computed_channels(op.low_channels) == 128 && computed_channels(op.high_channels) == 64 &&
      computed_channels(op.out_channels) == 128) {
    return run<T, 128, 64, 128, Taps>(op, stream);
  }
  with_columns(op.out_channels, [&](auto columns) { run<T, 0, 0, columns, Taps>(op, stream); });
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
  with_columns(refine.out_channels,
               [&](auto columns) { run<T, 0, 0, columns, 1>(refine, stream); });
  select<T, 1>(rest, after(stream));
}

}  // namespace
}  // namespace fastscnn::cuda

int fastscnn_cuda_feature_fusion(const fastscnn_feature_fusion* op, fastscnn_stream stream) {
  namespace fc = fastscnn::cuda;
  return fc::status_of([&] {
    const fc::Arguments rules(op->type, op->images, op->activation);
    rules.fusion(*op);
    rules.aligned("refine_weight", op->refine_weight);
    rules.aligned("refine_bias", op->refine_bias);
    rules.aligned("low_weight", op->low_weight);
    rules.aligned("high_weight", op->high_weight);
    rules.aligned("bias", op->bias);
    fc::with_type(op->type, [&](auto element) {
      using T = decltype(element);
      op->dense ? fc::run_dense<T>(*op, stream) : fc::select<T, 9>(*op, stream);
    });
  });
}
