// The kernels of csrc/cpu under a sanitizer (make sanitize): every op and whole networks with
// random weights, for each instruction set that runs here. All that a call reads or writes lies in
// a block of exactly its size, on the heap, whose surroundings AddressSanitizer watches, and next
// to a page that nobody may touch, which no instruction gets past. Results must not depend on the
// number of threads, on what memory held before, nor on other calls at the same time, and must be
// finite.
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "engine.h"
#include "training.h"

namespace fs = fastscnn;
using fs::Activation;
using fs::Arithmetic;
using fs::Layer;
using fs::Op;
using fs::Output;
using fs::Program;
using fs::Type;

namespace {

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

std::string g_where;  // instruction set and seed: with them a failure is reported
std::atomic<int> g_checks{0};

void check(bool holds, const char* what) {
  g_checks++;
  if (holds) return;
  std::fprintf(stderr, "%s: %s\n", g_where.c_str(), what);
  std::abort();
}

// ---------------------------------------------------------------- memory

enum class Memory { heap, beside_a_guard };

std::mt19937 g_random;
int any(int n) { return int(g_random() % uint32_t(n)); }
// ThreadSanitizer is slow, and sizes matter little to it: a third of them, by chance.
bool skipped() { return kThreadSanitizer && any(3); }

struct Release {
  char* map = nullptr;
  size_t bytes = 0;
  void operator()(char* data) const { map ? void(munmap(map, bytes)) : std::free(data); }
};

class Block {
 public:
  Block() = default;
  Block(size_t bytes, Memory memory) : bytes_(bytes) {
    if (memory == Memory::heap) {
      void* heap = nullptr;
      check(!posix_memalign(&heap, 64, bytes), "out of memory");
      data_ = {static_cast<char*>(heap), {}};
      return;
    }
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), pages = (bytes + page - 1) / page * page;
    void* mapped =
        mmap(nullptr, pages + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(mapped != MAP_FAILED, "out of memory");
    char* map = static_cast<char*>(mapped);
    const bool before = any(4) != 0;
    check(!mprotect(before ? map + pages : map, page, PROT_NONE), "no guard page");
    data_ = {before ? map + pages - bytes : map + page, {map, pages + page}};
  }
  char* data() const { return data_.get(); }
  size_t bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data());
  }

 private:
  size_t bytes_ = 0;
  std::unique_ptr<char, Release> data_;
};

// Away from 0, as some are divided by.
float random_float() {
  const uint32_t bits = g_random();
  const float size = 0.05f + 0.45f * float(bits >> 8) / float(1 << 24);
  return bits & 1 ? size : -size;
}

float to_float(const void* elements, Type type, size_t i) {
  uint32_t bits = 0;  // bf16 is the upper half of a float
  const size_t bytes = fs::bytes_of(type);
  std::memcpy(reinterpret_cast<char*>(&bits) + 4 - bytes,
              static_cast<const char*>(elements) + i * bytes, bytes);
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

void store(void* elements, Type type, size_t i, float x) {
  const size_t bytes = fs::bytes_of(type);
  std::memcpy(static_cast<char*>(elements) + i * bytes,
              reinterpret_cast<const char*>(&x) + 4 - bytes, bytes);
}

Block random_elements(size_t n, Type type, Memory memory) {
  Block block(n * fs::bytes_of(type), memory);
  for (size_t i = 0; i < n; i++) store(block.data(), type, i, random_float());
  return block;
}

bool all_finite(const Block& block, Type type) {
  for (size_t i = 0; i < block.bytes() / fs::bytes_of(type); i++)
    if (!std::isfinite(to_float(block.data(), type, i))) return false;
  return true;
}

// Of all results of single ops so far.
uint64_t g_hash = 0;
void add_to_hash(const Block& block) {
  for (size_t i = 0; i < block.bytes(); i++)
    g_hash = (g_hash ^ block.as<uint8_t>()[i]) * 0x100000001b3u;
}

// Runs with several numbers of threads, each time into a new block; returns what all of them wrote.
using Run = std::function<void(int threads, void* out)>;
using Counts = std::vector<int>;
Block agreed(size_t bytes, Type type, Memory memory, const Counts& counts, const Run& run) {
  Block first;
  int fill = 0;
  for (const int threads : counts) {
    fill ^= 0xFF;  // as floats, NaN
    Block out(bytes, memory);
    std::memset(out.data(), fill, bytes);
    fs::fill_scratch(fill);
    run(threads, out.data());
    if (type != Type::u8) check(all_finite(out, type), "result is not finite");
    if (first.bytes())
      check(!std::memcmp(first.data(), out.data(), bytes), "result depends on threads or memory");
    else
      first = std::move(out);
  }
  return first;
}

Counts one_and_more() { return {1, 2 + any(3)}; }

// ---------------------------------------------------------------- layers

Program encode(const Layer& l) {
  Program values{int64_t(l.op),
                 l.in,
                 l.out,
                 l.mid,
                 l.last,
                 l.stride,
                 l.dilation,
                 l.padding,
                 l.kernel,
                 int64_t(l.activation),
                 int64_t(l.mid_activation),
                 l.residual,
                 l.dense,
                 l.align_corners,
                 l.arithmetic,
                 l.input_count};
  for (int i = 0; i < l.input_count; i++) values.push_back(l.inputs[i] + 1);
  values.insert(values.end(), l.bins, l.bins + l.bin_count);
  values.insert(values.begin(), int64_t(values.size()));
  return values;
}

Layer layer(Op op, int in, int out, int mid = 0) {
  Layer l{};
  l.op = op, l.in = in, l.out = out, l.mid = mid;
  l.stride = l.dilation = l.padding = l.kernel = 1;
  l.activation = Activation::relu;
  return l;
}
Layer stem(int in, int out, int padding) {
  Layer l = layer(Op::stem_conv, in, out);
  l.stride = 2, l.padding = padding;
  return l;
}
Layer dsconv(int in, int out, int stride, int dilation = 1, int last = 0,
             Activation mid_activation = Activation::none) {
  Layer l = layer(Op::dsconv, in, out);
  l.stride = stride, l.dilation = dilation, l.last = last, l.mid_activation = mid_activation;
  return l;
}
Layer residual(int in, int mid, int out, int stride, Activation activation = Activation::relu) {
  Layer l = layer(Op::inverted_residual, in, out, mid);
  l.stride = stride, l.activation = activation, l.residual = stride == 1 && in == out;
  return l;
}
Layer pyramid(int in, int mid, int out, int kernel, bool align_corners, std::vector<int> bins) {
  Layer l = layer(Op::pyramid_pooling, in, out, mid);
  l.kernel = kernel, l.align_corners = align_corners, l.bin_count = int(bins.size());
  std::copy(bins.begin(), bins.end(), l.bins);
  return l;
}
Layer fusion(int low, int high, int out, int dilation, bool dense, bool align_corners) {
  Layer l = layer(Op::feature_fusion, low, out, high);
  l.dilation = dilation, l.dense = dense, l.align_corners = align_corners;
  return l;
}
Layer upsample(int classes, bool align_corners) {
  Layer l = layer(Op::upsample_classify, classes, classes);
  l.activation = Activation::none, l.align_corners = align_corners;
  return l;
}

// A network whose switches all are `tramac`'s or the paper's, of these widths.
struct Widths {
  int down[3], bottleneck[3], expansion, pyramid, fusion, classes;
};
constexpr Widths kOdd{{5, 18, 33}, {20, 17, 24}, 3, 37, 40, 11},
    kEven{{32, 48, 64}, {64, 64, 96}, 2, 64, 64, 19};
std::vector<Layer> network(const Widths& w, bool tramac, int kernel, bool dense) {
  const Activation mid = tramac ? Activation::relu : Activation::none;
  std::vector<Layer> layers{stem(3, w.down[0], !tramac), dsconv(w.down[0], w.down[1], 2, 1, 0, mid),
                            dsconv(w.down[1], w.down[2], 2, 1, 0, mid)};
  int channels = w.down[2];
  for (int b = 0; b < 3; b++)
    for (int i = 0; i < 2; i++) {
      const int stride = i == 0 && b < 2 ? 2 : 1;
      layers.push_back(residual(channels, channels * w.expansion, w.bottleneck[b], stride,
                                tramac ? Activation::relu6 : Activation::relu));
      channels = w.bottleneck[b];
    }
  layers.push_back(pyramid(channels, channels / 4, w.pyramid, kernel, tramac, {1, 2, 3, 6}));
  layers.push_back(fusion(w.pyramid, w.down[2], w.fusion, tramac || dense ? 1 : 4, dense, tramac));
  layers.push_back(dsconv(w.fusion, w.fusion, 1, 1, 0, mid));
  layers.push_back(dsconv(w.fusion, w.fusion, 1, 1, w.classes, mid));
  layers.push_back(upsample(w.classes, tramac));
  for (size_t i = 0; i < layers.size(); i++) {
    Layer& l = layers[i];
    const int before = i ? int(i) - 1 : fs::kPicture;
    constexpr int kSecond = 2;  // the end of learning to downsample
    if (l.op == Op::feature_fusion) l.inputs[l.input_count++] = kSecond;
    l.inputs[l.input_count++] = before;
  }
  return layers;
}

// What is under test, and where its memory lies.
struct Setup {
  std::string isa;
  Arithmetic arithmetic;
  Memory memory;
  Type type() const { return fs::record_of(arithmetic).type; }
  Type results() const { return fs::record_of(arithmetic).results; }
  // Of float pictures.
  Type floats() const { return type() == Type::u8 ? Type::f32 : type(); }
};

// Plain weights of int8: every tensor of Layer.quantised_weights() in program/layers.py in turn.
struct Integers {
  std::vector<char> bytes;

  template <class T, class Value>
  void add(size_t n, Value value) {
    const size_t at = bytes.size();
    bytes.resize(at + (n * sizeof(T) + 7) / 8 * 8);
    for (size_t i = 0; i < n; i++) {
      const T v = T(value());
      std::memcpy(&bytes[at + i * sizeof(T)], &v, sizeof v);
    }
  }
  void weights(size_t n) {
    add<int8_t>(n, [] { return any(255) - 127; });
  }
  void zeros(size_t n) {
    add<int32_t>(n, [] { return any(256); });
  }
  void floats(size_t n, float most) {
    add<float>(n, [&] { return most * std::abs(random_float()); });
  }
  void ends(size_t n, size_t zero_points = 1) {
    add<int32_t>(n, [] { return any(1 << 16) - (1 << 15); });
    floats(n, 1e-2f);
    zeros(zero_points);
  }
  void product(size_t weights_, size_t n, size_t zero_points = 1) {
    weights(weights_);
    ends(n, zero_points);
  }
  void layer(const Layer& l) {
    const size_t in = l.in, out = l.out, mid = l.mid, bins = l.bin_count;
    switch (l.op) {
      case Op::stem_conv:
        product(out * in * 9, out);
        zeros(in);
        floats(in, 100);
        return floats(in, 255);
      case Op::dsconv:
        product(in * 9, in);
        product(out * in, out);
        if (l.last) product(size_t(l.last) * out, l.last, 0);
        return;
      case Op::inverted_residual:
        product(mid * in, mid);
        product(mid * 9, mid);
        product(out * mid, out);
        zeros(1);
        return floats(1, 2);
      case Op::pyramid_pooling:
        product(bins * mid * in, bins * mid, bins);
        product(out * (in + bins * mid) * l.kernel * l.kernel, out);
        return zeros(1);
      case Op::feature_fusion:
        product(l.dense ? in * in : in * 9, in);
        weights(out * in);
        return product(out * mid, out);
      case Op::upsample_classify:
        return;
    }
  }
};

// Packed weights and everything else that a call has in common.
struct Packed {
  std::string isa;
  Program program;
  Block weights;

  Packed(const Setup& s, const std::vector<Layer>& layers) : isa(s.isa) {
    const fs::ArithmeticRecord& record = fs::record_of(s.arithmetic);
    Integers plain;
    for (Layer l : layers) {
      const Arithmetic usual = l.op == Op::stem_conv           ? record.stem
                               : l.op == Op::upsample_classify ? record.upsample
                                                               : s.arithmetic;
      if (usual != s.arithmetic && !l.arithmetic) l.arithmetic = 1 + int(usual);
      const Program one = encode(l);
      program.insert(program.end(), one.begin(), one.end());
      const Arithmetic own = l.arithmetic ? Arithmetic(l.arithmetic - 1) : s.arithmetic;
      if (own == Arithmetic::int8) {
        plain.layer(l);
      } else {
        Layer alone = l;
        alone.input_count = alone.arithmetic = 0;
        const size_t bytes = fs::plain_bytes(encode(alone), Arithmetic::float32);
        plain.add<float>(bytes / sizeof(float), random_float);
      }
    }
    const Block exact(plain.bytes.size(), s.memory);  // which ends where they end
    std::copy(plain.bytes.begin(), plain.bytes.end(), exact.data());
    weights = Block(fs::packed_bytes(program, s.arithmetic), s.memory);
    fs::pack(program, s.arithmetic, exact.data(), exact.bytes(), weights.data());
  }
  fs::Call call(int threads) const {
    return {isa, program, weights.data(), weights.bytes(), threads};
  }
};

// ---------------------------------------------------------------- inputs

struct Size {
  int h, w;
};

// A batch of activations, its padding channels zero.
struct Activations {
  int n, channels;
  Size size;
  Type type;
  Block block;

  Activations(const Setup& s, int n, int channels, Size size)
      : Activations(s, n, channels, size, s.type()) {}
  Activations(const Setup& s, int n, int channels, Size size, Type type)
      : n(n), channels(channels), size(size), type(type) {
    const size_t pitch = size_t(fs::pixel_pitch(channels, type));
    const size_t elements = size_t(n) * size.h * size.w * pitch;
    block = random_elements(elements, type, s.memory);
    for (size_t i = 0; i < elements; i++)
      if (int(i % pitch) >= channels) store(block.data(), type, i, 0);
  }
  fs::Batch batch() const { return batch(block.data()); }
  fs::Batch batch(void* data) const { return {data, n, size.h, size.w}; }
};

enum class Layout { planes, pixels, cropped_planes, cropped_pixels, every_second };
constexpr Layout kLayouts[] = {Layout::planes, Layout::pixels, Layout::cropped_planes,
                               Layout::cropped_pixels, Layout::every_second};

// A picture batch in a block that begins with its first element and ends with its last; what lies
// between its elements is NaN or 255.
struct Pictures {
  fs::Picture picture;
  Block block;

  Pictures(const Setup& s, bool raw, int n, int c, Size size, Layout layout)
      : picture{nullptr, raw ? Type::u8 : s.floats(), n, c, size.h, size.w, 0, 0, 0, 0} {
    fs::Picture& p = picture;
    const int gap = layout == Layout::cropped_planes || layout == Layout::cropped_pixels ? 3 : 0;
    const int step = layout == Layout::every_second ? 2 : 1;
    const int64_t w = int64_t(size.w + gap) * step, h = int64_t(size.h + gap) * step;
    if (layout == Layout::pixels || layout == Layout::cropped_pixels) {
      p.stride_c = 1, p.stride_w = c + (gap ? 1 : 0), p.stride_h = w * p.stride_w;
      p.stride_n = h * p.stride_h;
    } else {
      p.stride_w = step, p.stride_h = w * step, p.stride_c = w * h, p.stride_n = c * w * h;
    }
    const size_t elements = 1 + (n - 1) * p.stride_n + (c - 1) * p.stride_c +
                            (size.h - 1) * p.stride_h + (size.w - 1) * p.stride_w;
    block = Block(elements * fs::bytes_of(p.type), s.memory);
    std::memset(block.data(), 0xFF, block.bytes());
    p.data = block.data();
    for (int i = 0; i < n; i++)
      for (int k = 0; k < c; k++)
        for (int y = 0; y < size.h; y++)
          for (int x = 0; x < size.w; x++) {
            const int64_t at = i * p.stride_n + k * p.stride_c + y * p.stride_h + x * p.stride_w;
            if (raw)
              block.as<uint8_t>()[at] = uint8_t(g_random());
            else
              store(block.data(), p.type, size_t(at), random_float());
          }
  }
};

// ---------------------------------------------------------------- ops

Size result_of(const Layer& l, Size size) { return {l.output_size(size.h), l.output_size(size.w)}; }

// Runs something whose result are full-size logits, probabilities or labels.
Block agreed_output(const Setup& s, Output output, int n, int classes, Size size,
                    const Counts& counts, const Run& run) {
  const Type type = output == Output::labels ? Type::u8 : s.results();
  const int pieces = output == Output::labels ? 1 : classes;
  return agreed(fs::bytes_of(type) * n * pieces * size.h * size.w, type, s.memory, counts, run);
}

template <class Op>
void agreed_activations(const Setup& s, Type type, int n, int channels, Size size,
                        const Counts& counts, Op op) {
  const Activations out(s, n, channels, size, type);
  add_to_hash(agreed(out.block.bytes(), type, s.memory, counts,
                     [&](int threads, void* data) { op(threads, out.batch(data)); }));
}

constexpr Output kOutputs[] = {Output::logits, Output::probabilities, Output::labels};

void run_stem(const Setup& s, const Layer& l, Size size, int n) {
  if (std::min(size.h, size.w) < 3 - 2 * l.padding) return;
  const Packed packed(s, {l});
  for (const bool raw : {false, true})
    for (const Layout layout : kLayouts) {
      const Pictures x(s, raw, n, l.in, size, layout);
      agreed_activations(
          s, s.type(), n, l.out, result_of(l, size), one_and_more(),
          [&](int threads, fs::Batch out) { fs::stem_conv(packed.call(threads), x.picture, out); });
    }
}

void run_upsample(const Setup& s, const Layer& l, Size low, Size size, int n) {
  const Packed packed(s, {l});
  const Activations x(s, n, l.in, low);
  for (const Output output : kOutputs) {
    if (output == Output::labels && l.in > fs::kMaxClassesOfLabels) continue;
    agreed_output(s, output, n, l.in, size, one_and_more(), [&](int threads, void* data) {
      fs::upsample_classify(packed.call(threads), x.batch(), output, data, size.h, size.w);
    });
  }
}

void run_fusion(const Setup& s, const Layer& l, Size size, Size low, int n) {
  const Packed packed(s, {l});
  const Activations high_x(s, n, l.mid, size), low_x(s, n, l.in, low);
  agreed_activations(s, s.type(), n, l.out, size, one_and_more(), [&](int threads, fs::Batch out) {
    fs::feature_fusion(packed.call(threads), high_x.batch(), low_x.batch(), out);
  });
}

void run_plane_op(const Setup& s, const Layer& l, Size size, int n, const Counts& counts) {
  const auto op = l.op == Op::dsconv              ? fs::dsconv
                  : l.op == Op::inverted_residual ? fs::inverted_residual
                                                  : fs::pyramid_pooling;
  const Packed packed(s, {l});
  const Activations x(s, n, l.in, size);
  const Size result = l.op == Op::pyramid_pooling ? size : result_of(l, size);
  const Type type = l.last ? s.results() : s.type();
  agreed_activations(s, type, n, l.result_channels(), result, counts,
                     [&](int threads, fs::Batch out) { op(packed.call(threads), x.batch(), out); });
}

void run_ops(const Setup& s) {
  const Layer planes[] = {
      dsconv(32, 48, 2),
      dsconv(20, 40, 2, 1, 0, Activation::relu6),
      dsconv(40, 24, 1, 4),
      dsconv(16, 16, 2, 3),
      dsconv(24, 40, 1, 1, 33, Activation::relu),
      dsconv(64, 96, 1, 1, 1),
      residual(16, 96, 16, 1),
      residual(20, 60, 40, 2, Activation::relu6),
      residual(33, 70, 33, 1),
      pyramid(32, 8, 32, 1, false, {1, 2, 3, 6}),
      pyramid(40, 20, 20, 1, true, {2, 4, 8}),
      pyramid(17, 2, 33, 3, false, {1, 2, 3, 4, 5, 6, 7, 8}),
      pyramid(64, 32, 48, 3, true, {1}),
  };
  const Layer fusions[] = {fusion(32, 16, 32, 4, false, false), fusion(20, 24, 40, 1, false, true),
                           fusion(40, 20, 17, 1, true, false), fusion(64, 64, 64, 1, true, true)};
  for (const Size size : {Size{1, 1}, {2, 3}, {6, 5}, {1, 8}, {4, 15}, {3, 17}, {9, 33}, {7, 64}}) {
    if (skipped()) continue;
    const int n = 1 + any(3), channels = 1 + any(4);
    for (const int padding : {0, 1})
      run_stem(s, stem(channels, 5 + 12 * channels, padding), size, n);
    for (const Layer& l : planes) run_plane_op(s, l, size, n, one_and_more());
    const Size lows[] = {{1, 1}, {3, 5}, {(size.h + 3) / 4, (size.w + 3) / 4}};
    const Size larges[] = {{1, 1}, {8 * size.h, 8 * size.w}, {8 * size.h - 7, 67}, {3, 5}};
    for (const Layer& l : fusions) run_fusion(s, l, size, lows[any(3)], n);
    for (const int classes : {1, 2, 19, 33, 300})
      if (fs::record_of(s.arithmetic).upsample == s.arithmetic)
        run_upsample(s, upsample(classes, any(2)), size, larges[any(4)], n);
  }
}

// ---------------------------------------------------------------- networks

Block run_network(const Setup& s, const Packed& packed, const Pictures& x, Output output,
                  int classes, const Counts& counts) {
  const fs::Picture& p = x.picture;
  return agreed_output(s, output, p.n, classes, {p.h, p.w}, counts, [&](int threads, void* data) {
    fs::network(packed.call(threads), p, output, data);
  });
}

void run_networks(const Setup& s) {
  for (const Widths& w : {kOdd, kEven})
    for (const auto& layers : {network(w, false, 1, false), network(w, true, 1, true),
                               network(w, false, 3, true), network(w, true, 3, false)}) {
      const Packed packed(s, layers);
      for (const Size size : {Size{3, 3}, {32, 32}, {33, 49}, {49, 65}, {97, 131}}) {
        if (skipped()) continue;
        const Pictures x(s, any(2), size.h > 50 ? 1 : 1 + any(3), 3, size, kLayouts[any(5)]);
        for (const Output output : kOutputs)
          run_network(s, packed, x, output, w.classes, one_and_more());
      }
    }
}

// ---------------------------------------------------------------- threads

// Calls from two threads at once, each of which must get what it gets alone.
void run_calls_at_once(const Setup& s) {
  const Packed packed(s, network(kOdd, true, 1, false));
  struct Job {
    Pictures x;
    Output output;
    Block expected;
  };
  std::vector<Job> jobs;
  for (const Size size : {Size{40, 33}, {64, 96}, {33, 49}})
    for (const Output output : kOutputs) {
      Pictures x(s, any(2), 1 + int(jobs.size()) % 3, 3, size, Layout::pixels);
      Block expected = run_network(s, packed, x, output, kOdd.classes, {1});
      jobs.push_back({std::move(x), output, std::move(expected)});
    }
  auto work = [&](size_t first) {
    for (size_t i = 0; i < 2 * jobs.size(); i++) {
      const Job& job = jobs[(first + i) % jobs.size()];
      const std::unique_ptr<char[]> out(new char[job.expected.bytes()]);
      fs::network(packed.call(1 + int(i % 3)), job.x.picture, job.output, out.get());
      check(!std::memcmp(out.get(), job.expected.data(), job.expected.bytes()),
            "calls at once mix");
    }
  };
  std::thread other(work, 5);
  work(0);
  other.join();
}

// Rows shared among threads, whoever takes them: many rows of little work, more threads than
// processors and than rows.
void run_rows_shared(const Setup& s) {
  for (const Layer& l : {dsconv(16, 16, 1, 4), residual(8, 16, 8, 1), residual(8, 16, 16, 2),
                         pyramid(8, 2, 8, 3, false, {1, 3})})
    for (const Size size : {Size{257, 1}, {64, 3}, {9, 2}, {5, 40}, {1, 1}})
      run_plane_op(s, l, size, 1, {1, 2, 3, 5, 8, 12, 16, 12, 8, 5, 3, 2});
  const Packed packed(s, network(kOdd, false, 1, false));
  for (const Size size : {Size{1, 1}, {200, 3}, {33, 32}, {65, 40}}) {
    const Pictures x(s, false, 1, 3, size, Layout::planes);
    for (const Output output : kOutputs)
      run_network(s, packed, x, output, kOdd.classes, {1, 4, 7, 16, 8, 3, 16, 5});
  }
}

// ---------------------------------------------------------------- training

void run_training(const std::string& isa, Memory memory) {
  auto floats = [&](size_t n) { return random_elements(n, Type::f32, memory); };
  for (const Type type : {Type::f32, Type::bf16}) {
    auto values = [&](size_t n) { return random_elements(n, type, memory); };
    const size_t element = fs::bytes_of(type);

    for (const Size low : {Size{1, 1}, {3, 5}, {5, 9}})
      for (const int classes : {2, 19, 33}) {
        const int n = 2, h = 8 * low.h - 3, w = 8 * low.w - 7;
        const Block logits = values(size_t(n) * low.h * low.w * classes);
        const int pitch = fs::pixel_pitch(classes, Type::f32);
        const Block targets = floats(256 * size_t(pitch));
        const Block sums = floats(256);  // 0: a label that is no class
        for (int label = classes; label < 256; label++) sums.as<float>()[label] = 0;
        Block labels(size_t(n) * h * w, memory);
        for (size_t i = 0; i < labels.bytes(); i++) labels.as<uint8_t>()[i] = uint8_t(g_random());
        agreed(sizeof(float) * (size_t(n) * low.h * low.w * classes + size_t(n) * h * w), Type::f32,
               memory, one_and_more(), [&](int threads, void* data) {
                 float* gradient = static_cast<float*>(data);
                 fs::upsampled_loss(
                     isa,
                     {type, logits.data(), n, classes, low.h, low.w, labels.as<uint8_t>(), h, w,
                      classes % 2 == 1, targets.as<float>(), sums.as<float>(), gradient,
                      gradient + size_t(n) * low.h * low.w * classes},
                     threads);
               });
        const size_t cells = size_t(n) * classes * classes;
        agreed(sizeof(double) * cells + sizeof(float) * size_t(n) * low.h * low.w * classes,
               Type::u8, memory, one_and_more(), [&](int threads, void* data) {
                 double* confusion = static_cast<double*>(data);
                 fs::upsampled_loss(
                     isa,
                     {type, logits.data(), n, classes, low.h, low.w, labels.as<uint8_t>(), h, w,
                      classes % 2 == 1, targets.as<float>(), sums.as<float>(),
                      reinterpret_cast<float*>(confusion + cells), nullptr, true, confusion},
                     threads);
               });
      }

    for (const size_t pixels : {size_t(2), size_t(33), size_t(1500)})
      for (const int channels : {16, 48}) {
        const size_t n = pixels * channels;
        const Block x = values(n), other = values(n), y_gradient = values(n);
        const Block gamma = floats(channels), beta = floats(channels);
        Block statistics(size_t(4) * channels * sizeof(float), memory);
        float* mean = statistics.as<float>();
        Block out(2 * n * element, memory), sums(size_t(2) * channels * sizeof(float), memory);
        for (const bool with_residual : {false, true})
          for (const int threads : one_and_more()) {
            std::memset(statistics.data(), 0, statistics.bytes());
            fs::BatchNorm b{};
            b.type = type, b.activation = Activation::relu6;
            b.pixels = pixels, b.channels = channels;
            b.x = x.data(), b.residual = with_residual ? other.data() : nullptr;
            b.gamma = gamma.as<float>(), b.beta = beta.as<float>();
            b.mean = mean, b.inverse_std = mean + channels;
            b.running_mean = mean + 2 * channels, b.running_variance = mean + 3 * channels;
            b.epsilon = 1e-5f, b.momentum = 0.1f;
            b.y = out.data();
            fs::batch_norm_forward(isa, b, threads);
            b.y_gradient = y_gradient.data(), b.x_gradient = out.data() + n * element;
            const Block residual_gradient(n * element, memory);
            b.residual_gradient = with_residual ? residual_gradient.data() : nullptr;
            b.gamma_gradient = sums.as<float>(), b.beta_gradient = sums.as<float>() + channels;
            fs::batch_norm_backward(isa, b, threads);
            check(all_finite(sums, Type::f32), "gradient is not finite");
          }
      }

    for (const Size size : {Size{1, 1}, {5, 7}, {9, 18}})
      for (const int stride : {1, 2})
        for (const int dilation : {1, 4}) {
          const int n = 2, channels = 80;
          const size_t in = size_t(n) * size.h * size.w * channels;
          const size_t result =
              size_t(n) * ((size.h - 1) / stride + 1) * ((size.w - 1) / stride + 1) * channels;
          const Block x = values(in), y_gradient = values(result);
          const Block weight = floats(size_t(9) * channels);
          const Block x_gradient(in * element, memory);
          agreed(size_t(9) * channels * sizeof(float), Type::f32, memory, one_and_more(),
                 [&](int threads, void* data) {
                   fs::depthwise_backward(isa,
                                          {type, n, size.h, size.w, channels, stride, dilation,
                                           x.data(), y_gradient.data(), weight.as<float>(),
                                           x_gradient.data(), static_cast<float*>(data)},
                                          threads);
                 });
        }
  }
}

// ---------------------------------------------------------------- refusals

// A program that the engine does not run must say so, in words that hold `because`.
void check_refused(const Setup& s, const std::vector<Layer>& layers, const char* because) {
  try {
    const Packed packed(s, layers);
    const Pictures x(s, false, 1, 3, {64, 64}, Layout::planes);
    const Block out(size_t(64) * 64, Memory::heap);
    fs::network(packed.call(1), x.picture, Output::labels, out.data());
  } catch (const std::invalid_argument& error) {
    if (!std::strstr(error.what(), because)) std::fprintf(stderr, "%s\n", error.what());
    check(std::strstr(error.what(), because), because);
    return;
  }
  check(false, because);
}

void run_refusals(const Setup& s) {
  const std::vector<Layer> whole = network(kOdd, false, 1, false);
  const int count = int(whole.size()), fusion = count - 4;
  for (int i = 0; i < count; i++) {
    const std::string doubtful = "layer " + std::to_string(i) + " ";
    auto refused = [&](const std::string& because, auto change) {
      std::vector<Layer> layers = whole;
      change(layers[i]);
      check_refused(s, layers, because.c_str());
    };
    const std::string does_not_fit = doubtful + "does not fit";
    refused(does_not_fit, [](Layer& l) { l.input_count = 0; });
    if (i > 0) refused(does_not_fit, [](Layer& l) { l.inputs[l.input_count - 1]--; });
    if (i == fusion) refused(does_not_fit, [](Layer& l) { l.inputs[0]--; });
    refused(doubtful, [&](Layer& l) { l.inputs[0] = i; });
    const Arithmetic other =
        s.arithmetic == Arithmetic::bfloat16 ? Arithmetic::float32 : Arithmetic::bfloat16;
    refused("must compute in", [&](Layer& l) { l.arithmetic = 1 + int(other); });
    refused("must be float32, bfloat16, high or int8",
            [](Layer& l) { l.arithmetic = 1 + fs::kArithmetics; });
  }
  check_refused(s, {whole.begin(), whole.end() - 1}, "its end does not fit");
  std::vector<Layer> longer = whole;
  longer.push_back(whole.back());
  longer.back().inputs[0] = count - 1;
  check_refused(s, longer, ("layer " + std::to_string(count) + " does not fit").c_str());
  std::vector<Layer> lacking = whole;
  lacking[0].arithmetic = 1 + int(Arithmetic::high);
  check_refused(s, lacking, "stem_conv has no kernels in arithmetic high");
  lacking = whole;
  lacking.back().arithmetic = 1 + int(Arithmetic::int8);
  check_refused(s, lacking, "upsample_classify has no kernels in arithmetic int8");
}

}  // namespace

int main() {
  const char* chosen = std::getenv("FASTSCNN_SEED");
  const unsigned seed = chosen ? unsigned(std::atoll(chosen)) : std::random_device{}();
  uint64_t hash_of_int8 = 0;
  for (const Arithmetic arithmetic :
       {Arithmetic::float32, Arithmetic::bfloat16, Arithmetic::high, Arithmetic::int8})
    for (const std::string& isa : fs::instruction_sets(arithmetic)) {
      const std::string name = isa + " " + fs::record_of(arithmetic).name;
      g_where = name + ", FASTSCNN_SEED=" + std::to_string(seed);
      const int before = g_checks;
      g_random.seed(seed);  // every instruction set computes the same
      g_hash = 0;
      for (const Memory memory : {Memory::heap, Memory::beside_a_guard}) {
        if (kThreadSanitizer && memory != Memory::heap) continue;
        const Setup s{isa, arithmetic, memory};
        run_ops(s);
        if (arithmetic == Arithmetic::int8 && memory == Memory::heap) {
          if (isa == fs::instruction_sets(arithmetic).front()) hash_of_int8 = g_hash;
          check(g_hash == hash_of_int8, "int8 depends on the instruction set");
        }
        run_networks(s);
        if (arithmetic == Arithmetic::float32) run_training(isa, memory);
      }
      const Setup s{isa, arithmetic, Memory::heap};
      run_refusals(s);
      run_calls_at_once(s);
      run_rows_shared(s);
      std::printf("%s: %d checks passed\n", name.c_str(), g_checks - before);
      std::fflush(stdout);
    }
}
