// feature_fusion in int8: low is resized, refined, multiplied and added to high's product, bytes
// each.
//
// A block owns 4 x 16 pixels that lie the dilation apart, with up to 128 of their output channels:
// their taps, which are the same pixels and those around them, are resized once and lie in shared
// memory as a halo. Both 1x1s are one product over the channels of low and then of high, chunk by
// chunk, 64 bytes of a pixel. A dense refinement is a 1x1 at low's size, and what it leaves is a
// grid of convolution_int8.cuh.
#include "arguments.cuh"
#include "convolution_int8.cuh"
#include "depthwise_int8.cuh"

namespace fastscnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 4, kAcross = 16, kPixels = kRows * kAcross;  // of a tile
constexpr int kHaloRows = kRows + 2, kHaloColumns = kAcross + 2;
constexpr int kChunk = 64;
constexpr int kPitch = kChunk + kVector;
constexpr int kVectors = kChunk / kVector;
constexpr int kUnit = 2;  // a warp refines 16 kUnit pixels of 16 channels
constexpr int kUnitsAcross = kPixels / (16 * kUnit);
static_assert(kUnitsAcross * (kChunk / 16) == kWarps);
using Window = Halo<1, kAcross, kPitch>;

// What a tile samples at the rows and columns of its halo; low < 0 outside of the image.
struct Samples {
  FixedSample down[kHaloRows], across[kHaloColumns];
};

// Shared memory in bytes: the left and right matrices of two chunks, the halo of one.
template <int Columns>
struct Sizes {
  static constexpr int kLeft = kPixels * kPitch;
  static constexpr int kRight = Columns * kPitch;
  static constexpr int kHalo = kHaloRows * kHaloColumns * kPitch;
  static constexpr int kMatrices = 2 * (kLeft + kRight) + kHalo;
  static constexpr size_t kShared = kMatrices + sizeof(Samples);
};

// 64 bytes of low at the samples' positions. A warp has a row; a thread has eight channels and
// walks along a quarter of it: the column of low that is right of one position often is left of the
// next.
__device__ __forceinline__ void resize(const Byte* low, Byte* halo, const Samples& samples,
                                       int channels, int low_width, int low_pixel) {
  constexpr int kOwn = 8, kSharers = kChunk / kOwn, kWalks = 32 / kSharers;
  struct Column {
    BlendedWord words[kOwn / 4];
  };
  const int row = threadIdx.x / 32, c = threadIdx.x % kSharers * kOwn;
  if (row >= kHaloRows) return;
  const FixedSample down = samples.down[row];
  const bool exists = down.low >= 0 && c < channels;
  const int64_t low_row = int64_t{low_width} * low_pixel;
  const Byte* const above = low + down.low * low_row + c;
  const Byte* const below = low + down.high * low_row + c;
  const auto load = [&](int column) {
    const uint2 a = *reinterpret_cast<const uint2*>(above + int64_t{column} * low_pixel);
    const uint2 b = *reinterpret_cast<const uint2*>(below + int64_t{column} * low_pixel);
    return Column{{{a.x, b.x, down.shares}, {a.y, b.y, down.shares}}};
  };
  const int walk = threadIdx.x / kSharers % kWalks;
  const int begin = walk * kHaloColumns / kWalks, end = (walk + 1) * kHaloColumns / kWalks;
  Byte* to = halo + (row * kHaloColumns + begin) * kPitch + c;
  Column right;
  int at = -1;  // where it lies
#pragma unroll
  for (int i = 0; i < divided_up(kHaloColumns, kWalks); ++i, to += kPitch) {
    if (begin + i >= end) break;
    const FixedSample along = samples.across[begin + i];
    uint2 result = make_uint2(0, 0);
    if (exists && along.low >= 0) {
      const Column left = at == along.low ? right : load(along.low);
      right = load(along.high);
      at = along.high;
      result = make_uint2(blended(left.words[0], right.words[0], along),
                          blended(left.words[1], right.words[1], along));
    }
    *reinterpret_cast<uint2*>(to) = result;
  }
}

// high (H, W, high_terms) and low (h, w, low_terms) -> Columns channels of out (H, W,
// out_channels): a tile of the pixels that lie the dilation apart from each other, block / (tiles
// down and across) of all such and all images.
template <int Columns>
__global__ void __launch_bounds__(kThreads, 2) feature_fusion_int8_kernel(
    const Byte* high, const Byte* low, const uint32_t* __restrict__ refine_weight,
    const int* __restrict__ refine_bias, const float* __restrict__ refine_multiplier,
    const int* __restrict__ refine_zero, const Byte* __restrict__ low_weight,
    const Byte* __restrict__ high_weight, const int* __restrict__ bias,
    const float* __restrict__ multiplier, const int* __restrict__ zero, Byte* __restrict__ out,
    int height, int width, int low_height, int low_width, int phases_down, int phases_across,
    int tiles_down, int tiles_across, int low_terms, int high_terms, int out_channels, int rows,
    int dilation, int align_corners, int64_t high_image, int high_pixel, int64_t low_image,
    int low_pixel, int64_t out_image, int out_pixel) {
  using S = Sizes<Columns>;
  using Product = Shares<kPixels, Columns, kWarps>;
  constexpr int kTiles = Product::kColumns;
  static_assert(Product::kRows == 1);
  Byte* const memory = shared_memory();
  Byte* const halo = memory + 2 * (S::kLeft + S::kRight);
  auto& samples = *reinterpret_cast<Samples*>(memory + S::kMatrices);
  const auto left = [&](int chunk) { return memory + chunk % 2 * S::kLeft; };
  const auto right = [&](int chunk) { return memory + 2 * S::kLeft + chunk % 2 * S::kRight; };

  uint32_t block = blockIdx.x;
  const auto next = [&](uint32_t count) {
    const uint32_t number = block % count;
    block /= count;
    return int(number);
  };
  const int across = next(tiles_across), down = next(tiles_down);
  const int first_across = next(phases_across), first_down = next(phases_down);
  const int64_t top = first_down + int64_t{down} * kRows * dilation;
  const int64_t start = first_across + int64_t{across} * kAcross * dilation;
  wait_for_launches_before();
  if (top >= height || start >= width) return;
  high += block * high_image;
  low += block * low_image;
  out += block * out_image;
  const int first_column = blockIdx.y * Columns;

  const int low_chunks = divided_up(low_terms, kChunk);
  const int chunks = low_chunks + divided_up(high_terms, kChunk);
  // A thread has the same 16 bytes of several pixels.
  const int within = threadIdx.x % kVectors * kVector, own_pixel = threadIdx.x / kVectors;
  static_assert(kPixels * kVectors == kThreads);
  const int64_t own_y = top + own_pixel / kAcross * int64_t{dilation};
  const int64_t own_z = start + own_pixel % kAcross * int64_t{dilation};
  const bool own_exists = own_y < height && own_z < width;
  const Byte* const own_high = own_exists ? high + (own_y * width + own_z) * high_pixel : high;
  const auto queue = [&](int chunk) {
    const bool of_low = chunk < low_chunks;
    const int first = (of_low ? chunk : chunk - low_chunks) * kChunk;
    const int depth = of_low ? low_terms : high_terms;
    const Byte* const from = of_low ? low_weight : high_weight;
    copy_rows<Columns, kChunk, kPitch, kThreads, kTiles / 2>(
        right(chunk), from + int64_t{first_column} * depth + first, depth, rows - first_column,
        depth - first);
    if (!of_low) {
      const bool exists = own_exists && first + within < depth;
      async_copy_16(left(chunk) + own_pixel * kPitch + within,
                    exists ? own_high + first + within : high, exists);
    }
    async_commit();
  };

  queue(0);
  Sums<1, kTiles> total;
  total.template start_fours<kTiles / 2>(bias + first_column + Product::column(),
                                         rows - first_column - Product::column());
  const auto sample_at = [&](int64_t at, int size, int low_size) {
    const bool exists = at >= 0 && at < size;
    return exists ? fixed_sample(int(at), low_size, size, align_corners) : FixedSample{-1, -1, 0};
  };
  if (const int i = threadIdx.x; i < kHaloRows) {
    samples.down[i] = sample_at(top + (i - 1) * int64_t{dilation}, height, low_height);
  } else if (const int j = i - kThreads / 2; j >= 0 && j < kHaloColumns) {
    samples.across[j] = sample_at(start + (j - 1) * int64_t{dilation}, width, low_width);
  }
  // What this warp refines.
  const int warp = threadIdx.x / 32;
  const int unit_channel = warp / kUnitsAcross * 16, unit_pixel = warp % kUnitsAcross * 16 * kUnit;
  const int zero_of_refined = *refine_zero;
  const ByteSelect<4> select;
  __syncthreads();
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    if (chunk < low_chunks) {
      const int first = chunk * kChunk, c = first + unit_channel;
      const bool exists = c < low_terms;
      resize(low + first, halo, samples, low_terms - first, low_width, low_pixel);
      const ByFours own(refine_weight, refine_bias, refine_multiplier, low_terms, exists ? c : 0);
      __syncthreads();
      if (exists) {  // of others the 1x1 has zeros
        depthwise<kUnit, kPitch>(Window{}, halo + unit_channel, left(chunk) + unit_channel,
                                 unit_pixel, own, select, zero_of_refined);
      }
    }
    async_wait<0>();
    if (chunk >= low_chunks) to_factors(left(chunk) + own_pixel * kPitch + within);
    __syncthreads();  // after which nobody multiplies the chunk before
    if (chunk + 1 < chunks) queue(chunk + 1);
    multiply<kChunk, kPitch, kPitch>(total, left(chunk) + Product::row() * kPitch,
                                     right(chunk) + Product::column() * kPitch);
  }

  const int own_column = first_column + Product::column() + own_four<kTiles / 2>();
  if (own_column >= out_channels) return;
  store_pixels<Product, kAcross>(total, multiplier + own_column, *zero, top, start, dilation,
                                 height, width, out + own_column, out_pixel);
}

template <int Columns>
void run(const fastscnn_feature_fusion_int8& op, fastscnn_stream stream) {
  const int64_t phases_down = std::min<int64_t>(op.dilation, op.height);
  const int64_t phases_across = std::min<int64_t>(op.dilation, op.width);
  const int64_t tiles_down = divided_up(divided_up(op.height, op.dilation), kRows);
  const int64_t tiles_across = divided_up(divided_up(op.width, op.dilation), kAcross);
  const int out_channels = padded_terms(op.out_channels);
  const Shape shape{op.images * phases_down * phases_across * tiles_down * tiles_across, kThreads,
                    Sizes<Columns>::kShared, divided_up(out_channels, Columns)};
  FASTSCNN_LAUNCH((feature_fusion_int8_kernel<Columns>), shape, stream, op.high, op.low,
                  op.refine_weight, op.refine_bias, op.refine_multiplier, op.refine_zero,
                  op.low_weight, op.high_weight, op.bias, op.multiplier, op.zero, op.out, op.height,
                  op.width, op.low_height, op.low_width, phases_down, phases_across, tiles_down,
                  tiles_across, padded_terms(op.low_channels), padded_terms(op.high_channels),
                  out_channels, padded_rows(op.out_channels), op.dilation, op.align_corners,
                  op.high_image, op.high_pixel, op.low_image, op.low_pixel, op.out_image,
                  op.out_pixel);
}

void run_dense(const fastscnn_feature_fusion_int8& op, fastscnn_stream stream) {
  const int64_t refined_image = op.low_height * op.low_width * op.low_pixel;
  convolve({op.low_channels, op.low_channels, 1, op.images, op.low_height, op.low_width,
            op.low_image, op.low_pixel, refined_image, op.low_pixel, op.low, op.refine_weight,
            op.refine_bias, op.refine_multiplier, op.refine_zero, op.refine_zero, op.refined},
           stream);
  IntegerConvolution both{op.high_channels, op.out_channels, 1,
                          op.images,        op.height,       op.width,
                          op.high_image,    op.high_pixel,   op.out_image,
                          op.out_pixel,     op.high,         op.high_weight,
                          op.bias,          op.multiplier,   op.zero,
                          op.zero,          op.out};
  both.grid_channels = both.mid = padded_terms(op.low_channels);
  both.grid_height = op.low_height;
  both.grid_width = op.low_width;
  both.grid_image = refined_image;
  both.grid_pixel = op.low_pixel;
  both.grids = op.refined;
  both.grid_weight = op.low_weight;
  both.floor = op.refine_zero;
  both.align_corners = op.align_corners;
  convolve(both, after(stream));
}

}  // namespace
}  // namespace fastscnn::cuda

int fastscnn_cuda_feature_fusion_int8(const fastscnn_feature_fusion_int8* op,
                                      fastscnn_stream stream) {
  namespace fc = fastscnn::cuda;
  return fc::status_of([&] {
    const fc::Arguments rules(op->images);
    rules.fusion(*op);
    rules.aligned("refine_weight", op->refine_weight);
    rules.aligned("refine_bias", op->refine_bias);
    rules.aligned("refine_multiplier", op->refine_multiplier);
    rules.aligned("refine_zero", op->refine_zero);
    rules.aligned("low_weight", op->low_weight);
    rules.aligned("high_weight", op->high_weight);
    rules.aligned("bias", op->bias);
    rules.aligned("multiplier", op->multiplier);
    rules.aligned("zero", op->zero);
    if (op->dense) return fc::run_dense(*op, stream);
    op->out_channels > 64 ? fc::run<128>(*op, stream) : fc::run<64>(*op, stream);
  });
}
