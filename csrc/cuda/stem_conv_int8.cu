// stem_conv in int8: 3x3 at stride 2 of a picture of any strides, of raw uint8, or of floats that
// become pixels on the way.
//
// A block owns a tile of 8 x 32 pixels and 32 output channels. It reads the tile's halo once and
// keeps it as words of up to four channels, so that a tap of a pixel is a word, which goes to the
// tensor cores as it lies: nine taps are 36 terms, the last four of which are a product of 16. The
// weights are in registers, a lane's columns are eight adjacent channels of its pixels.
#include "arguments.cuh"
#include "integers.cuh"

namespace fastscnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kAcross = 32;  // pixels of a tile's row, which a warp has
constexpr int kRows = kThreads / 32;
constexpr int kColumns = 32;  // output channels
constexpr int kStride = 2;
constexpr int kMostChannels = 4;
constexpr int kHaloRows = (kRows - 1) * kStride + 3;
constexpr int kHaloColumns = (kAcross - 1) * kStride + 3;
constexpr int kVectors = divided_up(kHaloColumns, 4);  // of a halo's row, four pixels each
// Words from row to row: neighbouring taps' words lie in different banks, but for one.
constexpr int kPitch = 80;
constexpr int kTiles = kAcross / 16, kTilesAcross = kColumns / 8;  // a warp's

// A picture's pixels as words of factors, whatever its values are.
template <class X, int Channels>
struct Picture {
  const X* x;
  const float *scale, *shift;
  int channels, height, width;
  int64_t channel, row, column;  // strides
  uint32_t pad;                  // the bytes of what surrounds the picture

  // NaN is 0.
  __device__ __forceinline__ int integer(X value, int c) const {
    if constexpr (sizeof(X) == 1) {
      return value;
    } else {
      return Rounding(0)(fmaxf(__fadd_rn(__fmul_rn(value, scale[c]), shift[c]), 0));
    }
  }
  __device__ __forceinline__ uint32_t at(int y, int z) const {
    if (y < 0 || y >= height || z < 0 || z >= width) return word(pad);
    const X* const from = x + (y * row + z * column);
    int bytes[kMostChannels] = {};
#pragma unroll
    for (int c = 0; c < kMostChannels; ++c) {
      if (c < (Channels ? Channels : channels)) bytes[c] = integer(from[c * channel], c);
    }
    return word(saturated(bytes[0], bytes[1], bytes[2], bytes[3]));
  }
  // Factors of a pixel's bytes, of those beyond its channels zeros.
  __device__ __forceinline__ uint32_t word(uint32_t bytes) const {
    const uint32_t mask = ~0u >> (32 - 8 * (Channels ? Channels : channels));
    return factors(bytes) & mask;
  }
};

// Words of factors of four adjacent pixels, which all lie in the picture's row, from bytes that are
// not aligned, by whole words.
template <bool Interleaved, int Channels>
__device__ __forceinline__ uint4 load_four(const uint8_t* from, int64_t plane) {
  const auto load = [](const uint8_t* at, auto& all) {
    const uintptr_t skew = reinterpret_cast<uintptr_t>(at) & 3;
    const uint32_t* const aligned = reinterpret_cast<const uint32_t*>(at - skew);
    constexpr int kCount = sizeof all / sizeof(uint32_t);
    uint32_t raw[kCount + 1];
#pragma unroll
    for (int i = 0; i <= kCount; ++i) raw[i] = aligned[i];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      all[i] = factors(shifted(raw[i], raw[i + 1], 8 * uint32_t(skew)));
    }
  };
  static_assert(Channels == 3);
  if constexpr (Interleaved) {
    uint32_t a[Channels];
    load(from, a);
    constexpr uint32_t kMask = 0xffffff;
    return {a[0] & kMask, shifted(a[0], a[1], 24) & kMask, shifted(a[1], a[2], 16) & kMask,
            a[2] >> 8};
  } else {
    uint32_t planes[Channels][1];
#pragma unroll
    for (int c = 0; c < Channels; ++c) load(from + c * plane, planes[c]);
    const uint32_t low = permuted<0x5140>(planes[0][0], planes[1][0]);
    const uint32_t high = permuted<0x7362>(planes[0][0], planes[1][0]);
    const uint32_t lower = permuted<0x4140>(planes[2][0], 0);
    const uint32_t higher = permuted<0x4342>(planes[2][0], 0);
    return {permuted<0x5410>(low, lower), permuted<0x7632>(low, lower),
            permuted<0x5410>(high, higher), permuted<0x7632>(high, higher)};
  }
}

// The halo whose first pixel is (top, start): of raw planes or interleaved channels four pixels at
// a time, of all else one, along whichever side is closer in memory.
template <class X, int Channels>
__device__ __forceinline__ void load_halo(uint32_t* halo, const Picture<X, Channels>& picture,
                                          int top, int start) {
  if constexpr (sizeof(X) == 1 && Channels == 3) {
    const bool interleaved = picture.channel == 1 && picture.column == Channels;
    if (interleaved || picture.column == 1) {
#pragma unroll 1
      for (int i = threadIdx.x; i < kHaloRows * kVectors; i += kThreads) {
        const int row = i / kVectors, vector = i % kVectors;
        const int y = top + row, z = start + 4 * vector;
        uint4 four;
        // The words that hold the pixels begin up to 3 bytes before them.
        if (y >= 0 && y < picture.height && z >= 3 && z + 8 <= picture.width) {
          const X* const from = picture.x + (y * picture.row + z * (interleaved ? Channels : 1));
          four = interleaved ? load_four<true, Channels>(from, 0)
                             : load_four<false, Channels>(from, picture.channel);
        } else {
          four = {picture.at(y, z), picture.at(y, z + 1), picture.at(y, z + 2),
                  picture.at(y, z + 3)};
        }
        *reinterpret_cast<uint4*>(halo + row * kPitch + 4 * vector) = four;
      }
      return;
    }
  }
  const bool down = picture.row < picture.column;
  const int fast = down ? kHaloRows : kHaloColumns;
#pragma unroll 1
  for (int i = threadIdx.x; i < kHaloRows * kHaloColumns; i += kThreads) {
    const int row = down ? i % fast : i / fast, column = down ? i / fast : i % fast;
    halo[row * kPitch + column] = picture.at(top + row, start + column);
  }
}

// Terms of a row of weights, as lower/gpu_int8.py pads them.
__host__ __device__ constexpr int stem_terms(int channels) {
  return power_of_two(padded_terms(9 * channels));
}

// x (channels, H, W) -> 32 channels of out (H', W', out_channels), a tile of image block / (tiles
// down and across).
template <class X, int Channels>
__global__ void __launch_bounds__(kThreads, 3)
    stem_conv_int8_kernel(const X* x, const Byte* __restrict__ weight, const int* __restrict__ bias,
                          const float* __restrict__ multiplier, const int* __restrict__ zero,
                          const int* __restrict__ pad, const float* __restrict__ scale,
                          const float* __restrict__ shift, uint8_t* __restrict__ out, int height,
                          int width, int out_height, int out_width, int tiles_down,
                          int tiles_across, int channels, int padding, int64_t x_image,
                          int64_t x_channel, int64_t x_row, int64_t x_column, int64_t out_image,
                          int out_pixel) {
  if (Channels) channels = Channels;
  uint32_t* const halo = reinterpret_cast<uint32_t*>(shared_memory());
  const int across = blockIdx.x % tiles_across, down = blockIdx.x / tiles_across % tiles_down;
  const int64_t image = blockIdx.x / tiles_across / tiles_down;
  const int top = down * kRows, start = across * kAcross, first = blockIdx.y * kColumns;
  const uint32_t around = saturated(pad[0], pad[1], pad[2], pad[3]);
  const Picture<X, Channels> picture{x + image * x_image, scale, shift,    channels, height, width,
                                     x_channel,           x_row, x_column, around};
  wait_for_launches_before();
  load_halo<X, Channels>(halo, picture, top * kStride - padding, start * kStride - padding);

  // Of each column the lane's taps: own, own + 4, and 8, of which only the first lanes multiply
  // more than zeros. A tap's word ends in what lies behind its channels; the halo has zeros there.
  const int lane = threadIdx.x % 32, own = lane % 4;
  const int own_channel = first + own_four<kTilesAcross / 2>();
  const int terms = stem_terms(channels), begin = own * channels, bits = begin % 4 * 8;
  const Byte* const row = weight + (first + lane / 8 * 8 + lane / 4 % 2) * terms;
  uint32_t right[kTilesAcross][3];
#pragma unroll
  for (int j = 0; j < kTilesAcross; ++j) {
    const uint32_t* const words = reinterpret_cast<const uint32_t*>(row + 2 * j * terms);
    const uint32_t* const at = words + begin / 4;
    right[j][0] = shifted(at[0], at[1], bits);
    right[j][1] = shifted(at[channels], at[channels + 1], bits);
    right[j][2] = own == 0 ? words[2 * channels] : 0;
  }
  Sums<kTiles, kTilesAcross> total;
  total.template start_fours<kTilesAcross / 2>(bias + first);
  __syncthreads();

  const int warp = threadIdx.x / 32;
  const uint32_t* const window = halo + warp * kStride * kPitch + lane / 4 * kStride;
  const auto tap = [&](int number) { return window + number / 3 * kPitch + number % 3; };
  const uint32_t* const taps[3] = {tap(own), tap(own + 4), tap(8)};
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int at = 16 * i * kStride, next = at + 8 * kStride;
    const uint32_t left[4] = {taps[0][at], taps[0][next], taps[1][at], taps[1][next]};
    const uint32_t last[2] = {taps[2][at], taps[2][next]};
#pragma unroll
    for (int j = 0; j < kTilesAcross; ++j) {
      multiply_add_bytes(total.v[i][j], left, right[j][0], right[j][1]);
      multiply_add_bytes(total.v[i][j], last[0], last[1], right[j][2]);
    }
  }

  const int y = top + warp;
  if (y >= out_height) return;
  out += image * out_image + int64_t{y} * out_width * out_pixel + own_channel;
  const Requantised<kTilesAcross / 2> requantised(multiplier + own_channel);
  with_rounding(*zero, [&](const auto& rounding) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int z = start + 16 * i + 8 * half + lane / 4;
        if (z >= out_width) continue;
        requantised.store(out + int64_t{z} * out_pixel, total.v[i], half, rounding);
      }
    }
  });
}

template <class X, int Channels>
void run(const fastscnn_stem_conv_int8& op, fastscnn_stream stream) {
  const int64_t tiles_down = divided_up(op.out_height, kRows);
  const int64_t tiles_across = divided_up(op.out_width, kAcross);
  const Shape shape{op.images * tiles_down * tiles_across, kThreads,
                    kHaloRows * kPitch * sizeof(uint32_t), divided_up(op.out_channels, kColumns)};
  FASTSCNN_LAUNCH((stem_conv_int8_kernel<X, Channels>), shape, stream, op.x, op.weight, op.bias,
                  op.multiplier, op.zero, op.pad, op.scale, op.shift, op.out, op.height, op.width,
                  op.out_height, op.out_width, tiles_down, tiles_across, op.channels, op.padding,
                  op.x_image, op.x_channel, op.x_row, op.x_column, op.out_image, op.out_pixel);
}

template <class X>
void select(const fastscnn_stem_conv_int8& op, fastscnn_stream stream) {
  op.channels == 3 ? run<X, 3>(op, stream) : run<X, 0>(op, stream);
}

}  // namespace
}  // namespace fastscnn::cuda

int fastscnn_cuda_stem_conv_int8(const fastscnn_stem_conv_int8* op, fastscnn_stream stream) {
  namespace fc = fastscnn::cuda;
  return fc::status_of([&] {
    const fc::Arguments rules(op->images);
    rules.channels("channels", op->channels);
    fc::require(op->channels <= fc::kMostChannels, "channels must be at most 4", op->channels);
    rules.channels("out_channels", op->out_channels);
    fc::require(op->stride == fc::kStride, "stride must be 2", op->stride);
    rules.at_least(0, "padding", op->padding);
    rules.side("height", op->height, op->out_height, op->stride, op->padding, 1);
    rules.side("width", op->width, op->out_width, op->stride, op->padding, 1);
    rules.aligned("weight", op->weight);
    rules.aligned("bias", op->bias);
    rules.aligned("multiplier", op->multiplier);
    rules.aligned("zero", op->zero);
    rules.aligned("pad", op->pad);
    rules.result(op->out, op->out_channels, op->out_height, op->out_width, op->out_image,
                 op->out_pixel);
    const bool raw = op->x_type == FASTSCNN_UINT8;
    fc::require(raw || op->x_type == FASTSCNN_FLOAT32, "x_type must be uint8 or float32",
                op->x_type);
    rules.present("x", op->x, op->x_type);
    if (raw) return fc::select<uint8_t>(*op, stream);
    rules.aligned("scale", op->scale);
    rules.aligned("shift", op->shift);
    fc::select<float>(*op, stream);
  });
}
