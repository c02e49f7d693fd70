// inverted_residual in int8: 1x1 -> depthwise 3x3 -> 1x1 [+ x], bytes each; what is expanded stays
// in shared memory.
//
// As in inverted_residual.cu a block owns a tile of 32 pixels with up to 128 of their output
// channels, and a slice of the expanded channels, which it takes a chunk at a time. x becomes
// factors where it arrives; what is expanded are bytes, whose zeros surround the image, and what
// the depthwise leaves in their place are factors again. Sums of slices are integers.
#include "cut.cuh"
#include "depthwise_int8.cuh"

namespace fastscnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Sizes for In channels expanded to Mid, of which a block computes Out, at Stride. In and Mid are 0
// where all are known only at run time: then x's halo lies whole in shared memory where that has
// room for it, and else arrives in steps of channels for each chunk anew, one step while the one
// before is multiplied.
template <int In, int Mid, int Out, int Stride>
struct Sizes {
  // Of a tile; what is known only at run time takes registers, too.
  static constexpr int kAcross = 8, kRows = In == 0 && Stride == 2 ? 2 : 4;
  static constexpr int kPixels = kRows * kAcross;
  static constexpr int kHaloRows = (kRows - 1) * Stride + 3;
  static constexpr int kHaloColumns = (kAcross - 1) * Stride + 3;
  static constexpr int kHaloPixels = kHaloRows * kHaloColumns;
  // Expanded channels: what slices share evenly on the GPUs at hand.
  static constexpr int kChunk = Mid == 0 || Stride == 2 ? 64 : 96;
  // Warps of the expansion: of pixels, and of channels, of which each has a multiple of 16.
  static constexpr int kDown = kChunk == 96 ? 4 : 2, kAlong = kWarps / kDown;
  static constexpr int kSlots = rounded_up(kHaloPixels, 16 * kDown);
  static constexpr int kTiles = kSlots / (16 * kDown);  // a warp's, of 16 pixels
  static constexpr int kOwnChannels = kChunk / kAlong;  // that a warp expands
  static constexpr int kStep = 64;                      // x's channels that arrive at a time, if so
  static constexpr int kColumns = rounded_up(Out, 8 * kWarps / (kPixels / 16));
  static constexpr int kRow = power_of_two(kColumns);  // of the result
  static constexpr int kUnits = kChunk / 16;           // of the depthwise: a warp's
  static_assert(kOwnChannels % 16 == 0 && kUnits <= kWarps);
  using Product = Shares<kPixels, kColumns, kWarps>;
  using Tile = Sums<Product::kRows, Product::kColumns>;

  static constexpr int kChunkPitch = pitch<Byte>(kChunk);
  static constexpr int kRowPitch = pitch<Byte>(kRow);
  using Window = Halo<Stride, kAcross, kChunkPitch>;

  // Shared memory in bytes: each stage's halo of x, its expanding rows, the expanded halo, whose
  // place the depthwise result takes, the projecting rows.
  static constexpr int kHalo = kSlots * kChunkPitch;
  static constexpr int kProject = kColumns * kChunkPitch;
  static constexpr Counted kCounted{240, 260, 30, 30};
  // In the end the result takes the place of all but x.
  static constexpr int kResult = kPixels * kRowPitch;

  // Where x's channels come in steps of `step`, and the next step's lie beside those in use.
  struct Input {
    int step, stages;

    __host__ __device__ constexpr int pixel_pitch() const { return pitch<Byte>(step); }
    __host__ __device__ constexpr int stage() const { return kSlots * pixel_pitch(); }
    __host__ __device__ constexpr int expand_stage() const { return kChunk * pixel_pitch(); }
    // After those which slots are inside the image, a word each.
    __host__ __device__ constexpr int bytes() const {
      const int work = stages * expand_stage() + kHalo + kProject;
      return stages * stage() + (work > kResult ? work : kResult);
    }
    __host__ __device__ constexpr size_t shared() const {
      return bytes() + kSlots * sizeof(uint32_t);
    }
  };
  static constexpr size_t kMostShared = 64 * 1024;  // sm_75's

  __host__ __device__ static constexpr Input input(int terms) {
    const Input whole{terms, 1};
    if (In || whole.shared() <= kMostShared) return whole;
    return {kStep, 2};
  }
};

// x (H, W, in_channels) -> out (H', W', out_channels): tile block x of image block / (tiles down
// and across), slice y % slices of the expanded channels, y / slices-th columns of the result.
template <int In, int Mid, int Out, int Stride>
__global__ void __launch_bounds__(kThreads, 2) inverted_residual_int8_kernel(
    const Byte* x, const Byte* __restrict__ expand_weight, const int* __restrict__ expand_bias,
    const float* __restrict__ expand_multiplier, const int* __restrict__ expand_zero,
    const uint32_t* __restrict__ depthwise_weight, const int* __restrict__ depthwise_bias,
    const float* __restrict__ depthwise_multiplier, const int* __restrict__ depthwise_zero,
    const Byte* __restrict__ project_weight, const int* __restrict__ project_bias,
    const float* __restrict__ project_multiplier, const int* __restrict__ project_zero,
    const int* __restrict__ input_zero, const float* __restrict__ residual_multiplier,
    int4* __restrict__ partials, int* __restrict__ counters, Byte* __restrict__ out, int height,
    int width, int out_height, int out_width, int tiles_down, int tiles_across, int terms,
    int mid_channels, int out_channels, int slices, int slice_channels, int residual,
    int64_t x_image, int x_pixel, int64_t out_image, int out_pixel) {
  using S = Sizes<In, Mid, Out, Stride>;
  using Product = typename S::Product;
  if (In) terms = In;
  if (Mid) mid_channels = Mid;
  if (In) out_channels = Out;
  const int rows = padded_rows(out_channels);
  const int mid_pitch = rounded_up(mid_channels, 64);
  const auto sizes = S::input(terms);
  Byte* const input = shared_memory();
  Byte* const expand = input + sizes.stages * sizes.stage();
  Byte* const halo = expand + sizes.stages * sizes.expand_stage();
  Byte* const project = halo + S::kHalo;
  uint32_t* const inside = reinterpret_cast<uint32_t*>(input + sizes.bytes());

  const int across = blockIdx.x % tiles_across, down = blockIdx.x / tiles_across % tiles_down;
  const int64_t image = blockIdx.x / tiles_across / tiles_down;
  const int top = down * S::kRows, start = across * S::kAcross;
  x += image * x_image;
  out += image * out_image;
  const int column_block = In ? 0 : blockIdx.y / slices, slice = blockIdx.y - column_block * slices;
  const int first_column = column_block * S::kColumns;
  const int begin = slice * slice_channels, end = min(begin + slice_channels, mid_channels);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // Four threads have a slot of each group of the halo's rows, of which they copy 64 adjacent bytes
  // at a time, and make factors of what they copied. Slots beyond the halo are outside of the
  // image.
  constexpr int kSharers = 4, kGroup = kThreads / kSharers / S::kHaloColumns;
  static_assert(kGroup > 0 && S::kSlots - S::kHaloPixels <= kThreads);
  const int within = threadIdx.x % kSharers * kVector, own_slot = threadIdx.x / kSharers;
  const bool copies = own_slot < kGroup * S::kHaloColumns;
  const int2 in_group = S::Window::position(own_slot);
  if (S::kHaloPixels + threadIdx.x < S::kSlots) inside[S::kHaloPixels + threadIdx.x] = 0;
  int stage = 0;
  // Calls `f` with the number of slots before each group that the thread has a slot of.
  const auto for_each_group = [&](auto f) {
    if (!copies) return;
    unrolled<divided_up(S::kHaloRows, kGroup)>([&](auto pass) {
      constexpr int first = pass * kGroup;
      if (first + kGroup > S::kHaloRows && in_group.x + first >= S::kHaloRows) return;
      f(Constant<first * S::kHaloColumns>{});
    });
  };
  const auto queue_input = [&](int first) {
    int y = top * Stride + in_group.x - 1;
    const int z = start * Stride + in_group.y - 1;
    const Byte* from = x + (int64_t{y} * width + z) * x_pixel + first + within;
    Byte* const to = input + stage * sizes.stage() + own_slot * sizes.pixel_pitch() + within;
    for_each_group([&](auto before) {
      const bool exists = y >= 0 && y < height && z >= 0 && z < width;
      if (first == 0 && within == 0) inside[before + own_slot] = exists ? ~0u : 0u;
      constexpr int kUnrolled = In ? divided_up(In, kSharers * kVector) : 1;
#pragma unroll kUnrolled
      for (int c = 0; c + within < sizes.step; c += kSharers * kVector) {
        async_copy_16(to + before * sizes.pixel_pitch() + c, from + c,
                      exists && (In || first + within + c < terms));
      }
      y += kGroup;
      from += int64_t{kGroup} * width * x_pixel;
    });
  };
  const auto input_to_factors = [&] {
    Byte* const own = input + stage * sizes.stage() + own_slot * sizes.pixel_pitch();
    for_each_group([&](auto before) {
#pragma unroll
      for (int c = within; c < sizes.step; c += kSharers * kVector) {
        to_factors(own + before * sizes.pixel_pitch() + c);
      }
    });
  };
  constexpr int kBytes = In ? In : kTerms, kXPitch = In ? pitch<Byte>(In) : 0;
  const int x_pitch = sizes.pixel_pitch();
  const auto queue_expand = [&](int first, int chunk) {
#pragma unroll 1
    for (int k = 0; k < sizes.step; k += kBytes) {
      copy_rows<S::kChunk, kBytes, kXPitch, kThreads, 1>(
          expand + stage * sizes.expand_stage() + k,
          expand_weight + int64_t{chunk} * terms + first + k, terms, S::kChunk,
          In ? In : terms - first - k, x_pitch);
    }
  };

  typename S::Tile total;
  const int own_column = first_column + Product::column();
  if (slice == 0) {
    total.start(project_bias + own_column, In ? S::kColumns : rows - own_column);
  } else {
    total.start();
  }
  queue_expand(0, begin);
  wait_for_launches_before();
  queue_input(0);
  async_commit();
  const int zero_of_expanded = *expand_zero, zero_of_depthwise = *depthwise_zero;
  const ByteSelect<3> select;
  // What this warp expands: of the halo's slots, and of a chunk's channels.
  const int first_slot = warp / S::kAlong * S::kTiles * 16;
  const int first_channel = warp % S::kAlong * S::kOwnChannels;
  // And sums up, if it does.
  const int unit_channel = warp % S::kUnits * 16;
  // Where they begin, and what moves on with the chunks.
  const auto own_at = [&](const Byte* matrix, int offset) {
    return kept_at(input, int(matrix - input) + offset);
  };
  const Byte* const own_x = own_at(input, first_slot * x_pitch + own_left_bytes(x_pitch));
  const Byte* const own_rows = own_at(expand, first_channel * x_pitch + own_right_bytes(x_pitch));
  const Byte* const own_left =
      own_at(halo, Product::row() * S::kChunkPitch + own_left_bytes(S::kChunkPitch));
  const Byte* const own_project =
      own_at(project, Product::column() * S::kChunkPitch + own_right_bytes(S::kChunkPitch));
  Byte* const own_halo =
      own_at(halo, (first_slot + lane / 4) * S::kChunkPitch + first_channel + own_four());
  const int* own_expand_bias = expand_bias + begin + first_channel;
  const float* own_expand_multiplier = expand_multiplier + begin + first_channel + own_four();
  const uint32_t* own_weight = depthwise_weight + begin + unit_channel;
  const int* own_bias = depthwise_bias + begin + unit_channel;
  const float* own_multiplier = depthwise_multiplier + begin + unit_channel;
  const RowCopies<S::kColumns, S::kChunk, S::kChunkPitch, kThreads, 0> project_rows(
      project, project_weight + int64_t{first_column} * mid_pitch, mid_pitch);
#pragma unroll 1
  for (int chunk = begin; chunk < end; chunk += S::kChunk) {
    Sums<S::kTiles, S::kOwnChannels / 8> expanded;
    expanded.start_fours(own_expand_bias);
    const InOrder own(own_weight, own_bias, own_multiplier, mid_pitch);
    async_wait<0>();
    if (sizes.stages > 1 || chunk == begin) input_to_factors();
    __syncthreads();
    uint32_t own_inside[2 * S::kTiles];
#pragma unroll
    for (int i = 0; i < 2 * S::kTiles; ++i) own_inside[i] = inside[first_slot + 8 * i + lane / 4];
    project_rows.queue(chunk, In ? S::kColumns : rows - first_column, S::kChunk);
    async_commit();

    for (int first = 0; first < terms; first += sizes.step) {
      const int now = stage;
      if (sizes.stages > 1) {
        if (first) {
          async_wait<0>();
          input_to_factors();
          __syncthreads();
        }
        stage ^= 1;
        if (first + sizes.step < terms) {
          queue_input(first + sizes.step);
          queue_expand(first + sizes.step, chunk);
          async_commit();
        }
      }
      const Byte* x_now = own_x + now * sizes.stage();
      const Byte* rows_now = own_rows + now * sizes.expand_stage();
      if constexpr (In != 0) {
        multiply_own<In, kXPitch, kXPitch>(expanded, x_now, rows_now);
      } else {
#pragma unroll 1
        for (int k = 0; k < sizes.step; k += kTerms) {
          multiply_own<kTerms, 0, 0>(expanded, x_now + k, rows_now + k, x_pitch, x_pitch);
        }
      }
    }
    // Outside the image it is the expanded byte that is zero, not x.
    with_rounding(zero_of_expanded, [&](const auto& rounding) {
#pragma unroll
      for (int j = 0; j < S::kOwnChannels; j += 16) {
        const float4 by = *reinterpret_cast<const float4*>(own_expand_multiplier + j);
#pragma unroll
        for (int i = 0; i < 2 * S::kTiles; ++i) {
          *reinterpret_cast<uint32_t*>(own_halo + 8 * i * S::kChunkPitch + j) =
              requantised(expanded.four(i, j / 8), by, rounding) & own_inside[i];
        }
      }
    });
    __syncthreads();
    if (const int next = chunk + S::kChunk; next < end) {
      if (sizes.stages > 1) queue_input(0);
      queue_expand(0, next);
    }
    async_commit();
    if (S::kUnits == kWarps || warp < S::kUnits) {
      depthwise<S::kPixels / 16, S::kChunkPitch>(typename S::Window{}, halo + unit_channel,
                                                 halo + unit_channel, 0, own, select,
                                                 zero_of_depthwise);
    }
    async_wait<1>();
    __syncthreads();
    multiply_own<S::kChunk, S::kChunkPitch, S::kChunkPitch>(total, own_left, own_project);
    own_expand_bias += S::kChunk;
    own_expand_multiplier += S::kChunk;
    own_weight += S::kChunk;
    own_bias += S::kChunk;
    own_multiplier += S::kChunk;
  }
  if (slices > 1) {
    const int64_t tile = blockIdx.x + int64_t{column_block} * gridDim.x;
    int* const word = reinterpret_cast<int*>(inside);
    if (!sum_slices<kThreads>(total, partials, counters, tile, slice, slices, word)) return;
  } else {
    __syncthreads();
  }

  Byte* const result = expand;
  const bool adds = Stride == 1 && (In == 0 || In == Out) && residual;
  if (adds && sizes.stages > 1) {
    copy_addend<S, kThreads>(result, x + first_column, x_pixel, top, start, height, width,
                             terms - first_column, [](Byte* to) { to_factors(to); });
  }
  const Rounding rounding(*project_zero);
  const int zero_of_x = *input_zero - 128;  // of factors
  const float multiplier_of_x = *residual_multiplier;
  total.for_each([&](int row, int column, int even, int odd) {
    const int pixel = Product::row() + row, o = Product::column() + column;
    Byte* const to = result + pixel * S::kRowPitch + o;
    float2 by{0, 0};
    if (In || first_column + o < rows) {
      by = *reinterpret_cast<const float2*>(project_multiplier + first_column + o);
    }
    float2 pair{scaled(even, by.x), scaled(odd, by.y)};
    if (adds) {
      const int at = slot<Stride, S::kHaloColumns>(pixel / S::kAcross + 1, pixel % S::kAcross + 1);
      const auto own = *reinterpret_cast<const char2*>(
          sizes.stages > 1 ? to : input + at * x_pitch + (In ? o : first_column + o));
      pair.x = __fadd_rn(pair.x, scaled(own.x - zero_of_x, multiplier_of_x));
      pair.y = __fadd_rn(pair.y, scaled(own.y - zero_of_x, multiplier_of_x));
    }
    *reinterpret_cast<uint16_t*>(to) = uint16_t(saturated(rounding(pair.x), rounding(pair.y)));
  });
  __syncthreads();
  store_tile<S::kRows, S::kAcross, S::kRow, S::kRowPitch, kThreads>(
      out + (int64_t{top} * out_width + start) * out_pixel + first_column, result,
      int64_t{out_width} * out_pixel, out_pixel, out_height - top, out_width - start,
      computed_channels(out_channels) - first_column);
}

// Calls `f` with the Sizes for these channels and stride, the general ones for others: those know
// expanded and output channels which exist only in memory.
template <class F>
void with_sizes(const fastscnn_inverted_residual_int8& op, F&& f) {
  const auto is = [&](int in, int mid, int out, int stride) {
    return op.in_channels == in && op.mid_channels == mid && op.out_channels == out &&
           op.stride == stride;
  };
  if (is(64, 384, 64, 1)) return f(Sizes<64, 384, 64, 1>{});
  if (is(64, 384, 64, 2)) return f(Sizes<64, 384, 64, 2>{});
  if (is(64, 384, 96, 2)) return f(Sizes<64, 384, 96, 2>{});
  if (is(96, 576, 96, 1)) return f(Sizes<96, 576, 96, 1>{});
  if (is(96, 576, 128, 1)) return f(Sizes<96, 576, 128, 1>{});
  if (is(128, 768, 128, 1)) return f(Sizes<128, 768, 128, 1>{});
  const bool narrow = op.out_channels <= 64;
  if (op.stride == 1) return narrow ? f(Sizes<0, 0, 64, 1>{}) : f(Sizes<0, 0, 128, 1>{});
  narrow ? f(Sizes<0, 0, 64, 2>{}) : f(Sizes<0, 0, 128, 2>{});
}

template <int In, int Mid, int Out, int Stride>
void run(Sizes<In, Mid, Out, Stride> sizes, const fastscnn_inverted_residual_int8& op,
         fastscnn_stream stream) {
  const int terms = padded_terms(op.in_channels);
  const Cut cut(sizes, op, op.slices);
  const Shape shape{op.images * cut.tiles_down * cut.tiles_across, kThreads,
                    sizes.input(terms).shared(), cut.column_blocks * cut.slices};
  FASTSCNN_LAUNCH((inverted_residual_int8_kernel<In, Mid, Out, Stride>), shape, stream, op.x,
                  op.expand_weight, op.expand_bias, op.expand_multiplier, op.expand_zero,
                  op.depthwise_weight, op.depthwise_bias, op.depthwise_multiplier,
                  op.depthwise_zero, op.project_weight, op.project_bias, op.project_multiplier,
                  op.project_zero, op.input_zero, op.residual_multiplier, op.partials, op.counters,
                  op.out, op.height, op.width, op.out_height, op.out_width, cut.tiles_down,
                  cut.tiles_across, terms, op.mid_channels, op.out_channels, cut.slices,
                  cut.slice_chunks * sizes.kChunk, op.residual, op.x_image, op.x_pixel,
                  op.out_image, op.out_pixel);
}

Arguments check_sizes(const fastscnn_inverted_residual_int8& op) {
  const Arguments rules(op.images);
  require_sizes(rules, op);
  return rules;
}

}  // namespace
}  // namespace fastscnn::cuda

int fastscnn_cuda_inverted_residual_int8(const fastscnn_inverted_residual_int8* op,
                                         fastscnn_stream stream) {
  namespace fc = fastscnn::cuda;
  return fc::status_of([&] {
    const fc::Arguments rules = fc::check_sizes(*op);
    rules.plane("x", op->x, op->in_channels, op->x_image, op->x_pixel);
    rules.aligned("expand_weight", op->expand_weight);
    rules.aligned("expand_bias", op->expand_bias);
    rules.aligned("expand_multiplier", op->expand_multiplier);
    rules.aligned("expand_zero", op->expand_zero);
    rules.aligned("depthwise_weight", op->depthwise_weight);
    rules.aligned("depthwise_bias", op->depthwise_bias);
    rules.aligned("depthwise_multiplier", op->depthwise_multiplier);
    rules.aligned("depthwise_zero", op->depthwise_zero);
    rules.aligned("project_weight", op->project_weight);
    rules.aligned("project_bias", op->project_bias);
    rules.aligned("project_multiplier", op->project_multiplier);
    rules.aligned("project_zero", op->project_zero);
    rules.aligned("input_zero", op->input_zero);
    rules.aligned("residual_multiplier", op->residual_multiplier);
    fc::check_slices(rules, *op);
    rules.result(op->out, op->out_channels, op->out_height, op->out_width, op->out_image,
                 op->out_pixel);
    fc::with_sizes(*op, [&](auto sizes) { fc::run(sizes, *op, stream); });
  });
}

int fastscnn_cuda_inverted_residual_int8_slices(const fastscnn_inverted_residual_int8* op,
                                                int processors) {
  namespace fc = fastscnn::cuda;
  return fc::slices_of(*op, processors, [&](auto f) {
    fc::check_sizes(*op);
    fc::with_sizes(*op, f);
  });
}

void fastscnn_cuda_inverted_residual_int8_scratch(const fastscnn_inverted_residual_int8* op,
                                                  size_t* partials, size_t* counters) {
  namespace fc = fastscnn::cuda;
  fc::scratch_of(*op, partials, counters, [&](auto f) {
    fc::check_sizes(*op);
    fc::with_sizes(*op, f);
  });
}
