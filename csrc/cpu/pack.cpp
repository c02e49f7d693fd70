#include <cmath>
#include <stdexcept>

#include "bf16.h"
#include "program.h"

namespace fastscnn {
namespace {

// Hands out the plain tensors in order. With data null it only counts their floats, and what takes
// them packs nothing.
struct Plain {
  const float* data = nullptr;
  size_t used = 0;
  bool counting() const { return data == nullptr; }
  const float* take(size_t n) {
    const float* p = data ? data + used : nullptr;
    used += n;
    return p;
  }
};

struct Packer {
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
  void put(const Gemm& b, int row, int column, float v) const {
    const size_t panel = column / kPanel, lane = column % kPanel, size = size_t(b.k) * kPanel;
    const size_t in_pairs = (size_t(row) / 2 * kPanel + lane) * 2 + row % 2;
    switch (arithmetic) {
      case Arithmetic::float32:
        static_cast<float*>(b.panels)[panel * size + size_t(row) * kPanel + lane] = v;
        return;
      case Arithmetic::bfloat16:
        static_cast<bf16*>(b.panels)[panel * size + in_pairs] = to_bf16(v);
        return;
      case Arithmetic::high:
        bf16* upper = static_cast<bf16*>(b.panels) + 2 * panel * size + in_pairs;
        upper[0] = to_bf16(v);
        upper[size] = to_bf16(v - to_float(upper[0]));  // the lower half
        return;
    }
  }

  void fill_bias(float* bias, const float* plain, int n) const {
    for (int i = 0; i < n; i++) bias[i] = plain[i];
  }

  void pack_pointwise(const Gemm& b, Plain& plain, int k, int n) const {
    const float *weight = plain.take(size_t(n) * k), *bias = plain.take(n);
    if (plain.counting()) return;
    fill(b, 0, k, n, [&](int j, int i) { return weight[size_t(j) * k + i]; });
    fill_bias(b.bias, bias, n);
  }

  // Where a depthwise weight's channel is stored: layer.h, Depthwise.
  int depthwise_channel(int c) const {
    return type == Type::bf16 ? c / 32 * 32 + c % 2 * 16 + c % 32 / 2 : c;
  }
  void pack_depthwise(const Depthwise& d, Plain& plain, int channels) const {
    const float* weight = plain.take(size_t(channels) * 9);
    const float* bias = plain.take(channels);
    if (plain.counting()) return;
    for (int c = 0; c < channels; c++) {
      const int at = depthwise_channel(c);
      for (int t = 0; t < 9; t++) d.weight[size_t(t) * d.channels + at] = weight[size_t(c) * 9 + t];
      d.bias[at] = bias[c];
    }
  }

  void pack_stem(const Layer& l, const Weights& w, Plain& plain) const {
    // (O, C, 3, 3) to rows (ky, kx, c), the order of interleaved pixels.
    const float *weight = plain.take(size_t(l.out) * l.in * 9), *bias = plain.take(l.out);
    const float *mean = plain.take(l.in), *std = plain.take(l.in);
    if (plain.counting()) return;
    fill(w.main, 0, 9 * l.in, l.out,
         [&](int j, int i) { return weight[(size_t(j) * l.in + i % l.in) * 9 + i / l.in]; });
    fill_bias(w.main.bias, bias, l.out);
    for (int c = 0; c < l.in; c++) {
      w.scale[c] = float(1 / (255.0 * std[c]));
      w.shift[c] = float(-double(mean[c]) / std[c]);
    }
  }

  void pack_pyramid(const Layer& l, const Weights& w, Plain& plain) const {
    const int in = l.in, mid = l.mid, bins = l.bin_count, taps = l.kernel * l.kernel;
    const float* weight = plain.take(size_t(bins) * mid * in);
    const float* bias = plain.take(size_t(bins) * mid);
    const int concat = in + bins * mid;
    const float* out = plain.take(size_t(l.out) * concat * taps);
    const float* out_bias = plain.take(l.out);
    if (plain.counting()) return;
    for (int b = 0; b < bins; b++) {
      fill(w.branch[b], 0, in, mid,
           [&](int j, int i) { return weight[(size_t(b) * mid + j) * in + i]; });
      fill_bias(w.branch[b].bias, bias + size_t(b) * mid, mid);
    }
    // Column range [first, first + k) of the concatenation, tap t.
    auto part = [&](int first, int t) {
      return [=](int j, int i) { return out[(size_t(j) * concat + first + i) * taps + t]; };
    };
    if (taps == 1) {
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
    fill_bias(w.main.bias, out_bias, l.out);
  }

  void pack_fusion(const Layer& l, const Weights& w, Plain& plain) const {
    if (l.dense)
      pack_pointwise(w.expand, plain, l.in, l.in);
    else
      pack_depthwise(w.depthwise, plain, l.in);
    const float* low = plain.take(size_t(l.out) * l.in);
    const float *high = plain.take(size_t(l.out) * l.mid), *bias = plain.take(l.out);
    if (plain.counting()) return;
    fill(w.main, 0, l.in, l.out, [&](int j, int i) { return low[size_t(j) * l.in + i]; });
    fill(w.main, pixel_pitch(l.in), l.mid, l.out,
         [&](int j, int i) { return high[size_t(j) * l.mid + i]; });
    fill_bias(w.main.bias, bias, l.out);
  }

  void pack_layer(const Layer& l, const Weights& w, Plain& plain) const {
    switch (l.op) {
      case Op::stem_conv:
        return pack_stem(l, w, plain);
      case Op::dsconv:
        pack_depthwise(w.depthwise, plain, l.in);
        pack_pointwise(w.main, plain, l.in, l.out);
        if (l.last) pack_pointwise(w.last, plain, l.out, l.last);
        return;
      case Op::inverted_residual:
        pack_pointwise(w.expand, plain, l.in, l.mid);
        pack_depthwise(w.depthwise, plain, l.mid);
        pack_pointwise(w.main, plain, l.mid, l.out);
        return;
      case Op::pyramid_pooling:
        return pack_pyramid(l, w, plain);
      case Op::feature_fusion:
        return pack_fusion(l, w, plain);
      case Op::upsample_classify:
        return;
    }
  }
};

}  // namespace

size_t plain_floats(const Program& program) {
  Plain count;
  for (const Layer& l : decode(program)) Packer{Arithmetic::float32}.pack_layer(l, {}, count);
  return count.used;
}

size_t packed_bytes(const Program& program, Arithmetic arithmetic) {
  size_t bytes = sizeof(Tag);
  Weights w;
  for (const Layer& l : decode(program))
    bytes += place_weights(l, arithmetic_of(l, arithmetic), nullptr, w);
  return bytes;
}

void pack(const Program& program, Arithmetic arithmetic, const float* plain, size_t floats,
          void* packed) {
  const std::vector<Layer> layers = decode(program);
  const size_t wanted = plain_floats(program);
  if (floats != wanted)
    throw std::invalid_argument("weights must hold " + std::to_string(wanted) + " floats, got " +
                                std::to_string(floats));
  const size_t bytes = packed_bytes(program, arithmetic);
  std::memset(packed, 0, bytes);  // padding channels are zero
  *static_cast<Tag*>(packed) = make_tag(program, arithmetic, bytes);
  char* base = static_cast<char*>(packed) + sizeof(Tag);
  Plain reader{plain};
  for (const Layer& l : layers) {
    const Packer packer{arithmetic_of(l, arithmetic)};
    Weights w{};
    base += place_weights(l, packer.arithmetic, base, w);
    packer.pack_layer(l, w, reader);
  }
}

}  // namespace fastscnn
