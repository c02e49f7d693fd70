// dsconv in int8: depthwise 3x3 -> 1x1 [-> 1x1 to floats], bytes each; the depthwise result stays
// in shared memory.
//
// As in dsconv.cu a block owns a tile of pixels with all their output channels (at free widths 64;
// of the last 1x1's 32). A chunk is as many input channels as there are up to 128, at free widths
// 64; then a chunk's halo and its columns of the 1x1 arrive while the chunk before is computed.
#include <type_traits>

#include "arguments.cuh"
#include "depthwise_int8.cuh"

namespace fastscnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kLastColumns = 32;  // classes that a block computes

// Sizes for In and Out channels at Stride; 0 for what is known only at run time. Without a Stride
// what lies in shared memory is not a halo but the pixels of each tap, whatever stride and
// dilation.
template <int In, int Out, int Stride>
struct Sizes {
  static constexpr int kAcross = 16;  // pixels of a tile's row
  // Narrow channels leave registers and shared memory for twice as many.
  static constexpr int kRows = In == 32 ? 8 : 4;
  static constexpr int kPixels = kRows * kAcross;
  static constexpr int kChunk = In ? padded_terms(In) : 64;  // input channels
  static constexpr int kChunkPitch = pitch<Byte>(kChunk);
  static constexpr int kColumns = Out ? Out : 64;
  static constexpr int kRow = power_of_two(kColumns);
  static constexpr int kRowPitch = pitch<Byte>(kRow);
  static constexpr int kHaloRows = Stride ? (kRows - 1) * Stride + 3 : 9 * kRows;
  static constexpr int kHaloColumns = Stride ? (kAcross - 1) * Stride + 3 : kAcross;
  static constexpr int kStages = In || !Stride ? 1 : 2;
  // A warp sums up 16 kUnit pixels of 16 channels.
  static constexpr int kUnit = kPixels * kChunk / (256 * kWarps);
  using Window = std::conditional_t<Stride != 0, Halo<Stride, kAcross, kChunkPitch>,
                                    Windows<kPixels, kAcross, kChunkPitch>>;
  using Product = Shares<kPixels, kColumns, kWarps>;
  using Tile = Sums<Product::kRows, Product::kColumns>;
  static constexpr int kPairs = pairs_of(Product::kColumns, kThreads / (kChunk / kVector));

  // Shared memory in bytes: the halo of each stage, the chunk's columns of the 1x1, the depthwise
  // result.
  static constexpr int kHalo = kHaloRows * kHaloColumns * kChunkPitch;
  static constexpr int kRight = rounded_up(kColumns, 16) * kChunkPitch;
  static constexpr int kLeft = kPixels * kChunkPitch;
  static constexpr int kPipeline = kStages * kHalo + kRight + kLeft;
  // After the 1x1, in the same memory: its result and the last 1x1's weights.
  static constexpr int kResult = kPixels * kRowPitch;
  static constexpr int kLast = kLastColumns * kRowPitch;

  static constexpr size_t shared(bool last) {
    const size_t after = kResult + (last ? kLast : 0);
    return kPipeline > after ? kPipeline : after;
  }
};

// x (H, W, channels) -> out (H', W', channels or classes), a tile of image block / (tiles down and
// across).
template <int In, int Out, int Stride, bool Last>
__global__ void __launch_bounds__(kThreads, 2) dsconv_int8_kernel(
    const Byte* x, const uint32_t* __restrict__ depthwise_weight,
    const int* __restrict__ depthwise_bias, const float* __restrict__ depthwise_multiplier,
    const int* __restrict__ depthwise_zero, const Byte* __restrict__ pointwise_weight,
    const int* __restrict__ pointwise_bias, const float* __restrict__ pointwise_multiplier,
    const int* __restrict__ pointwise_zero, const Byte* __restrict__ last_weight,
    const int* __restrict__ last_bias, const float* __restrict__ last_multiplier,
    std::conditional_t<Last, float, Byte>* __restrict__ out, int height, int width, int out_height,
    int out_width, int tiles_down, int tiles_across, int in_channels, int out_channels,
    int last_channels, int last_columns, int stride, int dilation, int64_t x_image, int x_pixel,
    int64_t out_image, int out_pixel, int64_t out_channel) {
  using S = Sizes<In, Out, Stride>;
  using Product = typename S::Product;
  using LastProduct = Shares<S::kPixels, kLastColumns, kWarps>;
  if (In) in_channels = In;
  if (Out) out_channels = Out;
  const int terms = padded_terms(in_channels), rows = padded_rows(out_channels);
  Byte* const memory = shared_memory();
  Byte* const right = memory + S::kStages * S::kHalo;
  Byte* const left = right + S::kRight;

  const int across = blockIdx.x % tiles_across, down = blockIdx.x / tiles_across % tiles_down;
  const int64_t image = blockIdx.x / tiles_across / tiles_down;
  const int top = down * S::kRows, start = across * S::kAcross;
  x += image * x_image;
  out += image * out_image;
  const int first_class = blockIdx.y * kLastColumns;
  const int first_column = Last ? 0 : blockIdx.y * S::kColumns;
  const int end_column = Last ? out_channels : first_column + S::kColumns;

  // So many threads have a pixel, of which they copy a chunk: of each group of the halo's rows the
  // same one.
  constexpr int kSharers = S::kChunk / kVector;
  constexpr int kGroup = kThreads / kSharers / S::kHaloColumns;
  static_assert(kGroup > 0 && (Stride != 0 || kGroup == S::kRows));
  const int within = threadIdx.x % kSharers * kVector, own_slot = threadIdx.x / kSharers;
  const bool copies = own_slot < kGroup * S::kHaloColumns;
  const int2 in_group = S::Window::position(own_slot);
  const auto halo = [&](int chunk) { return memory + chunk % S::kStages * S::kHalo; };
  const auto queue_halo = [&](int chunk) {
    if (!copies) return;
    Byte* const to = halo(chunk) + own_slot * S::kChunkPitch + within;
    const int c = chunk * S::kChunk + within;
    const bool exists = In || c < terms;
    if constexpr (Stride == 0) {  // a group is a tap
#pragma unroll 1
      for (int tap = 0; tap < 9; ++tap) {
        const int y = (top + in_group.x) * stride + (tap / 3 - 1) * dilation;
        const int z = (start + in_group.y) * stride + (tap % 3 - 1) * dilation;
        async_copy_16(to + S::Window::known(tap), x + (int64_t{y} * width + z) * x_pixel + c,
                      exists && y >= 0 && y < height && z >= 0 && z < width);
      }
    } else {
      int y = top * Stride + in_group.x - 1;
      const int z = start * Stride + in_group.y - 1;
      const Byte* from = x + (int64_t{y} * width + z) * x_pixel + c;
      constexpr int kUnrolled = In ? divided_up(S::kHaloRows, kGroup) : 1;
#pragma unroll kUnrolled
      for (int first = 0; first < S::kHaloRows; first += kGroup) {
        if (first + kGroup > S::kHaloRows && in_group.x + first >= S::kHaloRows) break;
        async_copy_16(to + first * S::kHaloColumns * S::kChunkPitch, from,
                      exists && y >= 0 && y < height && z >= 0 && z < width);
        y += kGroup;
        from += int64_t{kGroup} * width * x_pixel;
      }
    }
  };

  const auto queue_right = [&](int chunk, int o) {
    constexpr int kRight = rounded_up(S::kColumns, 16);
    const int first = chunk * S::kChunk;
    copy_rows<kRight, S::kChunk, S::kChunkPitch, kThreads, S::kPairs>(
        right, pointwise_weight + int64_t{o} * terms + first, terms, Out ? kRight : rows - o,
        In ? S::kChunk : terms - first);
  };
  queue_right(0, first_column);
  wait_for_launches_before();

  Sums<LastProduct::kRows, LastProduct::kColumns> result;
  if constexpr (Last) {
    const int k = first_class + LastProduct::column();
    result.start(last_bias + k, last_columns - k);
  }
  const int chunks = divided_up(terms, S::kChunk);
  // What this warp sums up.
  constexpr int kUnitsAcross = S::kPixels / (16 * S::kUnit);
  const int unit_channel = threadIdx.x / 32 / kUnitsAcross * 16;
  const int unit_pixel = threadIdx.x / 32 % kUnitsAcross * 16 * S::kUnit;
  const ByteSelect<4> select;
  for (int o = first_column; o < end_column; o += S::kColumns) {
    typename S::Tile total;
    const int own = o + Product::column(), columns = rows - own;
    if constexpr (S::kPairs != 0) {
      total.template start_fours<S::kPairs>(pointwise_bias + own, Out ? S::kColumns : columns);
    } else {
      total.start(pointwise_bias + own, Out ? S::kColumns : columns);
    }
    if (S::kStages > 1) {
      queue_halo(0);
      async_commit();
    }
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if (S::kStages == 1) {
        queue_halo(chunk);
        async_commit();
      }
      if (chunk > 0 || o > first_column) queue_right(chunk, o);
      async_commit();
      if (S::kStages > 1 && chunk + 1 < chunks) queue_halo(chunk + 1);
      async_commit();
      // Of channels that do not exist the 1x1 has zeros.
      const int c = chunk * S::kChunk + unit_channel;
      const bool exists = In || c < terms;
      const ByFours own(depthwise_weight, depthwise_bias, depthwise_multiplier, terms,
                        exists ? c : 0);
      async_wait<2>();
      __syncthreads();
      if (exists) {
        depthwise<S::kUnit, S::kChunkPitch>(typename S::Window{}, halo(chunk) + unit_channel,
                                            left + unit_channel, unit_pixel, own, select,
                                            *depthwise_zero);
      }
      async_wait<1>();
      __syncthreads();
      multiply<S::kChunk, S::kChunkPitch, S::kChunkPitch>(
          total, left + Product::row() * S::kChunkPitch,
          right + Product::column() * S::kChunkPitch);
      __syncthreads();
    }

    Byte* const tile = memory;
    Byte* const last = memory + S::kResult;
    if constexpr (Last) {
      copy_rows<kLastColumns, S::kColumns, S::kRowPitch, kThreads, 0>(
          last, last_weight + int64_t{first_class} * rows + o, rows, last_columns - first_class,
          Out ? S::kColumns : rows - o);
      async_commit();
    }
    store_bytes<S::kPairs, Last, S::kRowPitch>(
        total, pointwise_multiplier + own, Out ? S::kColumns : columns, *pointwise_zero,
        tile + Product::row() * S::kRowPitch + Product::column());
    async_wait<0>();
    __syncthreads();
    if constexpr (Last) {
      multiply<S::kColumns, S::kRowPitch, S::kRowPitch>(
          result, tile + LastProduct::row() * S::kRowPitch,
          last + LastProduct::column() * S::kRowPitch);
    } else {
      store_tile<S::kRows, S::kAcross, S::kRow, S::kRowPitch, kThreads>(
          out + (int64_t{top} * out_width + start) * out_pixel + o, tile,
          int64_t{out_width} * out_pixel, out_pixel, out_height - top, out_width - start,
          computed_channels(out_channels) - o);
    }
    __syncthreads();
  }
  if constexpr (Last) {
    result.for_each([&](int row, int column, int even, int odd) {
      const int pixel = LastProduct::row() + row;
      const int y = top + pixel / S::kAcross, z = start + pixel % S::kAcross;
      if (y >= out_height || z >= out_width) return;
      float* const to = out + (int64_t{y} * out_width + z) * out_pixel;
      const int k = first_class + LastProduct::column() + column;
      if (k < last_channels) to[k * out_channel] = scaled(even, last_multiplier[k]);
      if (k + 1 < last_channels) to[(k + 1) * out_channel] = scaled(odd, last_multiplier[k + 1]);
    });
  }
}

template <int In, int Out, int Stride, bool Last>
void run(const fastscnn_dsconv_int8& op, fastscnn_stream stream) {
  using S = Sizes<In, Out, Stride>;
  const int last_channels =
      is_interleaved(op) ? computed_channels(op.last_channels) : op.last_channels;
  const int last_columns = Last ? power_of_two(computed_channels(op.last_channels)) : 0;
  const int64_t tiles_down = divided_up(op.out_height, S::kRows);
  const int64_t tiles_across = divided_up(op.out_width, S::kAcross);
  const Shape shape{
      op.images * tiles_down * tiles_across, kThreads, S::shared(Last),
      Last ? divided_up(last_columns, kLastColumns) : divided_up(op.out_channels, S::kColumns)};
  FASTSCNN_LAUNCH(
      (dsconv_int8_kernel<In, Out, Stride, Last>), shape, stream, op.x, op.depthwise_weight,
      op.depthwise_bias, op.depthwise_multiplier, op.depthwise_zero, op.pointwise_weight,
      op.pointwise_bias, op.pointwise_multiplier, op.pointwise_zero, op.last_weight, op.last_bias,
      op.last_multiplier, op.out, op.height, op.width, op.out_height, op.out_width, tiles_down,
      tiles_across, op.in_channels, op.out_channels, last_channels, last_columns, op.stride,
      op.dilation, op.x_image, op.x_pixel, op.out_image, op.out_pixel, op.out_channel);
}

// The instantiation for these channels and stride, a general one for others.
void select(const fastscnn_dsconv_int8& op, fastscnn_stream stream) {
  const auto is_dense = [&](int stride) { return op.stride == stride && op.dilation == 1; };
  const auto is = [&](int in, int out, int stride) {
    return op.in_channels == in && op.out_channels == out && is_dense(stride);
  };
  if (!op.last_channels) {
    if (is(32, 48, 2)) return run<32, 48, 2, false>(op, stream);
    if (is(48, 64, 2)) return run<48, 64, 2, false>(op, stream);
    if (is(128, 128, 1)) return run<128, 128, 1, false>(op, stream);
    if (is_dense(1)) return run<0, 0, 1, false>(op, stream);
    if (is_dense(2)) return run<0, 0, 2, false>(op, stream);
    return run<0, 0, 0, false>(op, stream);
  }
  if (is(128, 128, 1)) return run<128, 128, 1, true>(op, stream);
  if (is_dense(1)) return run<0, 0, 1, true>(op, stream);
  run<0, 0, 0, true>(op, stream);
}

}  // namespace
}  // namespace fastscnn::cuda

int fastscnn_cuda_dsconv_int8(const fastscnn_dsconv_int8* op, fastscnn_stream stream) {
  namespace fc = fastscnn::cuda;
  return fc::status_of([&] {
    const fc::Arguments rules(op->images);
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
    rules.aligned("depthwise_multiplier", op->depthwise_multiplier);
    rules.aligned("depthwise_zero", op->depthwise_zero);
    rules.aligned("pointwise_weight", op->pointwise_weight);
    rules.aligned("pointwise_bias", op->pointwise_bias);
    rules.aligned("pointwise_multiplier", op->pointwise_multiplier);
    rules.aligned("pointwise_zero", op->pointwise_zero);
    const int64_t height = op->out_height, width = op->out_width;
    if (!op->last_channels) {
      rules.result(op->out, op->out_channels, height, width, op->out_image, op->out_pixel);
    } else {
      rules.aligned("last_weight", op->last_weight);
      rules.aligned("last_bias", op->last_bias);
      rules.aligned("last_multiplier", op->last_multiplier);
      rules.classes(*op, fc::is_interleaved(*op), FASTSCNN_FLOAT32);
    }
    fc::select(*op, stream);
  });
}
