// upsample_classify: bilinear resize of low-resolution logits -> logits, softmax or labels of each
// pixel.
//
// A block owns a tile of output columns in all rows that lie between the same two low rows. For
// each class a thread blends the two low rows along its columns once; every output row is one blend
// more. Maxima, sums and labels stay in registers: full-size logits exist only where asked for.
#include <cfloat>

#include "resize.cuh"

namespace fastscnn::cuda {
namespace {

constexpr int kColumns = 256;  // of a tile
constexpr int kRows = 8;       // that a thread has at a time
constexpr int kMostLow = 128;  // low columns of a tile whose labels are looked at

template <int Output>
struct Sizes {
  static constexpr bool kLabels = Output == FASTSCNN_LABELS;
  // Columns of a thread: a vector of logits; fewer where they have maxima and sums.
  static constexpr int kAcross = kLabels ? 1 : Output == FASTSCNN_LOGITS ? 4 : 2;
  static constexpr int kThreads = kColumns / kAcross;
  static constexpr int kBlocks = (Output == FASTSCNN_PROBABILITIES ? 20 : 24) * 32 / kThreads;
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

// Where a thread's columns sample a low row.
template <class T, int Across>
struct Columns {
  int64_t left[Across], right[Across];
  float weight[Across];

  __device__ __forceinline__ void blend(float (&to)[Across], const T* row) const {
#pragma unroll
    for (int j = 0; j < Across; ++j) {
      to[j] = blended(to_float(row[left[j]]), to_float(row[right[j]]), weight[j]);
    }
  }
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

// The label of one low pixel; -1 where a logit is infinite or NaN.
template <class T>
__device__ __forceinline__ int label_of(const T* x, int classes, int64_t x_class) {
  float largest = -INFINITY, zero = 0;
  int label = 0;
#pragma unroll 4
  for (int k = 0; k < classes; ++k) {
    const float v = to_float(x[k * x_class]);
    zero = fmaf(v, 0, zero);
    if (v > largest) largest = v, label = k;
  }
  return zero == 0 ? label : -1;
}

// x (classes, h, w), any strides -> out (classes, H, W) or labels (H, W); image, low row and tile
// of block / (low rows and tiles across).
template <class T, class Y, int Output>
__global__ void __launch_bounds__(Sizes<Output>::kThreads, Sizes<Output>::kBlocks)
    upsample_classify_kernel(const T* __restrict__ x, Y* __restrict__ out, int classes,
                             int low_height, int low_width, int height, int width, int tiles_across,
                             int64_t y_scale, int64_t y_shift, int64_t y_divisor, int64_t x_scale,
                             int64_t x_shift, int64_t x_divisor, int64_t x_image, int64_t x_class,
                             int64_t x_row, int64_t x_column) {
  using S = Sizes<Output>;
  constexpr int kAcross = S::kAcross;
  const Resize down{y_scale, y_shift, y_divisor}, along{x_scale, x_shift, x_divisor};
  const int start = blockIdx.x % tiles_across * kColumns;
  const int low = blockIdx.x / tiles_across % low_height;
  const int64_t image = blockIdx.x / tiles_across / low_height, plane = int64_t{height} * width;
  const T* const above_row = x + image * x_image + low * x_row;
  const T* const below_row = above_row + (low < low_height - 1 ? x_row : 0);
  out += image * (S::kLabels ? 1 : classes) * plane;
  Rows& shared = *reinterpret_cast<Rows*>(shared_memory());

  // A thread's columns are adjacent where they can be stored as a vector; else threads' are.
  const bool aligned = (reinterpret_cast<uintptr_t>(out) / sizeof(Y) | width) % kAcross == 0;
  const int first_column = start + threadIdx.x * (aligned ? kAcross : 1);
  const int step = aligned ? 1 : S::kThreads;
  Columns<T, kAcross> columns;
  Sample samples[kAcross];
#pragma unroll
  for (int j = 0; j < kAcross; ++j) {
    const int column = first_column + j * step;
    samples[j] = sample(column < width ? column : width - 1, along, low_width);
    columns.left[j] = samples[j].low * x_column;
    columns.right[j] = samples[j].high * x_column;
    columns.weight[j] = samples[j].weight;
  }
  // Calls `f(k, pixel, value)` for each class of the thread's pixels of the rows from `first` on.
  const auto for_each_class = [&](auto f) {
    float weight[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) weight[r] = shared.weight[r];
#pragma unroll 1
    for (int k = 0; k < classes; ++k) {
      float above[kAcross], below[kAcross];
      columns.blend(above, above_row + k * x_class);
      columns.blend(below, below_row + k * x_class);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        Vector<float, kAcross> values;
#pragma unroll
        for (int j = 0; j < kAcross; ++j) values.v[j] = blended(above[j], below[j], weight[r]);
        f(k, r, values);
      }
    }
  };
  const auto store = [&](Y* to, const Vector<float, kAcross>& values) {
    Vector<Y, kAcross> rounded_values;
#pragma unroll
    for (int j = 0; j < kAcross; ++j) rounded_values.v[j] = rounded<Y>(values.v[j]);
    if (aligned) {
      if (first_column < width) {
        *reinterpret_cast<Vector<Y, kAcross>*>(to + first_column) = rounded_values;
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < kAcross; ++j) {
      const int column = first_column + j * step;
      if (column < width) to[column] = rounded_values.v[j];
    }
  };

  if (threadIdx.x < 2) {
    shared.rows[threadIdx.x] = first_row(low + int(threadIdx.x), down, low_height, height);
  }
  // Whether the four low pixels around the thread's pixels are finite and have the same label: then
  // so have all pixels between, since a blend is monotonic in each of its four logits.
  bool same = false, finite = false;
  int label_around = 0;
  if constexpr (S::kLabels) {
    Labels& labels = static_cast<Labels&>(shared);
    if (threadIdx.x == 0) labels.columns[0] = samples[0].low;
    if (threadIdx.x == S::kThreads - 1) labels.columns[1] = samples[0].high;
    __syncthreads();
    const int first_low = labels.columns[0], many = labels.columns[1] - first_low + 1;
    if (many <= kMostLow) {
      const int row = threadIdx.x / kMostLow, column = threadIdx.x % kMostLow;
      if (column < many) {
        const T* const from = row ? below_row : above_row;
        labels.label[row][column] =
            label_of(from + (first_low + column) * x_column, classes, x_class);
      }
      __syncthreads();
      const int left = samples[0].low - first_low, right = samples[0].high - first_low;
      const int a = labels.label[0][left], b = labels.label[0][right];
      const int c = labels.label[1][left], d = labels.label[1][right];
      finite = (a | b | c | d) >= 0;
      same = finite && a == b && a == c && a == d;
      label_around = a;
    }
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
      for_each_class([&](int k, int r, const Vector<float, kAcross>& values) {
        if (first + r < end) store(out + k * plane + int64_t{first + r} * width, values);
      });
    } else if constexpr (Output == FASTSCNN_PROBABILITIES) {
      // The sums of exp(value - largest so far), with one exponential for each value.
      Vector<float, kAcross> largest[kRows], sums[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int j = 0; j < kAcross; ++j) largest[r].v[j] = -FLT_MAX, sums[r].v[j] = 0;
      }
      for_each_class([&](int, int r, const Vector<float, kAcross>& values) {
#pragma unroll
        for (int j = 0; j < kAcross; ++j) {
          const float more = values.v[j] - largest[r].v[j], share = expf(-fabsf(more));
          sums[r].v[j] = more > 0 ? fmaf(sums[r].v[j], share, 1) : sums[r].v[j] + share;
          largest[r].v[j] = fmaxf(largest[r].v[j], values.v[j]);
        }
      });
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int j = 0; j < kAcross; ++j) {
          // An infinite logit makes its pixel NaN, as in torch.
          sums[r].v[j] = 1 / (sums[r].v[j] + (largest[r].v[j] - largest[r].v[j]));
        }
      }
      for_each_class([&](int k, int r, Vector<float, kAcross> values) {
#pragma unroll
        for (int j = 0; j < kAcross; ++j) {
          values.v[j] = expf(values.v[j] - largest[r].v[j]) * sums[r].v[j];
        }
        if (first + r < end) store(out + k * plane + int64_t{first + r} * width, values);
      });
    } else {
      Labels& labels = static_cast<Labels&>(shared);
      int label[kRows];
      float largest[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) label[r] = label_around, largest[r] = -INFINITY;
      if (!same && finite) {
        for_each_class([&](int k, int r, const Vector<float, 1>& value) {
          if (value.v[0] > largest[r]) largest[r] = value.v[0], label[r] = k;
        });
      } else if (!same) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) label[r] = 0;  // where all are -infinity
        for_each_class([&](int k, int r, const Vector<float, 1>& value) {
          if (is_larger(value.v[0], largest[r])) largest[r] = value.v[0], label[r] = k;
        });
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) labels.tile[r][threadIdx.x] = uint8_t(label[r]);
      __syncthreads();
      const auto copy = [&](auto vector) {
        using V = decltype(vector);
        constexpr int kSize = sizeof(V), kVectors = kColumns / kSize;
#pragma unroll 1
        for (int i = threadIdx.x; i < kRows * kVectors; i += S::kThreads) {
          const int r = i / kVectors, column = i % kVectors * kSize;
          if (first + r >= end || start + column >= width) continue;
          *reinterpret_cast<V*>(out + int64_t{first + r} * width + start + column) =
              *reinterpret_cast<const V*>(&labels.tile[r][column]);
        }
      };
      const int alignment = int((reinterpret_cast<uintptr_t>(out) | width) % kVector);
      if (alignment == 0) {
        copy(uint4{});
      } else if (alignment % 4 == 0) {
        copy(uint32_t{});
      } else {
        copy(uint8_t{});
      }
    }
    __syncthreads();
  }
}

template <class T, class Y, int Output>
void run(const fastscnn_upsample_classify& op, fastscnn_stream stream) {
  const Resize y = resize_of(op.low_height, op.height, op.align_corners);
  const Resize x = resize_of(op.low_width, op.width, op.align_corners);
  const int64_t tiles_across = divided_up(op.width, kColumns);
  const Shape shape{op.images * op.low_height * tiles_across, Sizes<Output>::kThreads,
                    Sizes<Output>::kLabels ? sizeof(Labels) : sizeof(Rows)};
  FASTSCNN_LAUNCH((upsample_classify_kernel<T, Y, Output>), shape, stream, op.x, op.out, op.classes,
                  op.low_height, op.low_width, op.height, op.width, tiles_across, y.scale, y.shift,
                  y.divisor, x.scale, x.shift, x.divisor, op.x_image, op.x_class, op.x_row,
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
    fc::require(op->classes >= 1, "classes must be at least 1", op->classes);
    fc::require(!labels || op->classes <= 256, "classes of labels must be at most 256",
                op->classes);
    fc::require(op->low_height >= 1, "low_height must be at least 1", op->low_height);
    fc::require(op->low_width >= 1, "low_width must be at least 1", op->low_width);
    fc::require(labels || op->out_type == op->type || op->type == FASTSCNN_FLOAT32,
                "out_type must be type where that is not float32", op->out_type);
    fc::with_type(op->type, [&](auto element) { fc::select<decltype(element)>(*op, stream); });
  });
}
