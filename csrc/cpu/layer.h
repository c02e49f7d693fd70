// A network's layers as the Python package encodes them (fastscnn_fast/program/layers.py), and
// where each layer's packed weights lie.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastscnn {

enum class Op : int {
  stem_conv,
  dsconv,
  inverted_residual,
  pyramid_pooling,
  feature_fusion,
  upsample_classify
};
enum class Activation : int { none, relu, relu6 };
enum class Output : int { logits, probabilities, labels };
enum class Type : int { f32, bf16, u8 };  // of elements in memory

// How a layer computes. Everything but the products of matrices is fp32 arithmetic in each but
// int8. Their numbers are those of the Python package's records, which has more.
enum class Arithmetic : int {
  float32,   // activations and weights are floats
  bfloat16,  // activations and weights of products are bf16, sums are fp32
  high,      // activations are floats, products are three bf16 products each: about 17 bits
  int8       // activations are uint8, weights int8, sums int32: fastscnn_fast/program/integers.py
};
constexpr int kArithmetics = 4;
struct ArithmeticRecord {
  const char* name;
  Type type;                  // of activations
  Type results;               // of logits
  size_t weight_bytes;        // that an element of a product's B takes
  int depth;                  // B's rows are padded with zeros to a multiple of it
  Arithmetic stem, upsample;  // those of a network's first and last layer
};
constexpr int kTileDepth = 32;  // of AMX tiles of bf16
constexpr ArithmeticRecord kRecords[kArithmetics] = {
    {"float32", Type::f32, Type::f32, 4, 1, Arithmetic::float32, Arithmetic::float32},
    {"bfloat16", Type::bf16, Type::bf16, 2, kTileDepth, Arithmetic::bfloat16, Arithmetic::bfloat16},
    {"high", Type::f32, Type::f32, 2 * 2, kTileDepth, Arithmetic::float32, Arithmetic::high},
    {"int8", Type::u8, Type::f32, 1, 4, Arithmetic::int8, Arithmetic::float32},
};
constexpr const ArithmeticRecord& record_of(Arithmetic a) { return kRecords[int(a)]; }

constexpr int kMaxBins = 8;
constexpr int kMaxInputs = 2;
constexpr int kMaxClassesOfLabels = 256;

constexpr size_t bytes_of(Type t) { return t == Type::f32 ? 4 : t == Type::bf16 ? 2 : 1; }

constexpr int rounded_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
// Channels that a pixel has in memory: whole cache lines, of bytes halves of them. Activations and
// weights have zeros there.
constexpr size_t kLine = 64;
constexpr size_t whole_lines(size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }
constexpr int pixel_pitch(int channels, Type t) {
  return rounded_up(channels, t == Type::u8 ? int(kLine / 2) : int(kLine / bytes_of(t)));
}

constexpr int kPicture = -1;
struct Layer {
  Op op;
  int in, out, mid, last;
  int stride, dilation, padding, kernel;
  Activation activation, mid_activation;
  bool residual, dense, align_corners;
  int arithmetic;          // 0: the network's, else 1 + the number of its own
  int inputs[kMaxInputs];  // the layers read, by index; kPicture: the network's picture
  int input_count;         // 0: a layer that is run alone
  int bins[kMaxBins];
  int bin_count;

  // Size of a 3x3's result along one axis.
  int output_size(int n) const {
    const int pad = op == Op::stem_conv ? padding : 1;
    return (n + 2 * pad - 3) / stride + 1;
  }
  int result_channels() const { return last ? last : out; }
};

// A 1x1 (or, over several segments, 3x3) convolution as a matrix product. B is stored in panels of
// kPanel columns:
//   float32   [n / 16][k][16] floats
//   bfloat16  [n / 16][k / 2][16][2] bf16: neighbouring rows in pairs, as dot products take them
//   high      the same, each panel's upper halves before its lower: b = upper + lower
//   int8      [n / 16][k / 4][16][4] int8; columns, biases and multipliers in the order of
//             `place_of`, in which sums become bytes, those of logits in their own
constexpr int kPanel = 16;
struct Gemm {
  void* panels;
  void* bias;  // floats, of int8 int32; null: none
  int k, n;
  // int8: what becomes of the sums (program/integers.py, requantise).
  float* multiplier;
  int32_t* zero;          // null: they become floats
  float* add_multiplier;  // of what is added, and its zero point
  int32_t* add_zero;
};
// Of n columns those of a whole block of 64 lie in four panels, of the 32 that may be left over in
// two, so that packing within 128 bits what these hold leaves them in their order.
constexpr int kByteBlock = 64;
constexpr int place_in_block(int column) {
  return column / kByteBlock * kByteBlock + column / 4 % 4 * 16 + column % kByteBlock / 16 * 4 +
         column % 4;
}
constexpr int place_of(int column, int n) {
  return column < n / kByteBlock * kByteBlock
             ? place_in_block(column)
             : column / 32 * 32 + column / 4 % 2 * 16 + column % 32 / 8 * 4 + column % 4;
}

// Depthwise 3x3: [9][channels] floats and the bias. Where activations are bf16, each 32 channels
// are stored as the 16 even ones, then the 16 odd ones: the order in which pairs are taken apart.
// In int8 [channels / 64][3 (kx)][64][4] int8, the 64 in the order of `place_in_block`, the last
// four being the three of a column and a zero.
struct Depthwise {
  void* weight;
  void* bias;  // as a Gemm's
  int channels;
  float* multiplier;
  int32_t* zero;
};

struct Weights {
  float *scale, *shift;       // stem_conv: uint8 * scale + shift is the normalised picture, in int8
                              // normalised * scale + shift the uint8
  int32_t* pad;               // stem_conv in int8: the pixel that surrounds the picture
  int32_t* input_zero;        // pyramid_pooling in int8: what surrounds its input
  Depthwise depthwise;        // dsconv, inverted_residual, feature_fusion unless dense
  Gemm expand;                // inverted_residual; feature_fusion's dense 1x1
  Gemm main;                  // stem_conv, pointwise, project, pyramid's out, fusion's low + high
  Gemm last;                  // dsconv: the following 1x1
  Gemm branch[kMaxBins];      // pyramid_pooling: 1x1 of each branch
  Gemm branch_out[kMaxBins];  // pyramid_pooling with kernel 1: out's columns of that branch
};

// Rows of B for a row of the stem's taps in int8: whole units of four.
constexpr int stem_taps(int channels) { return rounded_up(3 * channels, 4); }

// Places the weights of a layer that computes so from `base` on (null: only measures), in the one
// order that packing and kernels share; returns the number of bytes taken.
inline size_t place_weights(const Layer& l, Arithmetic arithmetic, char* base, Weights& w) {
  const ArithmeticRecord& record = record_of(arithmetic);
  const Type type = record.type;
  size_t used = 0;
  auto take = [&](size_t bytes) {
    char* p = base ? base + used : nullptr;
    used += whole_lines(bytes);
    return p;
  };
  const bool integers = arithmetic == Arithmetic::int8;
  auto floats = [&](size_t n) { return reinterpret_cast<float*>(take(n * sizeof(float))); };
  auto ints = [&](size_t n) { return reinterpret_cast<int32_t*>(take(n * sizeof(int32_t))); };
  auto gemm = [&](Gemm& g, int k, int n, bool to_bytes = true) {
    g = {};
    g.k = rounded_up(k, record.depth), g.n = pixel_pitch(n, type);
    g.panels = take(size_t(g.k) * g.n * record.weight_bytes);
    g.bias = floats(g.n);
    if (integers) g.multiplier = floats(g.n);
    if (integers && to_bytes) g.zero = ints(1);
  };
  auto depthwise = [&](int channels) {
    Depthwise& d = w.depthwise;
    d = {};
    d.channels = channels;
    if (integers) {
      const int whole = rounded_up(channels, kByteBlock);
      d.weight = take(3 * 4 * size_t(whole));
      d.bias = ints(whole);
      d.multiplier = floats(whole), d.zero = ints(1);
    } else {
      d.weight = floats(9 * size_t(channels));
      d.bias = floats(channels);
    }
  };
  const int in = pixel_pitch(l.in, type), out = pixel_pitch(l.out, type),
            mid = pixel_pitch(l.mid, type);
  switch (l.op) {
    case Op::stem_conv:
      gemm(w.main, integers ? 3 * stem_taps(l.in) : 9 * l.in, l.out);
      w.scale = floats(l.in);
      w.shift = floats(l.in);
      if (integers) w.pad = ints(l.in);
      break;
    case Op::dsconv:
      depthwise(in);
      gemm(w.main, in, l.out);
      if (l.last) gemm(w.last, out, l.last, false);
      break;
    case Op::inverted_residual:
      gemm(w.expand, in, l.mid);
      depthwise(mid);
      gemm(w.main, mid, l.out);
      if (integers) w.main.add_multiplier = floats(1), w.main.add_zero = ints(1);
      break;
    case Op::pyramid_pooling:
      if (integers) w.input_zero = ints(1);
      for (int b = 0; b < l.bin_count; b++) gemm(w.branch[b], in, l.mid);
      if (l.kernel == 1 && !integers) {
        gemm(w.main, in, l.out);
        for (int b = 0; b < l.bin_count; b++) gemm(w.branch_out[b], mid, l.out);
      } else {
        gemm(w.main, l.kernel * l.kernel * (in + l.bin_count * mid), l.out);
      }
      break;
    case Op::feature_fusion:
      if (l.dense)
        gemm(w.expand, in, l.in);
      else
        depthwise(in);
      gemm(w.main, in + pixel_pitch(l.mid, type), l.out);
      break;
    case Op::upsample_classify:
      break;
  }
  return used;
}

// A layer ready to run: its packed weights, how it computes, what it reads and what it gives.
struct Loaded {
  Layer layer;
  Weights weights;
  Arithmetic arithmetic;
  Type input, result;
};

// Fast-SCNN's layers by what they do; each reads the one before, fusion `second` and `pyramid`.
struct Chain {
  const Loaded *stem, *first, *second;  // learning to downsample
  const Loaded *blocks, *pyramid;       // global features: blocks up to the pyramid
  const Loaded *fusion, *head, *tail, *upsample;
};

}  // namespace fastscnn
