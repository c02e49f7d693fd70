#include <cmath>
#include <stdexcept>
#include <type_traits>

#include "bf16.h"
#include "program.h"

namespace fastscnn {
namespace {

// Hands out the plain tensors in order, each from a multiple of eight bytes on. With data null it
// only counts, and what takes them packs nothing.
struct Plain {
  const char* data = nullptr;
  size_t used = 0;
  bool counting() const { return data == nullptr; }
  template <class T>
  const T* take(size_t n) {
    const char* p = data ? data + used : nullptr;
    used += (n * sizeof(T) + 7) / 8 * 8;
    return reinterpret_cast<const T*>(p);
  }
};

// Weight: float, or int8_t, whose biases are int32_t and whose sums are requantised.
template <class Weight>
struct Packer {
  static constexpr bool kIntegers = std::is_same<Weight, int8_t>::value;
  using Bias = std::conditional_t<kIntegers, int32_t, float>;

  Arithmetic arithmetic;
  Type type = record_of(arithmetic).type;

  int pixel_pitch(int channels) const { return fastscnn::pixel_pitch(channels, type); }

  // Rows [first, first + k) of b from an (n, k) matrix whose element (row, column) is value(row,
  // column).
  template <class Value>
  void fill(const Gemm& b, int first, int k, int n, Value value) const {
    for (int j = 0; j < n; j++)
      for (int i = 0; i < k; i++) put(b, first + i, j, value(j, i));
  }
  // Where a column is stored: of the product of logits, which stay floats, at its own place.
  static int place(const Gemm& b, int column) {
    return kIntegers && b.zero ? place_of(column, b.n) : column;
  }
  static int place(const Depthwise&, int channel) { return place_in_block(channel); }
  void put(const Gemm& b, int row, int column, Weight v) const {
    const size_t at = place(b, column);
    const size_t panel = at / kPanel, lane = at % kPanel, size = size_t(b.k) * kPanel;
    if constexpr (kIntegers) {
      const size_t in_fours = (size_t(row) / 4 * kPanel + lane) * 4 + row % 4;
      static_cast<int8_t*>(b.panels)[panel * size + in_fours] = v;
      return;
    }
    const size_t in_pairs = (size_t(row) / 2 * kPanel + lane) * 2 + row % 2;
    switch (arithmetic) {
      case Arithmetic::float32:
        static_cast<float*>(b.panels)[panel * size + size_t(row) * kPanel + lane] = v;
        return;
      case Arithmetic::bfloat16:
        static_cast<bf16*>(b.panels)[panel * size + in_pairs] = to_bf16(v);
        return;
      case Arithmetic::high: {
        bf16* upper = static_cast<bf16*>(b.panels) + 2 * panel * size + in_pairs;
        upper[0] = to_bf16(v);
        upper[size] = to_bf16(v - to_float(upper[0]));  // the lower half
        return;
      }
      case Arithmetic::int8:
        return;
    }
  }

  // The biases of n sums and, of integers, what becomes of those.
  struct Ends {
    const Bias* bias;
    const float* multiplier;
    const int32_t* zero;
  };
  static Ends take_ends(Plain& plain, size_t n, size_t zeros = 1) {
    Ends ends{};
    ends.bias = plain.take<Bias>(n);
    if (kIntegers) {
      ends.multiplier = plain.take<float>(n);
      if (zeros) ends.zero = plain.take<int32_t>(zeros);
    }
    return ends;
  }
  template <class To>  // Gemm or Depthwise
  static void fill_ends(const To& to, const Ends& ends, int n) {
    for (int i = 0; i < n; i++) {
      const int at = place(to, i);
      static_cast<Bias*>(to.bias)[at] = ends.bias[i];
      if (kIntegers) to.multiplier[at] = ends.multiplier[i];
    }
    if (ends.zero) *to.zero = *ends.zero;
  }

  void pack_pointwise(const Gemm& b, Plain& plain, int k, int n, size_t zeros = 1) const {
    const Weight* weight = plain.take<Weight>(size_t(n) * k);
    const Ends ends = take_ends(plain, n, zeros);
    if (plain.counting()) return;
    fill(b, 0, k, n, [&](int j, int i) { return weight[size_t(j) * k + i]; });
    fill_ends(b, ends, n);
  }

  // Where a depthwise weight's channel is stored: layer.h, Depthwise.
  int depthwise_channel(int c) const {
    return type == Type::bf16 ? c / 32 * 32 + c % 2 * 16 + c % 32 / 2 : c;
  }
  void pack_depthwise(const Depthwise& d, Plain& plain, int channels) const {
    const Weight* weight = plain.take<Weight>(size_t(channels) * 9);
    const Ends ends = take_ends(plain, channels);
    if (plain.counting()) return;
    if constexpr (kIntegers) {
      for (int c = 0; c < channels; c++)
        for (int t = 0; t < 9; t++) {
          const size_t block = size_t(c / kByteBlock) * 3 + t % 3;
          const size_t at = block * kByteBlock + place_in_block(c) % kByteBlock;
          static_cast<int8_t*>(d.weight)[at * 4 + t / 3] = weight[size_t(c) * 9 + t];
        }
      fill_ends(d, ends, channels);
    } else {
      for (int c = 0; c < channels; c++) {
        const int at = depthwise_channel(c);
        for (int t = 0; t < 9; t++)
          static_cast<float*>(d.weight)[size_t(t) * d.channels + at] = weight[size_t(c) * 9 + t];
        static_cast<float*>(d.bias)[at] = ends.bias[c];
      }
    }
  }

  void pack_stem(const Layer& l, const Weights& w, Plain& plain) const {
    // (O, C, 3, 3) to rows (ky, kx, c), the order of interleaved pixels.
    const Weight* weight = plain.take<Weight>(size_t(l.out) * l.in * 9);
    const Ends ends = take_ends(plain, l.out);
    const int32_t* pad = kIntegers ? plain.take<int32_t>(l.in) : nullptr;
    const float *mean = plain.take<float>(l.in), *std = plain.take<float>(l.in);
    if (plain.counting()) return;
    const int row = 3 * l.in, pitch = kIntegers ? stem_taps(l.in) : row;
    for (int ky = 0; ky < 3; ky++)
      fill(w.main, ky * pitch, row, l.out, [&](int j, int i) {
        return weight[(size_t(j) * l.in + i % l.in) * 9 + ky * 3 + i / l.in];
      });
    fill_ends(w.main, ends, l.out);
    for (int c = 0; c < l.in; c++) {
      if (kIntegers) {
        w.scale[c] = mean[c], w.shift[c] = std[c];  // which come as what they are to be
        w.pad[c] = pad[c];
      } else {
        w.scale[c] = float(1 / (255.0 * std[c]));
        w.shift[c] = float(-double(mean[c]) / std[c]);
      }
    }
  }

  void pack_pyramid(const Layer& l, const Weights& w, Plain& plain) const {
    const int in = l.in, mid = l.mid, bins = l.bin_count, taps = l.kernel * l.kernel;
    const Weight* weight = plain.take<Weight>(size_t(bins) * mid * in);
    const Ends ends = take_ends(plain, size_t(bins) * mid, bins);
    const int concat = in + bins * mid;
    const Weight* out = plain.take<Weight>(size_t(l.out) * concat * taps);
    const Ends out_ends = take_ends(plain, l.out);
    const int32_t* input_zero = kIntegers ? plain.take<int32_t>(1) : nullptr;
    if (plain.counting()) return;
    for (int b = 0; b < bins; b++) {
      fill(w.branch[b], 0, in, mid,
           [&](int j, int i) { return weight[(size_t(b) * mid + j) * in + i]; });
      Ends own = ends;
      own.bias += size_t(b) * mid;
      if (kIntegers) own.multiplier += size_t(b) * mid, own.zero += b;
      fill_ends(w.branch[b], own, mid);
    }
    if (kIntegers) *w.input_zero = *input_zero;
    // Column range [first, first + k) of the concatenation, tap t.
    auto part = [&](int first, int t) {
      return [=](int j, int i) { return out[(size_t(j) * concat + first + i) * taps + t]; };
    };
    if (taps == 1 && !kIntegers) {
      fill(w.main, 0, in, l.out, part(0, 0));
      for (int b = 0; b < bins; b++) fill(w.branch_out[b], 0, mid, l.out, part(in + b * mid, 0));
    } else {
      const int pitch = pixel_pitch(in) + bins * pixel_pitch(mid);
      for (int t = 0; t < taps; t++) {
        fill(w.main, t * pitch, in, l.out, part(0, t));
        for (int b = 0; b < bins; b++)
          fill(w.main, t * pitch + pixel_pitch(in) + b * pixel_pitch(mid), mid, l.out,
               part(in + b * mid, t));
      }
    }
    fill_ends(w.main, out_ends, l.out);
  }

  void pack_fusion(const Layer& l, const Weights& w, Plain& plain) const {
    if (l.dense)
      pack_pointwise(w.expand, plain, l.in, l.in);
    else
      pack_depthwise(w.depthwise, plain, l.in);
    const Weight* low = plain.take<Weight>(size_t(l.out) * l.in);
    const Weight* high = plain.take<Weight>(size_t(l.out) * l.mid);
    const Ends ends = take_ends(plain, l.out);
    if (plain.counting()) return;
    fill(w.main, 0, l.in, l.out, [&](int j, int i) { return low[size_t(j) * l.in + i]; });
    fill(w.main, pixel_pitch(l.in), l.mid, l.out,
         [&](int j, int i) { return high[size_t(j) * l.mid + i]; });
    fill_ends(w.main, ends, l.out);
  }

  void pack_block(const Layer& l, const Weights& w, Plain& plain) const {
    pack_pointwise(w.expand, plain, l.in, l.mid);
    pack_depthwise(w.depthwise, plain, l.mid);
    pack_pointwise(w.main, plain, l.mid, l.out);
    if (!kIntegers) return;
    const int32_t* zero = plain.take<int32_t>(1);
    const float* multiplier = plain.take<float>(1);
    if (plain.counting()) return;
    *w.main.add_zero = *zero;
    *w.main.add_multiplier = *multiplier;
  }

  void pack_layer(const Layer& l, const Weights& w, Plain& plain) const {
    switch (l.op) {
      case Op::stem_conv:
        return pack_stem(l, w, plain);
      case Op::dsconv:
        pack_depthwise(w.depthwise, plain, l.in);
        pack_pointwise(w.main, plain, l.in, l.out);
        if (l.last) pack_pointwise(w.last, plain, l.out, l.last, 0);
        return;
      case Op::inverted_residual:
        return pack_block(l, w, plain);
      case Op::pyramid_pooling:
        return pack_pyramid(l, w, plain);
      case Op::feature_fusion:
        return pack_fusion(l, w, plain);
      case Op::upsample_classify:
        return;
    }
  }
};

void pack_layer(const Layer& l, Arithmetic arithmetic, const Weights& w, Plain& plain) {
  if (arithmetic == Arithmetic::int8)
    Packer<int8_t>{arithmetic}.pack_layer(l, w, plain);
  else
    Packer<float>{arithmetic}.pack_layer(l, w, plain);
}

}  // namespace

size_t plain_bytes(const Program& program, Arithmetic arithmetic) {
  Plain count;
  for (const Layer& l : decode(program)) pack_layer(l, arithmetic_of(l, arithmetic), {}, count);
  return count.used;
}

size_t packed_bytes(const Program& program, Arithmetic arithmetic) {
  size_t bytes = sizeof(Tag);
  Weights w;
  for (const Layer& l : decode(program))
    bytes += place_weights(l, arithmetic_of(l, arithmetic), nullptr, w);
  return bytes;
}

void pack(const Program& program, Arithmetic arithmetic, const void* plain, size_t given,
          void* packed) {
  const std::vector<Layer> layers = decode(program);
  const size_t wanted = plain_bytes(program, arithmetic);
  if (given != wanted)
    throw std::invalid_argument("weights must hold " + std::to_string(wanted) + " bytes, got " +
                                std::to_string(given));
  const size_t bytes = packed_bytes(program, arithmetic);
  std::memset(packed, 0, bytes);  // padding channels are zero
  *static_cast<Tag*>(packed) = make_tag(program, arithmetic, bytes);
  char* base = static_cast<char*>(packed) + sizeof(Tag);
  Plain reader{static_cast<const char*>(plain)};
  for (const Layer& l : layers) {
    const Arithmetic own = arithmetic_of(l, arithmetic);
    Weights w{};
    base += place_weights(l, own, base, w);
    pack_layer(l, own, w, reader);
  }
}

}  // namespace fastscnn
