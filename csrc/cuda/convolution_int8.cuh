// x -> conv(x), bytes to bytes, 1x1 or 3x3 at stride 1; with grids, of x and of those, resized to
// x's size, side by side.
//
// A block owns 4 x 8 pixels and 64 output channels. Chunk by chunk, 64 bytes of channels, it has
// the tile's pixels (for a 3x3 those around them too) in shared memory: x as it lies, then the
// grids, which are resized to bytes on the way. All taps of a chunk are multiplied from there, a
// step each; weights arrive kStages - 1 steps ahead.
#pragma once

#include "resize_int8.cuh"

namespace fastscnn::cuda {

// x (images, height, width, channels) by `weight` (taps, padded_rows(out_channels),
// padded_terms(in_channels)). What lies outside of x is *outside, of what is resized 0.
//
// Grids: `grid_channels` terms more, by `grid_weight`; each grid has `mid` of them. With `bins`, a
// byte each, they are the branches' grids of bins^2 cells; else one, of grid_height x grid_width,
// which after the resize is at least *floor.
struct IntegerConvolution {
  int in_channels, out_channels, kernel;
  int64_t images, height, width, x_image, x_pixel, out_image, out_pixel;
  const void *x, *weight, *bias, *multiplier, *zero, *outside;
  void* out;
  int grid_channels = 0, mid = 1;
  int64_t bins = 0, grid_height = 0, grid_width = 0, grid_image = 0, grid_pixel = 0;
  const void *grids = nullptr, *grid_weight = nullptr, *floor = nullptr;
  bool align_corners = false;
};

namespace {

// Sizes of a Side x Side convolution; shared memory in bytes.
template <int Side>
struct IntegerConvolutionSizes {
  static constexpr int kThreads = 128;
  static constexpr int kRows = 4, kAcross = 8, kPixels = kRows * kAcross;  // of a tile
  static constexpr int kColumns = 64;
  static constexpr int kChunk = 64;
  static constexpr int kPitch = kChunk + kVector;
  static constexpr int kTaps = Side * Side;
  static constexpr int kHaloRows = kRows + Side - 1, kHaloColumns = kAcross + Side - 1;
  static constexpr int kSlots = kHaloRows * kHaloColumns;
  static constexpr int kStages = 4;
  // A chunk's pixels are overwritten when its taps are.
  static constexpr int kChunkStages = Side == 1 ? kStages : 2;
  static constexpr int kPositions = kHaloRows + kHaloColumns;

  struct Grid {
    int width, first;  // of its cells
    FixedSample samples[kPositions];
  };
  static constexpr int kLeft = kSlots * kPitch;
  static constexpr int kRight = kColumns * kPitch;
  static constexpr int kMatrices = kChunkStages * kLeft + kStages * kRight;

  static size_t shared(int grids) { return kMatrices + grids * sizeof(Grid); }
};

// x (H, W, in_channels), grids (cells, grid_pixel) -> 64 channels of out (H, W, out_channels), a
// tile of image block / (tiles down and across).
template <int Side>
__global__ void __launch_bounds__(IntegerConvolutionSizes<Side>::kThreads, 4)
    convolution_int8_kernel(const Byte* x, const Byte* __restrict__ weight,
                            const int* __restrict__ bias, const float* __restrict__ multiplier,
                            const int* __restrict__ zero, const int* __restrict__ outside,
                            const Byte* grids, const Byte* __restrict__ grid_weight,
                            const int* __restrict__ floor, Byte* __restrict__ out, int height,
                            int width, int tiles_down, int tiles_across, int in_channels,
                            int grid_channels, int out_channels, int rows, int mid, int64_t bins,
                            int grid_height, int grid_width, int align_corners, int64_t x_image,
                            int x_pixel, int64_t grid_image, int grid_pixel, int64_t out_image,
                            int out_pixel) {
  using S = IntegerConvolutionSizes<Side>;
  using Product = Shares<S::kPixels, S::kColumns, S::kThreads / 32>;
  constexpr int kRows = Product::kRows, kTiles = Product::kColumns;
  constexpr int kVectors = S::kChunk / kVector, kPass = S::kThreads / kVectors;
  const int x_chunks = divided_up(in_channels, S::kChunk);
  const int steps = S::kTaps * (x_chunks + divided_up(grid_channels, S::kChunk));
  Byte* const memory = shared_memory();
  auto* const all_grids = reinterpret_cast<typename S::Grid*>(memory + S::kMatrices);
  const auto left = [&](int chunk) { return memory + chunk % S::kChunkStages * S::kLeft; };
  const auto right = [&](int step) {
    return memory + S::kChunkStages * S::kLeft + step % S::kStages * S::kRight;
  };

  const int across = blockIdx.x % tiles_across, down = blockIdx.x / tiles_across % tiles_down;
  const int64_t image = blockIdx.x / tiles_across / tiles_down;
  const int top = down * S::kRows, start = across * S::kAcross;
  const int first_column = blockIdx.y * S::kColumns;
  x += image * x_image;
  grids += image * grid_image;
  out += image * out_image;

  // Where the halo's rows and columns lie on each grid.
  for (int i = threadIdx.x; i < grid_channels / mid * S::kPositions; i += S::kThreads) {
    const int number = i / S::kPositions, position = i % S::kPositions;
    auto& grid = all_grids[number];
    int cells_down = grid_height, cells_across = grid_width, first = 0;
    if (bins) {
      const auto bins_of = [&](int branch) { return int(bins >> 8 * branch & 255); };
      for (int before = 0; before < number; ++before) first += bins_of(before) * bins_of(before);
      cells_down = cells_across = bins_of(number);
    }
    if (position == 0) grid.width = cells_across, grid.first = first;
    const bool along = position >= S::kHaloRows;
    const int at = along ? start + position - S::kHaloRows - Side / 2 : top + position - Side / 2;
    grid.samples[position] = fixed_sample(at < 0 ? 0 : at, along ? cells_across : cells_down,
                                          along ? width : height, align_corners);
  }

  wait_for_launches_before();

  // A thread has the same 16 bytes of a chunk of several pixels.
  const int within = threadIdx.x % kVectors * kVector;
  const auto each_slot = [&](auto act) {
#pragma unroll
    for (int pass = 0; pass < S::kSlots; pass += kPass) {
      const int slot = pass + threadIdx.x / kVectors;
      if (S::kSlots % kPass && slot >= S::kSlots) break;
      act(slot, slot / S::kHaloColumns, slot % S::kHaloColumns);
    }
  };
  const auto is_inside = [&](int row, int column) {
    const int y = top + row - Side / 2, z = start + column - Side / 2;
    return y >= 0 && y < height && z >= 0 && z < width;
  };
  const auto queue_x = [&](int chunk) {
    const int c = chunk * S::kChunk + within;
    const uint32_t around = *outside * 0x01010101u;
    each_slot([&](int slot, int row, int column) {
      Byte* const to = left(chunk) + slot * S::kPitch + within;
      const int64_t pixel = int64_t{top + row - Side / 2} * width + (start + column - Side / 2);
      if (Side == 1 || is_inside(row, column)) {
        const bool exists = (Side > 1 || is_inside(row, column)) && c < in_channels;
        async_copy_16(to, exists ? x + pixel * x_pixel + c : x, exists);
      } else {
        *reinterpret_cast<uint4*>(to) = make_uint4(around, around, around, around);
      }
    });
  };
  const auto resize = [&](int chunk) {
    const int k = (chunk - x_chunks) * S::kChunk + within, number = k / mid;
    const bool exists = k < grid_channels;
    const auto& grid = all_grids[exists ? number : 0];
    const Byte* const cells = grids + int64_t{grid.first} * grid_pixel + (k - number * mid);
    const uint32_t least = floor ? *floor * 0x01010101u : 0;
    each_slot([&](int slot, int row, int column) {
      uint4 result = make_uint4(0, 0, 0, 0);
      if (exists && is_inside(row, column)) {
        result = resized(cells, grid.samples[row], grid.samples[S::kHaloRows + column], grid.width,
                         grid_pixel);
        if (least) {
          result = make_uint4(larger_bytes(result.x, least), larger_bytes(result.y, least),
                              larger_bytes(result.z, least), larger_bytes(result.w, least));
        }
      }
      *reinterpret_cast<uint4*>(left(chunk) + slot * S::kPitch + within) = result;
    });
  };
  const auto depth_of = [&](int chunk) {  // what is left of it from the chunk on
    return chunk < x_chunks ? in_channels - chunk * S::kChunk
                            : grid_channels - (chunk - x_chunks) * S::kChunk;
  };
  const auto queue = [&](int step) {
    const int chunk = step / S::kTaps, tap = step % S::kTaps;
    const bool of_x = chunk < x_chunks;
    const int depth = of_x ? in_channels : grid_channels, rest = depth_of(chunk);
    const Byte* const from = (of_x ? weight : grid_weight) +
                             (int64_t{tap} * rows + first_column) * depth + (depth - rest);
    copy_rows<S::kColumns, S::kChunk, S::kPitch, S::kThreads, kTiles / 2>(
        right(step), from, depth, rows - first_column, rest);
    if (tap == 0 && of_x) queue_x(chunk);
    if (tap == 0 && !of_x) resize(chunk);
  };

  Sums<kRows, kTiles> total;
  const int lane = threadIdx.x % 32;
  const int own_column = first_column + Product::column() + own_four<kTiles / 2>();
  total.template start_fours<kTiles / 2>(bias + first_column + Product::column(),
                                         rows - first_column - Product::column());
  const int own_pixel = Product::row() + lane % 16;
  const int own_slot = own_pixel / S::kAcross * S::kHaloColumns + own_pixel % S::kAcross;
  const int own_left = own_slot * S::kPitch + lane / 16 * kVector;
  const int own_right = Product::column() * S::kPitch + own_right_bytes(S::kPitch);
  __syncthreads();
#pragma unroll 1
  for (int step = 1 - S::kStages; step < steps; ++step) {
    const int chunk = step / S::kTaps, tap = step % S::kTaps;
    if (step >= 0) {
      async_wait<S::kStages - 2>();
      if (tap == 0) {
        each_slot([&](int slot, int, int) { to_factors(left(chunk) + slot * S::kPitch + within); });
      }
      __syncthreads();
    }
    if (step + S::kStages - 1 < steps) queue(step + S::kStages - 1);
    async_commit();
    if (step < 0) continue;
    const Byte* const a =
        left(chunk) + own_left + (tap / Side * S::kHaloColumns + tap % Side) * S::kPitch;
    const Byte* const b = right(step) + own_right;
    if (depth_of(chunk) > 32) {
      multiply_own<S::kChunk, S::kPitch, S::kPitch>(total, a, b);
    } else {
      multiply_own<32, S::kPitch, S::kPitch>(total, a, b);
    }
  }

  if (own_column >= out_channels) return;
  store_pixels<Product, S::kAcross>(total, multiplier + own_column, *zero, top, start, 1, height,
                                    width, out + own_column, out_pixel);
}

template <int Side>
void launch_integer_convolution(const IntegerConvolution& op, fastscnn_stream stream) {
  using S = IntegerConvolutionSizes<Side>;
  const int64_t tiles_down = divided_up(op.height, S::kRows);
  const int64_t tiles_across = divided_up(op.width, S::kAcross);
  const int out_channels = padded_terms(op.out_channels);
  const Shape shape{op.images * tiles_down * tiles_across, S::kThreads,
                    S::shared(op.grid_channels / op.mid), divided_up(out_channels, S::kColumns)};
  FASTSCNN_LAUNCH((convolution_int8_kernel<Side>), shape, stream, op.x, op.weight, op.bias,
                  op.multiplier, op.zero, op.outside, op.grids, op.grid_weight, op.floor, op.out,
                  op.height, op.width, tiles_down, tiles_across, padded_terms(op.in_channels),
                  op.grid_channels, out_channels, padded_rows(op.out_channels), op.mid, op.bins,
                  op.grid_height, op.grid_width, op.align_corners, op.x_image, op.x_pixel,
                  op.grid_image, op.grid_pixel, op.out_image, op.out_pixel);
}

inline void convolve(const IntegerConvolution& op, fastscnn_stream stream) {
  require(op.kernel == 1 || op.kernel == 3, "kernel must be 1 or 3", op.kernel);
  op.kernel == 1 ? launch_integer_convolution<1>(op, stream)
                 : launch_integer_convolution<3>(op, stream);
}

}  // namespace
}  // namespace fastscnn::cuda
