#include <cmath>
#include <stdexcept>

#include "bf16.h"
#include "program.h"

namespace fastscnn {
namespace {

// Reads the plain tensors in order.
struct Plain {
  const float* at;
  const float* take(size_t n) {
    const float* p = at;
    at += n;
    return p;
  }
};

struct Packer {
  Arithmetic arithmetic;
  Type type = type_of(arithmetic);

  int padded(int channels) const { return fastscnn::padded(channels, type); }

  // Rows [first, first + k) of b from an (n, k) matrix whose element (row, column) is value(row,
  // column).
  template <class Value>
  void fill(const Gemm& b, int first, int k, int n, Value value) const {
    for (int j = 0; j < n; j++)
      for (int i = 0; i < k; i++) put(b, first + i, j, value(j, i));
  }
  void put(const Gemm& b, int row, int column, float v) const {
    const size_t panel = size_t(column) / kPanel, place = column % kPanel,
                 half = size_t(b.k) * kPanel;
    if (arithmetic == Arithmetic::float32) {
      static_cast<float*>(b.panels)[panel * half + size_t(row) * kPanel + place] = v;
      return;
    }
    const bool high = arithmetic == Arithmetic::high;
    bf16* at = static_cast<bf16*>(b.panels) + (high ? 2 : 1) * panel * half +
               (size_t(row) / 2 * kPanel + place) * 2 + row % 2;
    at[0] = to_bf16(v);
    if (high) at[half] = to_bf16(v - to_float(at[0]));
  }

  void fill_bias(float* bias, const float* plain, int n) const {
    for (int i = 0; i < n; i++) bias[i] = plain[i];
  }

  void pack_pointwise(const Gemm& b, Plain& plain, int k, int n) const {
    const float* weight = plain.take(size_t(n) * k);
    fill(b, 0, k, n, [&](int j, int i) { return weight[size_t(j) * k + i]; });
    fill_bias(b.bias, plain.take(n), n);
  }

  // Where a depthwise weight's channel is stored: layer.h, Depthwise.
  int depthwise_place(int c) const {
    return type == Type::bf16 ? c / 32 * 32 + c % 2 * 16 + c % 32 / 2 : c;
  }
  void pack_depthwise(const Depthwise& d, Plain& plain, int channels) const {
    const float* weight = plain.take(size_t(channels) * 9);
    const float* bias = plain.take(channels);
    for (int c = 0; c < channels; c++) {
      const int place = depthwise_place(c);
      for (int t = 0; t < 9; t++)
        d.weight[size_t(t) * d.channels + place] = weight[size_t(c) * 9 + t];
      d.bias[place] = bias[c];
    }
  }

  void pack_stem(const Layer& l, const Weights& w, Plain& plain) const {
    // (O, C, 3, 3) to rows (ky, kx, c), the order of interleaved pixels.
    const float* weight = plain.take(size_t(l.out) * l.in * 9);
    fill(w.main, 0, 9 * l.in, l.out,
         [&](int j, int i) { return weight[(size_t(j) * l.in + i % l.in) * 9 + i / l.in]; });
    fill_bias(w.main.bias, plain.take(l.out), l.out);
    const float *mean = plain.take(l.in), *std = plain.take(l.in);
    for (int c = 0; c < l.in; c++) {
      w.scale[c] = float(1 / (255.0 * std[c]));
      w.shift[c] = float(-double(mean[c]) / std[c]);
    }
  }

  void pack_pyramid(const Layer& l, const Weights& w, Plain& plain) const {
    const int in = l.in, mid = l.mid, bins = l.bin_count, taps = l.kernel * l.kernel;
    const float* weight = plain.take(size_t(bins) * mid * in);
    const float* bias = plain.take(size_t(bins) * mid);
    for (int b = 0; b < bins; b++) {
      fill(w.branch[b], 0, in, mid,
           [&](int j, int i) { return weight[(size_t(b) * mid + j) * in + i]; });
      fill_bias(w.branch[b].bias, bias + size_t(b) * mid, mid);
    }
    const int concat = in + bins * mid;
    const float* out = plain.take(size_t(l.out) * concat * taps);
    // Column range [first, first + k) of the concatenation, tap t.
    auto part = [&](int first, int t) {
      return [=](int j, int i) { return out[(size_t(j) * concat + first + i) * taps + t]; };
    };
    if (taps == 1) {
      fill(w.main, 0, in, l.out, part(0, 0));
      for (int b = 0; b < bins; b++) fill(w.branch_out[b], 0, mid, l.out, part(in + b * mid, 0));
    } else {
      const int pitch = padded(in) + bins * padded(mid);
      for (int t = 0; t < taps; t++) {
        fill(w.main, t * pitch, in, l.out, part(0, t));
        for (int b = 0; b < bins; b++)
          fill(w.main, t * pitch + padded(in) + b * padded(mid), mid, l.out, part(in + b * mid, t));
      }
    }
    fill_bias(w.main.bias, plain.take(l.out), l.out);
  }

  void pack_fusion(const Layer& l, const Weights& w, Plain& plain) const {
    if (l.dense)
      pack_pointwise(w.expand, plain, l.in, l.in);
    else
      pack_depthwise(w.depthwise, plain, l.in);
    const float* low = plain.take(size_t(l.out) * l.in);
    const float* high = plain.take(size_t(l.out) * l.mid);
    fill(w.main, 0, l.in, l.out, [&](int j, int i) { return low[size_t(j) * l.in + i]; });
    fill(w.main, padded(l.in), l.mid, l.out,
         [&](int j, int i) { return high[size_t(j) * l.mid + i]; });
    fill_bias(w.main.bias, plain.take(l.out), l.out);
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

size_t floats_of(const Layer& l) {
  const size_t in = l.in, out = l.out, mid = l.mid, last = l.last, bins = l.bin_count;
  switch (l.op) {
    case Op::stem_conv:
      return out * in * 9 + out + 2 * in;
    case Op::dsconv:
      return in * 10 + out * in + out + last * out + last;
    case Op::inverted_residual:
      return mid * in + mid + mid * 10 + out * mid + out;
    case Op::pyramid_pooling:
      return bins * mid * (in + 1) + out * (in + bins * mid) * l.kernel * l.kernel + out;
    case Op::feature_fusion:
      return (l.dense ? in * in : in * 9) + in + out * (in + mid) + out;
    case Op::upsample_classify:
      break;
  }
  return 0;
}

}  // namespace

size_t plain_floats(const Program& program) {
  size_t floats = 0;
  for (const Layer& l : decode(program)) floats += floats_of(l);
  return floats;
}

size_t packed_bytes(const Program& program, Arithmetic arithmetic) {
  size_t bytes = sizeof(Tag);
  Weights w;
  for (const Layer& l : decode(program)) bytes += place_weights(l, arithmetic, nullptr, w);
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
    base += place_weights(l, arithmetic, base, w);
    packer.pack_layer(l, w, reader);
  }
}

}  // namespace fastscnn
