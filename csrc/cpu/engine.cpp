#include "engine.h"

#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#include "denormals.h"
#include "program.h"
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastscnn {
namespace {

// ---------------------------------------------------------------- processor

struct Candidate {
  const Kernels* kernels;
  bool (*runs)();
};
const Candidate kCandidates[] = {
    {&kPortable, [] { return true; }},
#if defined(__x86_64__)
    {&kAvx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
    {&kAvx512,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("fma");
     }},
#endif
};

// ---------------------------------------------------------------- scratch

// Buffers outlive their calls: a call takes one that fits or grows one, so that once warm nothing
// is allocated, and calls from several threads have one each.
class Pool {
 public:
  struct Buffer {
    char* data;
    size_t bytes;
  };
  Buffer take(size_t bytes) {
    Buffer best{nullptr, 0};
    {
      std::lock_guard<std::mutex> lock(mutex_);
      auto fits = [&](const Buffer& b) { return b.bytes >= bytes; };
      // The smallest that fits, else the largest, which then grows.
      auto better = [&](const Buffer& a, const Buffer& b) {
        return fits(a) != fits(b) ? fits(a) : fits(a) ? a.bytes < b.bytes : a.bytes > b.bytes;
      };
      auto found = std::min_element(free_.begin(), free_.end(), better);
      if (found != free_.end()) {
        best = *found;
        free_.erase(found);
      }
      if (best.bytes < bytes) total_ += bytes - best.bytes;
    }
    if (best.bytes >= bytes) return best;
    std::free(best.data);
    void* data = nullptr;
    if (posix_memalign(&data, 64, bytes)) {
      std::lock_guard<std::mutex> lock(mutex_);
      total_ -= bytes;
      throw std::bad_alloc();
    }
    return {static_cast<char*>(data), bytes};
  }
  void give(Buffer buffer) {
    std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(buffer);
  }
  size_t total() {
    std::lock_guard<std::mutex> lock(mutex_);
    return total_;
  }
  void fill(int byte) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const Buffer& b : free_) std::memset(b.data, byte, b.bytes);
  }
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  std::mutex mutex_;
  std::vector<Buffer> free_;
  size_t total_ = 0;
};

Pool& pool() {
  static Pool* p = new Pool;  // never destroyed: threads may outlive static destruction
  return *p;
}

// A forked child has none of OpenMP's threads: it runs alone.
bool g_forked = false;
const int kForkHandlers = pthread_atfork([] { pool().lock(); }, [] { pool().unlock(); },
                                         [] {
                                           pool().unlock();
                                           g_forked = true;
                                         });

class Scratch {
 public:
  explicit Scratch(size_t bytes) : buffer_(pool().take(bytes)) {}
  ~Scratch() { pool().give(buffer_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return buffer_.data; }

 private:
  Pool::Buffer buffer_;
};

// A fresh picture-sized result costs more in page faults of 4 KiB than in arithmetic: ask for huge
// pages.
void prefer_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// ---------------------------------------------------------------- threads

void barrier() {
#pragma omp barrier
}

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Calls run(team, image, shared, scratch) for every image, first once with measuring buffers. Few
// images share all threads; from one a thread on, each thread takes whole images.
template <class Run>
void for_each_image(int images, int threads, Run run) {
  if (images == 0) return;
  size_t shared_bytes = 0;
  const Team alone{0, 1, nullptr};
  const size_t scratch_bytes = aligned(run(alone, 0, Bump{}, &shared_bytes, Bump{}));
  shared_bytes = aligned(shared_bytes);

  threads = allowed_threads(threads);
  const bool apart = images >= threads;
  const int teams = apart ? threads : 1;
  const Scratch memory(teams * shared_bytes + threads * scratch_bytes);
  auto shared = [&](int team) { return Bump{memory.data() + team * shared_bytes}; };
  auto scratch = [&](int thread) {
    return Bump{memory.data() + teams * shared_bytes + thread * scratch_bytes};
  };
  if (threads == 1) {
    const FlushDenormals flush;
    for (int i = 0; i < images; i++) run(alone, i, shared(0), &shared_bytes, scratch(0));
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    const int rank = omp_get_thread_num(), size = omp_get_num_threads();
    size_t ignored;
    if (apart) {
#pragma omp for schedule(dynamic, 1)
      for (int i = 0; i < images; i++) run(alone, i, shared(rank), &ignored, scratch(rank));
    } else {
      const Team team{rank, size, barrier};
      for (int i = 0; i < images; i++) {
        run(team, i, shared(0), &ignored, scratch(rank));
        team.wait();
      }
    }
  }
#endif
}

// ---------------------------------------------------------------- checks

void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

std::string size_text(int h, int w) { return std::to_string(h) + "x" + std::to_string(w); }

struct Prepared {
  const Kernels& kernels;
  std::vector<Layer> layers;
  std::vector<Weights> weights;
  int threads;

  explicit Prepared(const Call& call)
      : kernels(kernels_of(call.isa)),
        layers(decode(call.program)),
        threads(std::max(call.threads, 1)) {
    check_tag(call.program, call.weights, call.weight_bytes);
    require(reinterpret_cast<uintptr_t>(call.weights) % alignof(float) == 0,
            "weights must be aligned to a float");
    // Kernels only read through these pointers.
    float* base = reinterpret_cast<float*>(static_cast<Tag*>(const_cast<void*>(call.weights)) + 1);
    weights.resize(layers.size());
    for (size_t i = 0; i < layers.size(); i++) base += place_weights(layers[i], base, weights[i]);
  }
  const Layer& single(Op op) const {
    require(layers.size() == 1 && layers[0].op == op, "program must be one layer of the op called");
    return layers[0];
  }
};

Plane image_of(Batch b, int image, int channels) {
  return {b.data ? b.data + size_t(image) * b.h * b.w * padded(channels) : nullptr, b.h, b.w};
}

void require_size(const char* name, Batch b, int n, int h, int w) {
  require(b.n == n && b.h == h && b.w == w,
          std::string(name) + " must be a batch of " + std::to_string(n) + " of " +
              size_text(h, w) + ", got " + std::to_string(b.n) + " of " + size_text(b.h, b.w));
}

void require_picture(const Layer& stem, const Picture& picture) {
  require(picture.c == stem.in,
          "x must have " + std::to_string(stem.in) + " channels, got " + std::to_string(picture.c));
  const int smallest = 3 - 2 * stem.padding;
  require(picture.h >= smallest && picture.w >= smallest,
          "x must be at least " + size_text(smallest, smallest) + ", got " +
              size_text(picture.h, picture.w));
}

void require_nonempty(Batch b) {
  require(b.n == 0 || (b.h >= 1 && b.w >= 1), "x must be at least 1x1, got " + size_text(b.h, b.w));
}

// An op of one plane in, one plane out.
using PlaneOp = size_t (*)(const Layer&, const Weights&, Plane, Plane, const Team&, Bump);
void run_plane_op(const Prepared& p, const Layer& l, PlaneOp op, Batch x, Batch out) {
  require_nonempty(x);
  require_size("out", out, x.n, l.output_size(x.h), l.output_size(x.w));
  for_each_image(x.n, p.threads, [&](const Team& team, int i, Bump, size_t*, Bump scratch) {
    return op(l, p.weights[0], image_of(x, i, l.in), image_of(out, i, l.result_channels()), team,
              scratch);
  });
}

void require_network(const std::vector<Layer>& layers) {
  const size_t n = layers.size();
  require(n >= 9, "program must be a whole network");
  auto expect = [&](size_t i, Op op, int in) {
    require(layers[i].op == op && layers[i].in == in,
            "program must be a whole network, layer " + std::to_string(i) + " does not fit");
  };
  expect(0, Op::stem_conv, layers[0].in);
  for (size_t i = 1; i < n; i++) {
    const Op op = i < 3        ? Op::dsconv
                  : i < n - 5  ? Op::inverted_residual
                  : i == n - 5 ? Op::pyramid_pooling
                  : i == n - 4 ? Op::feature_fusion
                  : i < n - 1  ? Op::dsconv
                               : Op::upsample_classify;
    expect(i, op, layers[i - 1].result_channels());
  }
  require(layers[n - 4].mid == layers[2].out && layers[n - 2].last > 0,
          "program must be a whole network, its fusion or classifier does not fit");
}

int pieces_of(Output output, int classes) { return output == Output::labels ? 1 : classes; }
size_t element_of(Output output) { return output == Output::labels ? 1 : sizeof(float); }

void require_classes(Output output, int classes) {
  require(output != Output::labels || classes <= kMaxClassesOfLabels,
          "labels must be of at most 256 classes, got " + std::to_string(classes));
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Candidate& c : kCandidates)
    if (c.runs()) names.push_back(c.kernels->name);
  return names;
}

const Kernels& kernels_of(const std::string& isa) {
  for (const Candidate& c : kCandidates)
    if (isa == c.kernels->name && c.runs()) return *c.kernels;
  throw std::invalid_argument("isa must be one that this processor runs, got '" + isa + "'");
}

int allowed_threads(int threads) {
#if defined(_OPENMP)
  if (!g_forked && !omp_in_parallel()) return std::max(threads, 1);
#endif
  (void)threads;
  return 1;
}

size_t scratch_bytes() { return pool().total(); }

void fill_scratch(int byte) { pool().fill(byte); }

void stem_conv(const Call& call, const Picture& picture, Batch out) {
  const Prepared p(call);
  const Layer& l = p.single(Op::stem_conv);
  require_picture(l, picture);
  require_size("out", out, picture.n, l.output_size(picture.h), l.output_size(picture.w));
  for_each_image(picture.n, p.threads, [&](const Team& team, int i, Bump, size_t*, Bump scratch) {
    return p.kernels.stem_conv(l, p.weights[0], picture, i, image_of(out, i, l.out), team, scratch);
  });
}

void dsconv(const Call& call, Batch x, Batch out) {
  const Prepared p(call);
  run_plane_op(p, p.single(Op::dsconv), p.kernels.dsconv, x, out);
}

void inverted_residual(const Call& call, Batch x, Batch out) {
  const Prepared p(call);
  run_plane_op(p, p.single(Op::inverted_residual), p.kernels.inverted_residual, x, out);
}

void pyramid_pooling(const Call& call, Batch x, Batch out) {
  const Prepared p(call);
  const Layer& l = p.single(Op::pyramid_pooling);
  require_nonempty(x);
  require_size("out", out, x.n, x.h, x.w);
  for_each_image(x.n, p.threads,
                 [&](const Team& team, int i, Bump shared, size_t* shared_bytes, Bump scratch) {
                   float* grids = shared.take<float>(pyramid_floats(l));
                   *shared_bytes = shared.used;
                   return p.kernels.pyramid_pooling(l, p.weights[0], image_of(x, i, l.in), grids,
                                                    image_of(out, i, l.out), team, scratch);
                 });
}

void feature_fusion(const Call& call, Batch high, Batch low, Batch out) {
  const Prepared p(call);
  const Layer& l = p.single(Op::feature_fusion);
  require_nonempty(high);
  require_nonempty(low);
  require_size("low", {low.data, low.n, low.h, low.w}, high.n, low.h, low.w);
  require_size("out", out, high.n, high.h, high.w);
  for_each_image(high.n, p.threads,
                 [&](const Team& team, int i, Bump shared, size_t* shared_bytes, Bump scratch) {
                   Plane refined{nullptr, low.h, low.w};
                   if (l.dense)
                     refined.data = shared.take<float>(size_t(low.h) * low.w * padded(l.in));
                   *shared_bytes = shared.used;
                   return p.kernels.feature_fusion(l, p.weights[0], image_of(high, i, l.mid),
                                                   image_of(low, i, l.in), refined,
                                                   image_of(out, i, l.out), team, scratch);
                 });
}

void upsample_classify(const Call& call, Batch x, Output output, void* out, int h, int w) {
  const Prepared p(call);
  const Layer& l = p.single(Op::upsample_classify);
  require_nonempty(x);
  require(h >= 1 && w >= 1, "size must be at least 1x1, got " + size_text(h, w));
  require_classes(output, l.in);
  const size_t bytes = element_of(output) * pieces_of(output, l.in) * h * w;
  prefer_huge_pages(out, x.n * bytes);
  for_each_image(x.n, p.threads,
                 [&](const Team& team, int i, Bump shared, size_t* shared_bytes, Bump scratch) {
                   return p.kernels.upsample_classify(l, image_of(x, i, l.in), output,
                                                      static_cast<char*>(out) + i * bytes, h, w,
                                                      team, shared, shared_bytes, scratch);
                 });
}

void network(const Call& call, const Picture& picture, Output output, void* out) {
  const Prepared p(call);
  require_network(p.layers);
  require_picture(p.layers[0], picture);
  const int classes = p.layers.back().in;
  require_classes(output, classes);
  const size_t bytes = element_of(output) * pieces_of(output, classes) * picture.h * picture.w;
  prefer_huge_pages(out, picture.n * bytes);
  for_each_image(picture.n, p.threads,
                 [&](const Team& team, int i, Bump shared, size_t* shared_bytes, Bump scratch) {
                   return p.kernels.network(p.layers.data(), p.weights.data(), int(p.layers.size()),
                                            picture, i, output, static_cast<char*>(out) + i * bytes,
                                            team, shared, shared_bytes, scratch);
                 });
}

}  // namespace fastscnn
