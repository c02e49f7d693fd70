// upsample_classify: bilinear resize of low-resolution logits -> logits, softmax or labels of each
// pixel.
//
// A block owns a tile of output columns in all rows that lie between the same two low rows. For
// each class a thread blends the two low rows along its columns once; every output row is one blend
// more. Maxima, sums and labels stay in registers: full-size logits exist only where asked for. One
// class alone has the sigmoid in place of the softmax, and label 1 where its logit is above 0, else
// 0, also where it is NaN.
#include <cfloat>

#include "arguments.cuh"
#include "resize.cuh"

namespace fastscnn::cuda {
namespace {

constexpr int kColumns = 256;  // of a tile
constexpr int kRows = 8;       // that a thread has at a time
constexpr int kNone = 256;     // no label: one more than the last
constexpr int kMostLow = 128;  // low columns of a tile whose labels are looked at

template <int Output>
struct Sizes {
  static constexpr bool kLabels = Output == FASTSCNN_LABELS;
  // Columns of a thread: a vector of logits; fewer where they have maxima and sums.
  static constexpr int kAcross = kLabels ? 1 : Output == FASTSCNN_LOGITS ? 4 : 2;
  static constexpr int kThreads = kColumns / kAcross;
  static constexpr int kWarps = kLabels ? 24 : 20;  // resident
  static constexpr int kBlocks = kWarps * 32 / kThreads;
};

// Shared memory.
struct Rows {
  int rows[2];          // the first output row, and the one after the last
  float weight[kRows];  // of the low row below
};
struct Labels : Rows {
  int columns[2];          // the first and the last low column
  int label[2][kMostLow];  // of the low pixels
  alignas(kVector) uint8_t tile[kRows][kColumns];
};

// A thread's pixels: Across columns in kRows output rows.
template <class T, int Across>
struct Pixels {
  const T* above[Across][2];  // the first class's low pixels to the left and right
  int64_t down;               // from those to the ones below
  float weight[Across];       // of the right ones
  int classes;
  int64_t x_class;
  const float* by_row;  // weights of the ones below

  // Calls `f(class, row, values)` for each class's values of each row. With Finite the logits'
  // differences are finite, and a row costs one instruction for a value.
  template <bool Finite = false, class F>
  __device__ __forceinline__ void for_each(F f) const {
    const T* at[Across][2];
    float below_weight[kRows];
#pragma unroll
    for (int j = 0; j < Across; ++j) at[j][0] = above[j][0], at[j][1] = above[j][1];
#pragma unroll
    for (int r = 0; r < kRows; ++r) below_weight[r] = by_row[r];
#pragma unroll 1
    for (int k = 0; k < classes; ++k) {
      float top[Across], bottom[Across];
#pragma unroll
      for (int j = 0; j < Across; ++j) {
        const T *const left = at[j][0], *const right = at[j][1];
        top[j] = blended(to_float(*left), to_float(*right), weight[j]);
        bottom[j] = blended(to_float(left[down]), to_float(right[down]), weight[j]);
        at[j][0] += x_class;
        at[j][1] += x_class;
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        Vector<float, Across> values;
#pragma unroll
        for (int j = 0; j < Across; ++j) {
          values.v[j] = Finite ? fmaf(bottom[j] - top[j], below_weight[r], top[j])
                               : blended(top[j], bottom[j], below_weight[r]);
        }
        f(k, r, values);
      }
    }
  }
};

// What the four low pixels around a thread's pixels say of their labels.
struct Around {
  bool finite, same;
  int label;
};

// The first output row that samples at or beyond the low row.
__device__ __forceinline__ int first_row(int64_t low, const Resize& resize, int low_height,
                                         int height) {
  if (low == 0 || low == low_height) return low == 0 ? 0 : height;
  const int64_t at = low * resize.divisor - resize.shift;
  const int64_t scale = resize.scale > 0 ? resize.scale : 1;
  const int64_t row = at <= 0 ? 0 : (at + scale - 1) / scale;
  return row < height ? int(row) : height;
}

// As torch.argmax: the first of equal ones, and NaN is the largest of all.
__device__ __forceinline__ bool is_larger(float v, float largest) {
  return v > largest || (v != v && largest == largest);
}

__device__ __forceinline__ float sigmoid(float v) {
  const float e = expf(-fabsf(v));
  return (v > 0 ? 1 : e) / (1 + e);
}

// The label of one low pixel; kNone where a logit is infinite, NaN or so large that its difference
// from another may be infinite.
template <class T>
__device__ __forceinline__ int label_of(const T* x, int classes, int64_t x_class) {
  float largest = -INFINITY, zero = 0;
  int label = 0;
#pragma unroll 4
  for (int k = 0; k < classes; ++k) {
    const float v = to_float(x[k * x_class]);
    zero = fmaf(4 * v, 0, zero);
    if (v > largest) largest = v, label = k;
  }
  return zero == 0 ? label : kNone;
}

// The labels of the low pixels of a tile, and what they say of the thread's column, which samples
// `at`: where all four around are finite and the same, so are the labels of all pixels between,
// since a blend is monotonic in each of its four logits.
template <class T>
__device__ __forceinline__ Around look_around(Labels& shared, const Sample& at, const T* above,
                                              const T* below, int classes, int64_t x_class,
                                              int64_t x_column) {
  const int last = blockDim.x - 1;
  if (threadIdx.x == 0) shared.columns[0] = at.low;
  if (int(threadIdx.x) == last) shared.columns[1] = at.high;
  __syncthreads();
  const int first = shared.columns[0], many = shared.columns[1] - first + 1;
  if (many > kMostLow) return {false, false, 0};
  const int row = threadIdx.x / kMostLow, column = threadIdx.x % kMostLow;
  if (column < many) {
    shared.label[row][column] =
        label_of((row ? below : above) + (first + column) * x_column, classes, x_class);
  }
  __syncthreads();
  const int a = shared.label[0][at.low - first], b = shared.label[0][at.high - first];
  const int c = shared.label[1][at.low - first], d = shared.label[1][at.high - first];
  return {(a | b | c | d) < kNone, a == b && a == c && a == d, a};
}

// Rows of a tile's labels from shared memory to (rows, columns) of `out`.
template <class V>
__device__ __forceinline__ void store_labels(uint8_t* out, int64_t width, const Labels& shared,
                                             int rows, int columns) {
  constexpr int kSize = sizeof(V), kVectors = kColumns / kSize;
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * kVectors; i += kColumns) {
    const int row = i / kVectors, column = i % kVectors * kSize;
    if (row >= rows || column >= columns) continue;
    *reinterpret_cast<V*>(out + row * width + column) =
        *reinterpret_cast<const V*>(&shared.tile[row][column]);
  }
}

// x (classes, h, w), any strides -> out (classes, H, W) or labels (H, W); image, low row and tile
// of block / (low rows and tiles across).
template <class T, class Y, int Output>
__global__ void __launch_bounds__(Sizes<Output>::kThreads, Sizes<Output>::kBlocks)
    upsample_classify_kernel(const T* x, Y* __restrict__ out, int classes, int low_height,
                             int low_width, int height, int width, int tiles_across,
                             int64_t y_scale, int64_t y_shift, int64_t y_divisor, int64_t x_scale,
                             int64_t x_shift, int64_t x_divisor, int64_t x_image, int64_t x_class,
                             int64_t x_row, int64_t x_column) {
  using S = Sizes<Output>;
  constexpr int kAcross = S::kAcross;
  using Values = Vector<float, kAcross>;
  const Resize down{y_scale, y_shift, y_divisor}, along{x_scale, x_shift, x_divisor};
  const int start = blockIdx.x % tiles_across * kColumns;
  const int low = blockIdx.x / tiles_across % low_height;
  const int64_t image = blockIdx.x / tiles_across / low_height, plane = int64_t{height} * width;
  const T* const above = x + image * x_image + low * x_row;
  const int64_t step_down = low < low_height - 1 ? x_row : 0;
  out += image * (S::kLabels ? 1 : classes) * plane;
  Rows& shared = *reinterpret_cast<Rows*>(shared_memory());
  if (threadIdx.x < 2) {
    shared.rows[threadIdx.x] = first_row(low + int(threadIdx.x), down, low_height, height);
  }

  // A thread's columns are adjacent where they can be stored as a vector; else threads' are.
  const bool aligned = (reinterpret_cast<uintptr_t>(out) / sizeof(Y) | width) % kAcross == 0;
  const int first_column = start + threadIdx.x * (aligned ? kAcross : 1);
  const int apart = aligned ? 1 : S::kThreads;
  Pixels<T, kAcross> pixels;
  pixels.down = step_down;
  pixels.classes = classes;
  pixels.x_class = x_class;
  pixels.by_row = shared.weight;
  Sample at;
#pragma unroll
  for (int j = 0; j < kAcross; ++j) {
    const int column = first_column + j * apart;
    at = sample(column < width ? column : width - 1, along, low_width);
    pixels.weight[j] = at.weight;
    pixels.above[j][0] = above + at.low * x_column;
    pixels.above[j][1] = above + at.high * x_column;
  }
  const auto store = [&](int k, int row, const Values& values) {
    Y* const to = out + k * plane + int64_t{row} * width;
    Vector<Y, kAcross> vector;
#pragma unroll
    for (int j = 0; j < kAcross; ++j) vector.v[j] = rounded<Y>(values.v[j]);
    if (aligned) {
      if (first_column < width) {
        *reinterpret_cast<Vector<Y, kAcross>*>(to + first_column) = vector;
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < kAcross; ++j) {
      const int column = first_column + j * apart;
      if (column < width) to[column] = vector.v[j];
    }
  };

  wait_for_launches_before();
  Around around{};
  if constexpr (S::kLabels) {
    around = look_around(static_cast<Labels&>(shared), at, above, above + step_down, classes,
                         x_class, x_column);
  } else {
    __syncthreads();
  }
  const int end = shared.rows[1];
#pragma unroll 1
  for (int first = shared.rows[0]; first < end; first += kRows) {
    if (threadIdx.x < kRows) {
      shared.weight[threadIdx.x] = sample(first + threadIdx.x, down, low_height).weight;
    }
    __syncthreads();
    if constexpr (Output == FASTSCNN_LOGITS) {
      pixels.for_each([&](int k, int r, const Values& values) {
        if (first + r < end) store(k, first + r, values);
      });
    } else if constexpr (Output == FASTSCNN_PROBABILITIES) {
      if (classes == 1) {
        pixels.for_each([&](int k, int r, Values values) {
#pragma unroll
          for (int j = 0; j < kAcross; ++j) values.v[j] = sigmoid(values.v[j]);
          if (first + r < end) store(k, first + r, values);
        });
      } else {
        // The sums of exp(value - the largest so far), with one exponential a value.
        Values largest[kRows], sums[kRows];
#pragma unroll
        for (int i = 0; i < kRows * kAcross; ++i) {
          largest[i / kAcross].v[i % kAcross] = -FLT_MAX;
          sums[i / kAcross].v[i % kAcross] = 0;
        }
        pixels.for_each([&](int, int r, const Values& values) {
#pragma unroll
          for (int j = 0; j < kAcross; ++j) {
            float &most = largest[r].v[j], &sum = sums[r].v[j];
            const float more = values.v[j] - most, share = expf(-fabsf(more));
            sum = more > 0 ? fmaf(sum, share, 1) : sum + share;
            most = fmaxf(most, values.v[j]);
          }
        });
#pragma unroll
        for (int i = 0; i < kRows * kAcross; ++i) {
          const float most = largest[i / kAcross].v[i % kAcross];
          float& sum = sums[i / kAcross].v[i % kAcross];
          sum = 1 / (sum + (most - most));  // an infinite logit makes its pixel NaN, as in torch
        }
        pixels.for_each([&](int k, int r, Values values) {
#pragma unroll
          for (int j = 0; j < kAcross; ++j) {
            values.v[j] = expf(values.v[j] - largest[r].v[j]) * sums[r].v[j];
          }
          if (first + r < end) store(k, first + r, values);
        });
      }
    } else {
      int label[kRows];
      float largest[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        label[r] = around.finite ? around.label : 0;
        largest[r] = -INFINITY;
      }
      if (classes == 1) {
        pixels.for_each([&](int, int r, const Values& value) { label[r] = value.v[0] > 0; });
      } else if (!around.finite) {
        pixels.for_each([&](int k, int r, const Values& value) {
          if (is_larger(value.v[0], largest[r])) largest[r] = value.v[0], label[r] = k;
        });
      } else if (!around.same) {
        pixels.template for_each<true>([&](int k, int r, const Values& value) {
          if (value.v[0] > largest[r]) label[r] = k;
          largest[r] = fmaxf(value.v[0], largest[r]);
        });
      }
      Labels& labels = static_cast<Labels&>(shared);
#pragma unroll
      for (int r = 0; r < kRows; ++r) labels.tile[r][threadIdx.x] = uint8_t(label[r]);
      __syncthreads();
      Y* const to = out + int64_t{first} * width + start;
      const int alignment = int((reinterpret_cast<uintptr_t>(out) | width) % kVector);
      if (alignment == 0) {
        store_labels<uint4>(to, width, labels, end - first, width - start);
      } else if (alignment % 4 == 0) {
        store_labels<uint32_t>(to, width, labels, end - first, width - start);
      } else {
        store_labels<uint8_t>(to, width, labels, end - first, width - start);
      }
    }
    __syncthreads();
  }
}

template <class T, class Y, int Output>
void run(const fastscnn_upsample_classify& op, fastscnn_stream stream) {
  const auto [y_scale, y_shift, y_divisor] = resize_of(op.low_height, op.height, op.align_corners);
  const auto [x_scale, x_shift, x_divisor] = resize_of(op.low_width, op.width, op.align_corners);
  const int64_t tiles_across = divided_up(op.width, kColumns);
  const Shape shape{op.images * op.low_height * tiles_across, Sizes<Output>::kThreads,
                    Sizes<Output>::kLabels ? sizeof(Labels) : sizeof(Rows)};
  FASTSCNN_LAUNCH((upsample_classify_kernel<T, Y, Output>), shape, stream, op.x, op.out, op.classes,
                  op.low_height, op.low_width, op.height, op.width, tiles_across, y_scale, y_shift,
                  y_divisor, x_scale, x_shift, x_divisor, op.x_image, op.x_class, op.x_row,
                  op.x_column);
}

template <class T>
void select(const fastscnn_upsample_classify& op, fastscnn_stream stream) {
  if (op.output == FASTSCNN_LABELS) return run<T, uint8_t, FASTSCNN_LABELS>(op, stream);
  const auto run_as = [&](auto y) {
    using Y = decltype(y);
    if (op.output == FASTSCNN_LOGITS) return run<T, Y, FASTSCNN_LOGITS>(op, stream);
    run<T, Y, FASTSCNN_PROBABILITIES>(op, stream);
  };
  if (op.out_type == op.type) return run_as(T{});
  if constexpr (sizeof(T) == sizeof(float)) with_type(op.out_type, run_as);
}

}  // namespace
}  // namespace fastscnn::cuda

int fastscnn_cuda_upsample_classify(const fastscnn_upsample_classify* op, fastscnn_stream stream) {
  namespace fc = fastscnn::cuda;
  return fc::status_of([&] {
    const bool labels = op->output == FASTSCNN_LABELS;
    fc::require(op->output >= FASTSCNN_LOGITS && op->output <= FASTSCNN_LABELS,
                "an output must be logits, probabilities or labels", op->output);
    const fc::Arguments rules(op->type, op->images);
    rules.at_least(1, "classes", op->classes);
    fc::require(!labels || op->classes <= 256, "classes of labels must be at most 256",
                op->classes);
    rules.at_least(1, "low_height", op->low_height);
    rules.at_least(1, "low_width", op->low_width);
    rules.at_least(1, "height", op->height);
    rules.at_least(1, "width", op->width);
    fc::require(labels || op->out_type == op->type || op->type == FASTSCNN_FLOAT32,
                "out_type must be type where that is not float32", op->out_type);
    rules.present("x", op->x, op->type);
    rules.present("out", op->out, labels ? FASTSCNN_UINT8 : op->out_type);
    fc::with_type(op->type, [&](auto element) { fc::select<decltype(element)>(*op, stream); });
  });
}
