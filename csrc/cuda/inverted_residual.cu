// inverted_residual: 1x1 + bias + act -> depthwise 3x3 + bias + act -> 1x1 + bias [+ x]; what is
// expanded stays in shared memory.
//
// A block owns a tile of 32 pixels with up to 128 of their output channels, and a slice of the
// expanded channels. The tile's halo of x arrives once; then, chunk by chunk of the slice, the halo
// is expanded, summed up by the depthwise and projected onto sums that stay in registers. Of the
// weights, the next chunk's expanding columns arrive during the depthwise and the projection, the
// chunk's projecting rows during the expansion and the depthwise, so that one buffer of each is
// enough. Where there are several slices their sums meet in slices.cuh.
#include "cut.cuh"
#include "depthwise.cuh"

namespace fastscnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// For how many blocks a multiprocessor must have registers. sm_75's shared memory has room for one
// of the network's widths, and at stride 2 two would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <int In, int Stride>
constexpr int kBlocks = In == 0 && Stride == 1 ? 2 : 1;
#else
template <int In, int Stride>
constexpr int kBlocks = 2;
#endif

// Sizes for In channels expanded to Mid, of which a block computes Out, at Stride. In and Mid are 0
// where all are known only at run time: then x's halo lies whole in shared memory where that has
// room for it, and else arrives in steps of channels for each chunk anew, one step while the one
// before is multiplied.
template <class T, int In, int Mid, int Out, int Stride>
struct Sizes {
  static constexpr int kAcross = 8, kRows = 4;  // of a tile
  static constexpr int kPixels = kRows * kAcross;
  static constexpr int kHaloRows = (kRows - 1) * Stride + 3;
  static constexpr int kHaloColumns = (kAcross - 1) * Stride + 3;
  static constexpr int kHaloPixels = kHaloRows * kHaloColumns;
  // Warps of the expansion: of pixels, and of channels.
  static constexpr int kDown = 2, kAlong = kWarps / kDown;
  static constexpr int kSlots = rounded_up(kHaloPixels, 16 * kDown);
  static constexpr int kTiles = kSlots / (16 * kDown);  // a warp's, of 16 pixels
  // Expanded channels; 576 are 18 chunks of 32, which slices share evenly, but 9 of 64.
  static constexpr int kChunk = sizeof(T) == 2 && Stride == 1 && Mid != 576 ? 64 : 32;
  static constexpr int kOwnChannels = kChunk / kAlong;  // that a warp expands
  static constexpr int kStep = 64 / int(sizeof(T));     // x's channels that arrive at a time, if so
  static constexpr int kColumns = rounded_up(Out, 8 * kWarps / (kPixels / 16));
  static constexpr int kRow = power_of_two(kColumns);  // of the projecting rows
  // A warp sums up 16 kUnit pixels of 8 channels at a time.
  static constexpr int kUnit = sizeof(T) == 2 ? 2 : 1;
  static constexpr int kUnitsAcross = kPixels / (16 * kUnit);
  static constexpr int kUnits = kChunk / 8 * kUnitsAcross;

  static constexpr int kChunkPitch = pitch<T>(kChunk);
  static constexpr int kRowPitch = pitch<T>(kRow);
  using Window = Halo<Stride, kAcross, kChunkPitch>;

  // Shared memory: which slots are inside the image, a word each.
  static constexpr size_t kInside = kSlots * sizeof(uint32_t);
  // After it, in elements: the expanded halo, the depthwise result, the projecting rows, then each
  // stage's halo of x and expanding columns. Where no two warps sum up the same channels, the
  // result takes the place of the halo.
  static constexpr int kHalo = kSlots * kChunkPitch;
  static constexpr int kLeft = kUnitsAcross > 1 ? kPixels * kChunkPitch : 0;
  static constexpr int kProject = kChunk * kRowPitch;
  static constexpr Counted kCounted{240, 260, 30, 30};
  static constexpr int kWork = kHalo + kLeft + kProject;
  // In the end the result takes their place.
  static_assert(kPixels * kRowPitch <= kWork);

  // Where x's channels come in steps of `step`, and the next step's lie beside those in use.
  struct Input {
    int step, stages;

    __host__ __device__ constexpr int pixel_pitch() const { return pitch<T>(step); }
    __host__ __device__ constexpr int stage() const { return kSlots * pixel_pitch(); }
    __host__ __device__ constexpr int expand_stage() const {
      return rounded_up(step, kStep) * kChunkPitch;
    }
    __host__ __device__ constexpr int elements() const {
      return kWork + stages * (stage() + expand_stage());
    }
    __host__ __device__ constexpr size_t shared() const { return kInside + elements() * sizeof(T); }
  };
  // A block's share of the smallest shared memory that runs the type: sm_75's, sm_86's.
  static constexpr size_t kMostShared = (sizeof(T) == 2 ? 64 : 99) * 1024;

  __host__ __device__ static constexpr Input input(int in_channels) {
    const Input whole{in_channels, 1};
    if (In || whole.shared() <= kMostShared) return whole;
    return {kStep, 2};
  }
};

// x (H, W, in_channels) -> out (H', W', out_channels): tile block x of image block / (tiles down
// and across), slice y % slices of the expanded channels, y / slices-th columns of the result.
template <class T, int In, int Mid, int Out, int Stride>
__global__ void __launch_bounds__(kThreads, kBlocks<In, Stride>) inverted_residual_kernel(
    const T* x, const T* __restrict__ expand_weight, const float* __restrict__ expand_bias,
    const float* __restrict__ depthwise_weight, const float* __restrict__ depthwise_bias,
    const T* __restrict__ project_weight, const float* __restrict__ project_bias,
    float4* __restrict__ partials, int* __restrict__ counters, T* __restrict__ out, int height,
    int width, int out_height, int out_width, int tiles_down, int tiles_across, int in_channels,
    int mid_channels, int out_channels, int row_pitch, int step, int stages, int slices,
    int slice_channels, int residual, float low, float high, int64_t x_image, int x_pixel,
    int64_t out_image, int out_pixel) {
  using S = Sizes<T, In, Mid, Out, Stride>;
  using Product = Shares<S::kPixels, S::kColumns, kWarps>;
  if (In) in_channels = In;
  if (Mid) mid_channels = Mid;
  if (In) out_channels = Out, row_pitch = S::kRow;
  // Kept in a register, as it is: else each tap's distance is multiplied anew.
  const int mid_pitch = Mid ? rounded_up(Mid, 64) : kept(rounded_up(mid_channels, 64));
  const auto sizes = In ? S::input(In) : typename S::Input{step, stages};
  uint32_t* const inside = reinterpret_cast<uint32_t*>(shared_memory());
  T* const halo = reinterpret_cast<T*>(shared_memory() + S::kInside);
  T* const left = S::kLeft ? halo + S::kHalo : halo;
  T* const project = halo + S::kHalo + S::kLeft;
  T* const input = halo + S::kWork;
  T* const expand = input + sizes.stages * sizes.stage();

  const int across = blockIdx.x % tiles_across, down = blockIdx.x / tiles_across % tiles_down;
  const int64_t image = blockIdx.x / tiles_across / tiles_down;
  const int top = down * S::kRows, start = across * S::kAcross;
  x += image * x_image;
  out += image * out_image;
  const int column_block = In ? 0 : blockIdx.y / slices, slice = blockIdx.y - column_block * slices;
  const int first_column = column_block * S::kColumns, stored = computed_channels(out_channels);
  const int begin = slice * slice_channels, end = kept(min(begin + slice_channels, mid_channels));
  const Clamp<T> clamp(low, high);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // Four threads have a slot, of which they copy 64 adjacent bytes at a time.
  int stage = 0;
  const auto queue_input = [&](int first) {
    constexpr int kSharers = 4, kPass = kThreads / kSharers;
    constexpr int kUnrolled = In ? In / (kSharers * kPerVector<T>) : 1;
    // Kept, so that where wide x lies is not held in registers over the chunks.
    const unsigned thread = In ? threadIdx.x : kept(threadIdx.x);
    const int within = thread % kSharers * kPerVector<T>;
#pragma unroll
    for (int pass = 0; pass < S::kSlots; pass += kPass) {
      const int at = pass + thread / kSharers;
      if (pass + kPass > S::kSlots && at >= S::kSlots) break;
      const int2 in_halo = S::Window::position(at);
      const int row = top * Stride + in_halo.x - 1, column = start * Stride + in_halo.y - 1;
      const bool exists =
          at < S::kHaloPixels && row >= 0 && row < height && column >= 0 && column < width;
      if (first == 0 && within == 0) inside[at] = exists ? ~0u : 0u;
      T* to = input + stage * sizes.stage() + at * sizes.pixel_pitch() + within;
      const T* from = exists ? x + (int64_t{row} * width + column) * x_pixel + first + within : x;
      const int step = exists ? kSharers * kPerVector<T> : 0;
      const int end = exists ? in_channels - first : 0;
#pragma unroll kUnrolled
      for (int c = within; c < sizes.step; c += kSharers * kPerVector<T>) {
        async_copy_16(to, from, In ? exists : c < end);
        to += kSharers * kPerVector<T>;
        from += step;
      }
    }
  };
  constexpr int kExpandRows = In ? In : S::kStep;
  Copies<In != 0, kExpandRows, S::kChunk, S::kChunkPitch, kThreads, T> expand_columns(
      expand, expand_weight + begin, mid_pitch, in_channels, S::kChunk);
  const auto queue_expand = [&](int first) {
    auto columns = expand_columns;
    if (sizes.stages > 1) columns.move(first, 0, stage * sizes.expand_stage());
    int k = 0;
#pragma unroll 1
    do {
      columns.queue_below();
      k += kExpandRows;
    } while (k < sizes.step);
  };

  typename Product::Tile total;
  const int own_column = first_column + Product::column();
  if (slice == 0) {
    total.start(project_bias + own_column, In ? S::kColumns : row_pitch - own_column);
  } else {
    total.start();
  }
  queue_expand(0);
  wait_for_launches_before();
  queue_input(0);
  async_commit();
  // What this warp expands: of the halo's slots, and of a chunk's channels.
  const int first_slot = warp / S::kAlong * S::kTiles * 16;
  const int first_channel = warp % S::kAlong * S::kOwnChannels;
  // And sums up, if it does: as many channels and pixels.
  const int unit_channel = warp / S::kUnitsAcross * 8 % S::kChunk;
  const int unit_pixel = warp % S::kUnitsAcross * 16 * S::kUnit;
  const Depthwise<S::kUnit, S::kChunkPitch, In == 0, T, typename S::Window> depthwise({},
                                                                                      unit_pixel);
  // Where they begin, and what moves on with the chunks.
  const T* const own_x =
      kept_at(input, first_slot * sizes.pixel_pitch() + own_left<T>(sizes.pixel_pitch()));
  const uint32_t* const own_slots = kept_at(inside, first_slot + lane / 4);
  const T* const own_columns = kept_at(expand, first_channel + own_right<T>(S::kChunkPitch));
  const T* const own_left_rows =
      kept_at(left, Product::row() * S::kChunkPitch + own_left<T>(S::kChunkPitch));
  const T* const own_project = kept_at(project, Product::column() + own_right<T>(S::kRowPitch));
  const float* own_expand_bias = expand_bias + begin + first_channel;
  const float* own_weight = Filter<T>::own(depthwise_weight + begin + unit_channel);
  const float* own_bias = depthwise_bias + begin + unit_channel;
  Copies<true, S::kChunk, S::kRow, S::kRowPitch, kThreads, T> project_rows(
      project, project_weight + int64_t{begin} * row_pitch + first_column, row_pitch, S::kChunk,
      In ? S::kRow : row_pitch - first_column);
#pragma unroll 1
  for (int chunk = begin; chunk < end; chunk += S::kChunk) {
    Accumulator<S::kTiles, S::kOwnChannels / 8> expanded;
    expanded.start(own_expand_bias);
    const Filter<T> filter(own_weight, mid_pitch);
    async_wait<0>();
    __syncthreads();
    uint32_t own_inside[2 * S::kTiles];
#pragma unroll
    for (int i = 0; i < 2 * S::kTiles; ++i) own_inside[i] = own_slots[8 * i];
    project_rows.queue();
    async_commit();

    if constexpr (In != 0) {
      multiply_own<In, pitch<T>(In), S::kChunkPitch>(expanded, own_x, own_columns);
    } else if (sizes.stages == 1) {
      const T *x_now = own_x, *columns = own_columns;
      const T* const end_columns = columns + sizes.step * S::kChunkPitch;
      if (sizes.step % S::kStep) {
        multiply_own<16, 0, S::kChunkPitch>(expanded, x_now, columns, sizes.pixel_pitch());
        x_now += 16;
        columns += 16 * S::kChunkPitch;
      }
#pragma unroll 1
      while (columns != end_columns) {
        multiply_own<S::kStep, 0, S::kChunkPitch>(expanded, x_now, columns, sizes.pixel_pitch());
        x_now += S::kStep;
        columns += S::kStep * S::kChunkPitch;
      }
    } else {
#pragma unroll 1
      for (int first = 0; first < in_channels; first += S::kStep) {
        const T* const x_now = own_x + stage * sizes.stage();
        const T* const columns = own_columns + stage * sizes.expand_stage();
        if (first) {
          async_wait<0>();
          __syncthreads();
        }
        stage ^= 1;
        if (first + S::kStep < in_channels) {
          queue_input(first + S::kStep);
          queue_expand(first + S::kStep);
          async_commit();
        }
        multiply_own<S::kStep, pitch<T>(S::kStep), S::kChunkPitch>(expanded, x_now, columns);
      }
    }
    // Channels that exist only in memory are zero even where x is infinite.
    if (Mid == 0 && chunk + S::kChunk > mid_channels) {
      expanded.keep_columns(mid_channels - chunk - first_channel);
    }
    // Outside the image it is the expanded value that is zero, not x.
    expanded.for_each([&](int row, int column, float2& pair) {
      put(halo + (first_slot + row) * S::kChunkPitch + first_channel + column,
          masked(clamp(pair), own_inside[row / 8]));
    });
    __syncthreads();
    if (chunk + S::kChunk < end) {
      expand_columns.move(0, S::kChunk, 0);
      if (sizes.stages > 1) queue_input(0);
      queue_expand(0);
    }
    async_commit();
    if (S::kUnits >= kWarps || warp < S::kUnits) {
      depthwise(halo + unit_channel, left + unit_channel, filter, own_bias, clamp);
    }
    async_wait<1>();
    __syncthreads();
    multiply_own<S::kChunk, S::kChunkPitch, S::kRowPitch>(total, own_left_rows, own_project);
    own_expand_bias += S::kChunk;
    own_weight += S::kChunk;
    own_bias += S::kChunk;
  }
  if (slices > 1) {
    const int64_t tile = blockIdx.x + int64_t{column_block} * gridDim.x;
    int* const word = reinterpret_cast<int*>(inside);
    if (!sum_slices<kThreads>(total, partials, counters, tile, slice, slices, word)) return;
  } else {
    __syncthreads();
  }

  T* const result = halo;
  const bool adds = Stride == 1 && (In == 0 || In == Out) && residual;
  if (adds && sizes.stages > 1) {
    copy_addend<S, kThreads>(result, x + first_column, x_pixel, top, start, height, width,
                             in_channels - first_column, [](T*) {});
  }
  if (In == 0 && first_column + S::kColumns > out_channels) {
    total.keep_columns(out_channels - own_column);
  }
  total.for_each([&](int row, int column, float2& pair) {
    const int pixel = Product::row() + row, o = Product::column() + column;
    T* const to = result + pixel * S::kRowPitch + o;
    if (adds) {
      const int at = slot<Stride, S::kHaloColumns>(pixel / S::kAcross + 1, pixel % S::kAcross + 1);
      const float2 own = load_pair(
          sizes.stages > 1 ? to : input + at * sizes.pixel_pitch() + (In ? o : first_column + o));
      pair = {pair.x + own.x, pair.y + own.y};
    }
    store_pair(to, pair);
  });
  __syncthreads();
  store_tile<S::kRows, S::kAcross, S::kRow, S::kRowPitch, kThreads>(
      out + (int64_t{top} * out_width + start) * out_pixel + first_column, result,
      int64_t{out_width} * out_pixel, out_pixel, out_height - top, out_width - start,
      min(stored - first_column, S::kColumns));
}

// Calls `f` with the Sizes for these channels and stride, the general ones for others: those know
// expanded and output channels which exist only in memory.
template <class F>
void with_sizes(const fastscnn_inverted_residual& op, F&& f) {
  with_type(op.type, [&](auto element) {
    using T = decltype(element);
    const auto is = [&](int in, int mid, int out, int stride) {
      return computed_channels(op.in_channels) == in && op.mid_channels == mid &&
             op.out_channels == out && op.stride == stride;
    };
    if (is(64, 384, 64, 1)) return f(Sizes<T, 64, 384, 64, 1>{});
    if (is(64, 384, 64, 2)) return f(Sizes<T, 64, 384, 64, 2>{});
    if (is(64, 384, 96, 2)) return f(Sizes<T, 64, 384, 96, 2>{});
    if (is(96, 576, 96, 1)) return f(Sizes<T, 96, 576, 96, 1>{});
    if (is(96, 576, 128, 1)) return f(Sizes<T, 96, 576, 128, 1>{});
    if (is(128, 768, 128, 1)) return f(Sizes<T, 128, 768, 128, 1>{});
    with_columns(op.out_channels, [&](auto columns) {
      op.stride == 1 ? f(Sizes<T, 0, 0, columns, 1>{}) : f(Sizes<T, 0, 0, columns, 2>{});
    });
  });
}

template <class T, int In, int Mid, int Out, int Stride>
void run(Sizes<T, In, Mid, Out, Stride> sizes, const fastscnn_inverted_residual& op,
         fastscnn_stream stream) {
  const Bounds bounds = bounds_of(op.activation);
  const int in_channels = computed_channels(op.in_channels);
  const int row_pitch = padded_columns(op.out_channels);
  const auto input = sizes.input(in_channels);
  const Cut cut(sizes, op, op.slices);
  const Shape shape{op.images * cut.tiles_down * cut.tiles_across, kThreads, input.shared(),
                    cut.column_blocks * cut.slices};
  FASTSCNN_LAUNCH((inverted_residual_kernel<T, In, Mid, Out, Stride>), shape, stream, op.x,
                  op.expand_weight, op.expand_bias, op.depthwise_weight, op.depthwise_bias,
                  op.project_weight, op.project_bias, op.partials, op.counters, op.out, op.height,
                  op.width, op.out_height, op.out_width, cut.tiles_down, cut.tiles_across,
                  in_channels, op.mid_channels, op.out_channels, row_pitch, input.step,
                  input.stages, cut.slices, cut.slice_chunks * sizes.kChunk, op.residual,
                  bounds.low, bounds.high, op.x_image, op.x_pixel, op.out_image, op.out_pixel);
}

Arguments check_sizes(const fastscnn_inverted_residual& op) {
  const Arguments rules(op.type, op.images, op.activation);
  require_sizes(rules, op);
  return rules;
}

}  // namespace
}  // namespace fastscnn::cuda

int fastscnn_cuda_inverted_residual(const fastscnn_inverted_residual* op, fastscnn_stream stream) {
  namespace fc = fastscnn::cuda;
  return fc::status_of([&] {
    const fc::Arguments rules = fc::check_sizes(*op);
    rules.plane("x", op->x, op->in_channels, op->x_image, op->x_pixel);
    rules.aligned("expand_weight", op->expand_weight);
    rules.aligned("expand_bias", op->expand_bias);
    rules.aligned("depthwise_weight", op->depthwise_weight);
    rules.aligned("depthwise_bias", op->depthwise_bias);
    rules.aligned("project_weight", op->project_weight);
    rules.aligned("project_bias", op->project_bias);
    fc::check_slices(rules, *op);
    rules.result(op->out, op->out_channels, op->out_height, op->out_width, op->out_image,
                 op->out_pixel);
    fc::with_sizes(*op, [&](auto sizes) { fc::run(sizes, *op, stream); });
  });
}

int fastscnn_cuda_inverted_residual_slices(const fastscnn_inverted_residual* op, int processors) {
  namespace fc = fastscnn::cuda;
  return fc::slices_of(*op, processors, [&](auto f) {
    fc::check_sizes(*op);
    fc::with_sizes(*op, f);
  });
}

void fastscnn_cuda_inverted_residual_scratch(const fastscnn_inverted_residual* op, size_t* partials,
                                             size_t* counters) {
  namespace fc = fastscnn::cuda;
  fc::scratch_of(*op, partials, counters, [&](auto f) {
    fc::check_sizes(*op);
    fc::with_sizes(*op, f);
  });
}
