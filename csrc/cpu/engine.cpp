#include "engine.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#include "program.h"
#include "threads.h"
#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastscnn {
namespace {

// ---------------------------------------------------------------- processor

struct Candidate {
  const Kernels* kernels;
  bool (*runs)();
};

#if defined(__x86_64__)
bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma");
}
#endif
#if FASTSCNN_KNOWS_VNNI
bool runs_avx_vnni() {
  static const bool runs = [] {
    unsigned a, b, c, d;
    constexpr unsigned kAvxVnni = 1u << 4;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvxVnni);
  }();
  return runs;
}
#endif
#if FASTSCNN_KNOWS_BF16
bool runs_avx512_bf16() { return runs_avx512() && __builtin_cpu_supports("avx512bf16"); }

// The processor has tiles, and the system lets this process use them. That must be asked for.
bool runs_amx() {
#if defined(FASTSCNN_EMULATED_TILES)  // tests/support/emulated_tiles.h
  return runs_avx512_bf16() && __builtin_cpu_supports("avx512vnni");
#elif defined(__linux__)
  static const bool runs = [] {
    unsigned a, b, c, d;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
    constexpr unsigned kAll = kBf16 | kTile | kInt8;
    if (!runs_avx512_bf16() || !__builtin_cpu_supports("avx512vnni")) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // <asm/prctl.h>, <asm/fpu.h>
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return runs;
#else
  return false;
#endif
}
#endif

// The best last; what one lacks kernels for, the best of those before it runs.
const Candidate kCandidates[] = {
    {&kPortable, [] { return true; }},
#if defined(__x86_64__)
    {&kAvx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#if FASTSCNN_KNOWS_VNNI
    {&kAvxVnni, runs_avx_vnni},
#endif
    {&kAvx512, runs_avx512},
#if FASTSCNN_KNOWS_VNNI
    {&kAvx512Vnni, [] { return runs_avx512() && __builtin_cpu_supports("avx512vnni"); }},
#endif
#endif
#if FASTSCNN_KNOWS_BF16
    {&kAvx512Bf16, runs_avx512_bf16},
    {&kAmx, runs_amx},
#endif
};

// What the best instruction set up to `isa` provides of `member(kernels)`; null where none does.
template <class Member>
auto best_of(const std::string& isa, Member member) {
  decltype(member(kPortable)) best = nullptr;
  for (const Candidate& c : kCandidates) {
    if (auto* own = member(*c.kernels); own && c.runs()) best = own;
    if (isa == c.kernels->name && c.runs()) return best;
  }
  throw std::invalid_argument("isa must be one that this processor runs, got '" + isa + "'");
}

// ---------------------------------------------------------------- scratch

constexpr uintptr_t kHugePage = 2 << 20;

// A fresh picture-sized result costs more in page faults of 4 KiB than in arithmetic, and rows of a
// hundred pages more than the processor translates at once: ask for huge pages.
void prefer_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  const uintptr_t begin =
      (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

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
    if (posix_memalign(&data, bytes < kHugePage ? kLine : kHugePage, bytes)) {
      std::lock_guard<std::mutex> lock(mutex_);
      total_ -= bytes;
      throw std::bad_alloc();
    }
    prefer_huge_pages(data, bytes);
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

// A forked child must not find the pool locked by a thread that it does not have.
const int kForkHandlers =
    pthread_atfork([] { pool().lock(); }, [] { pool().unlock(); }, [] { pool().unlock(); });

class Scratch {
 public:
  explicit Scratch(size_t bytes) : buffer_(pool().take(bytes)) {}
  ~Scratch() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(buffer_.data, buffer_.bytes);
#endif
    pool().give(buffer_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return buffer_.data; }

 private:
  Pool::Buffer buffer_;
};

// ---------------------------------------------------------------- images

// Calls run(team, image, shared, scratch) for every image, first once with measuring buffers. Few
// images share all threads; from one a thread on, each thread takes whole images.
template <class Run>
void for_each_image(int images, int threads, Run run) {
  if (images == 0) return;
  size_t shared_bytes = 0;
  const size_t scratch_bytes =
      whole_lines(run(Team{0, 1, nullptr}, 0, Bump{}, &shared_bytes, Bump{}));
  shared_bytes = whole_lines(shared_bytes);

  threads = allowed_threads(threads);
  const bool apart = images >= threads;
  const int teams = apart ? threads : 1;
  const Scratch memory(threads * (sizeof(Share) + scratch_bytes) + teams * shared_bytes);
  Share* shares = reinterpret_cast<Share*>(memory.data());
  std::fill(shares, shares + threads, Share{0});
  char* scratch = memory.data() + threads * sizeof(Share);
  char* shared = scratch + threads * scratch_bytes;
  std::atomic<int> next{0};
  run_team(threads, [&](const Team& all) {
    const Bump own{scratch + all.rank * scratch_bytes};
    size_t ignored;
    if (apart) {
      const Team alone{0, 1, nullptr, shares + all.rank};
      for (int i; (i = next++) < images;)
        run(alone, i, Bump{shared + all.rank * shared_bytes}, &ignored, own);
    } else {
      const Team team{all.rank, all.size, all.barrier, shares};
      for (int i = 0; i < images; i++) {
        run(team, i, Bump{shared}, &ignored, own);
        team.wait();
      }
    }
  });
}

// ---------------------------------------------------------------- checks

std::string size_text(int h, int w) { return std::to_string(h) + "x" + std::to_string(w); }

struct Prepared {
  Arithmetic arithmetic;       // of layers that name no other
  std::vector<Loaded> layers;  // of the program, in its order
  int threads;

  explicit Prepared(const Call& call) : threads(std::max(call.threads, 1)) {
    require(reinterpret_cast<uintptr_t>(call.weights) % alignof(float) == 0,
            "weights must be aligned to a float");
    arithmetic = check_tag(call.program, call.weights, call.weight_bytes);
    // Kernels only read through these pointers.
    char* base = static_cast<char*>(const_cast<void*>(call.weights)) + sizeof(Tag);
    for (const Layer& l : decode(call.program)) {
      const Arithmetic own = arithmetic_of(l, arithmetic);
      const ArithmeticRecord& record = record_of(own);
      layers.push_back({l, {}, own, record.type, l.last ? record.results : record.type});
      base += place_weights(l, own, base, layers.back().weights);
    }
  }
};

// A layer run alone.
struct Single : Prepared {
  const Loaded& loaded;
  const Layer& layer;
  const Ops& ops;

  Single(const Call& call, Op op)
      : Prepared(call),
        loaded(only(layers, op)),
        layer(loaded.layer),
        ops(ops_of(call.isa, loaded.arithmetic)) {}
  static const Loaded& only(const std::vector<Loaded>& layers, Op op) {
    require(layers.size() == 1 && layers[0].layer.op == op,
            "program must be one layer of the op called");
    return layers[0];
  }
};

Plane image_of(Batch b, int image, int channels, Type type) {
  const size_t bytes = size_t(b.h) * b.w * pixel_pitch(channels, type) * bytes_of(type);
  return {b.data ? static_cast<char*>(b.data) + image * bytes : nullptr, b.h, b.w};
}

void require_size(const char* name, Batch b, int n, int h, int w) {
  require(b.n == n && b.h == h && b.w == w,
          std::string(name) + " must be a batch of " + std::to_string(n) + " of " +
              size_text(h, w) + ", got " + std::to_string(b.n) + " of " + size_text(b.h, b.w));
}

// What a Share's word holds.
void require_rows(int rows) {
  require(rows < kMostRows,
          "x must have fewer than 2^24 rows, got a result of " + std::to_string(rows));
}

void require_picture(const Loaded& loaded, const Picture& picture) {
  const Layer& stem = loaded.layer;
  require(picture.type == loaded.input || picture.type == Type::u8 || picture.type == Type::f32,
          "x must be uint8, float32 or what the weights are packed for");
  require(picture.c == stem.in,
          "x must have " + std::to_string(stem.in) + " channels, got " + std::to_string(picture.c));
  const int smallest = 3 - 2 * stem.padding;
  require(picture.h >= smallest && picture.w >= smallest,
          "x must be at least " + size_text(smallest, smallest) + ", got " +
              size_text(picture.h, picture.w));
  require_rows(picture.h);
}

void require_nonempty(Batch b) {
  require(b.n == 0 || (b.h >= 1 && b.w >= 1), "x must be at least 1x1, got " + size_text(b.h, b.w));
  require_rows(b.h);
}

// An op of one plane in, one plane out.
using PlaneOp = size_t (*)(const Layer&, const Weights&, Plane, Plane, const Team&, Bump);
void run_plane_op(const Single& p, PlaneOp op, Batch x, Batch out) {
  const Layer& l = p.layer;
  require_nonempty(x);
  require_size("out", out, x.n, l.output_size(x.h), l.output_size(x.w));
  for_each_image(x.n, p.threads, [&](const Team& team, int i, Bump, size_t*, Bump scratch) {
    return op(l, p.loaded.weights, image_of(x, i, l.in, p.loaded.input),
              image_of(out, i, l.result_channels(), p.loaded.result), team, scratch);
  });
}

// The one program of several layers that there are kernels for, recognised by its edges.
Chain chain_of(const Prepared& p) {
  const std::vector<Loaded>& layers = p.layers;
  const int count = int(layers.size());
  auto fit = [&](bool fits, int index) {
    require(fits,
            "program must be Fast-SCNN's chain (stem_conv, two dsconv, inverted_residual once or "
            "more, pyramid_pooling, feature_fusion of the second dsconv and the pyramid, dsconv, "
            "dsconv with a last 1x1, upsample_classify), " +
                (index < count ? "layer " + std::to_string(index) : "its end") + " does not fit");
  };
  int next = 0;
  // The next layer: of that op, its last input the layer before it, its arithmetic the network's.
  auto take = [&](Op op) {
    const int index = next++, before = index ? index - 1 : kPicture;
    fit(index < count, index);
    const Loaded& loaded = layers[index];
    const Layer& l = loaded.layer;
    fit(l.op == op && l.input_count && l.inputs[l.input_count - 1] == before, index);
    fit(before == kPicture || l.in == layers[before].layer.result_channels(), index);
    const ArithmeticRecord& record = record_of(p.arithmetic);
    const Arithmetic wanted = op == Op::stem_conv           ? record.stem
                              : op == Op::upsample_classify ? record.upsample
                                                            : p.arithmetic;
    require(loaded.arithmetic == wanted,
            "layer " + std::to_string(index) + " must compute in " + record_of(wanted).name +
                " in a network in " + record.name + ", got " + record_of(loaded.arithmetic).name);
    return &loaded;
  };
  auto take_dsconv = [&](bool last_1x1) {
    const Loaded* dsconv = take(Op::dsconv);
    fit((dsconv->layer.last > 0) == last_1x1, next - 1);
    return dsconv;
  };
  auto fit_stride_1 = [&](const Loaded* dsconv) { fit(dsconv->layer.stride == 1, next - 1); };

  Chain c{};
  c.stem = take(Op::stem_conv);
  c.first = take_dsconv(false);
  c.second = take_dsconv(false);
  const int second = next - 1;
  c.blocks = take(Op::inverted_residual);
  while (next < count && layers[next].layer.op == Op::inverted_residual)
    take(Op::inverted_residual);
  c.pyramid = take(Op::pyramid_pooling);
  c.fusion = take(Op::feature_fusion);
  fit(c.fusion->layer.inputs[0] == second && c.fusion->layer.mid == c.second->layer.out, next - 1);
  c.head = take_dsconv(false);
  fit_stride_1(c.head);
  c.tail = take_dsconv(true);
  fit_stride_1(c.tail);
  c.upsample = take(Op::upsample_classify);
  fit(next == count, next);
  return c;
}

int pieces_of(Output output, int classes) { return output == Output::labels ? 1 : classes; }
size_t element_of(Output output, Type type) {
  return output == Output::labels ? 1 : bytes_of(type);
}

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

std::vector<std::string> instruction_sets(Arithmetic arithmetic) {
  std::vector<std::string> names;
  for (const Candidate& c : kCandidates)
    if (c.kernels->ops[int(arithmetic)] && c.runs()) names.push_back(c.kernels->name);
  return names;
}

Arithmetic arithmetic_of(const std::string& name) {
  for (int a = 0; a < kArithmetics; a++)
    if (name == kRecords[a].name) return Arithmetic(a);
  throw std::invalid_argument("arithmetic must be " + arithmetic_names() + ", got '" + name + "'");
}

const Ops& ops_of(const std::string& isa, Arithmetic arithmetic) {
  const Ops* ops = best_of(isa, [&](const Kernels& k) { return k.ops[int(arithmetic)]; });
  if (ops) return *ops;
  throw std::invalid_argument("isa must be one with kernels for arithmetic " +
                              std::string(kRecords[int(arithmetic)].name) + ", got '" + isa + "'");
}

const TrainingKernels& training_kernels_of(const std::string& isa) {
  return *best_of(isa, [](const Kernels& k) { return k.training; });
}

double multiply_add_roof(const std::string& isa, Arithmetic arithmetic, int threads,
                         double seconds) {
  using Clock = std::chrono::steady_clock;
  const Ops& ops = ops_of(isa, arithmetic);
  std::mutex mutex;
  double rate = 0;
  run_team(allowed_threads(threads), [&](const Team&) {
    double done = 0, passed = 0;
    const auto start = Clock::now();
    do {
      done += ops.roof(1 << 13);
      passed = std::chrono::duration<double>(Clock::now() - start).count();
    } while (passed < seconds);
    const std::lock_guard<std::mutex> lock(mutex);
    rate += done / passed;
  });
  return rate;
}

size_t scratch_bytes() { return pool().total(); }

void fill_scratch(int byte) { pool().fill(byte); }

void stem_conv(const Call& call, const Picture& picture, Batch out) {
  const Single p(call, Op::stem_conv);
  const Layer& l = p.layer;
  require_picture(p.loaded, picture);
  require_size("out", out, picture.n, l.output_size(picture.h), l.output_size(picture.w));
  for_each_image(picture.n, p.threads, [&](const Team& team, int i, Bump, size_t*, Bump scratch) {
    return p.ops.stem_conv(l, p.loaded.weights, picture, i,
                           image_of(out, i, l.out, p.loaded.result), team, scratch);
  });
}

void dsconv(const Call& call, Batch x, Batch out) {
  const Single p(call, Op::dsconv);
  run_plane_op(p, p.ops.dsconv, x, out);
}

void inverted_residual(const Call& call, Batch x, Batch out) {
  const Single p(call, Op::inverted_residual);
  run_plane_op(p, p.ops.inverted_residual, x, out);
}

void pyramid_pooling(const Call& call, Batch x, Batch out) {
  const Single p(call, Op::pyramid_pooling);
  const Layer& l = p.layer;
  require_nonempty(x);
  require_size("out", out, x.n, x.h, x.w);
  constexpr int64_t kMostSummed = int64_t(1) << 23;  // pixels of 255 in an int32
  require(p.loaded.input != Type::u8 || int64_t(x.h) * x.w <= kMostSummed,
          "x must have at most 2^23 pixels in int8, got " + size_text(x.h, x.w));
  for_each_image(x.n, p.threads,
                 [&](const Team& team, int i, Bump shared, size_t* shared_bytes, Bump scratch) {
                   Branch branches[kMaxBins];
                   place_branches(l, p.loaded.input, shared, branches);
                   *shared_bytes = shared.used;
                   return p.ops.pyramid_pooling(
                       l, p.loaded.weights, image_of(x, i, l.in, p.loaded.input), branches,
                       image_of(out, i, l.out, p.loaded.result), team, scratch);
                 });
}

void feature_fusion(const Call& call, Batch high, Batch low, Batch out) {
  const Single p(call, Op::feature_fusion);
  const Layer& l = p.layer;
  require_nonempty(high);
  require_nonempty(low);
  require_size("low", {low.data, low.n, low.h, low.w}, high.n, low.h, low.w);
  require_size("out", out, high.n, high.h, high.w);
  const Type type = p.loaded.input;
  for_each_image(
      high.n, p.threads,
      [&](const Team& team, int i, Bump shared, size_t* shared_bytes, Bump scratch) {
        Plane refined{nullptr, low.h, low.w};
        if (l.dense)
          refined.data =
              shared.take<char>(size_t(low.h) * low.w * pixel_pitch(l.in, type) * bytes_of(type));
        *shared_bytes = shared.used;
        return p.ops.feature_fusion(l, p.loaded.weights, image_of(high, i, l.mid, type),
                                    image_of(low, i, l.in, type), refined,
                                    image_of(out, i, l.out, p.loaded.result), team, scratch);
      });
}

void upsample_classify(const Call& call, Batch x, Output output, void* out, int h, int w) {
  const Single p(call, Op::upsample_classify);
  const Layer& l = p.layer;
  require_nonempty(x);
  require(h >= 1 && w >= 1, "size must be at least 1x1, got " + size_text(h, w));
  require_classes(output, l.in);
  const size_t bytes = element_of(output, p.loaded.result) * pieces_of(output, l.in) * h * w;
  prefer_huge_pages(out, x.n * bytes);
  for_each_image(x.n, p.threads, [&](const Team& team, int i, Bump, size_t*, Bump scratch) {
    return p.ops.upsample_classify(l, image_of(x, i, l.in, p.loaded.input), output,
                                   static_cast<char*>(out) + i * bytes, h, w, team, scratch);
  });
}

namespace {

void run_network(const Call& call, const Picture& picture, Output output, void* out,
                 Reached* reached) {
  const Prepared p(call);
  const Chain chain = chain_of(p);
  const Ops& ops = ops_of(call.isa, p.arithmetic);
  require_picture(*chain.stem, picture);
  const int classes = chain.upsample->layer.in;
  require_classes(output, classes);
  const size_t bytes = element_of(output, chain.upsample->result) * pieces_of(output, classes) *
                       picture.h * picture.w;
  prefer_huge_pages(out, picture.n * bytes);
  for_each_image(picture.n, p.threads,
                 [&](const Team& team, int i, Bump shared, size_t* shared_bytes, Bump scratch) {
                   return ops.network(chain, picture, i, output,
                                      static_cast<char*>(out) + i * bytes, team, reached, shared,
                                      shared_bytes, scratch);
                 });
}

// What the first thread of a team, the caller, has measured.
struct StageClock {
  std::chrono::steady_clock::time_point last = std::chrono::steady_clock::now();
  StageTimes times;
};
thread_local StageClock* t_stages = nullptr;

}  // namespace

void network(const Call& call, const Picture& picture, Output output, void* out) {
  run_network(call, picture, output, out, nullptr);
}

StageTimes network_stages(const Call& call, const Picture& picture, Output output, void* out) {
  require(picture.n == 1, "x must be one picture, got " + std::to_string(picture.n));
  StageClock stages;
  t_stages = &stages;
  run_network(call, picture, output, out, [](const char* stage, int block) {
    const auto now = std::chrono::steady_clock::now();
    const std::chrono::duration<double> passed = now - t_stages->last;
    t_stages->times.emplace_back(block < 0 ? stage : stage + std::to_string(block), passed.count());
    t_stages->last = now;
  });
  return stages.times;
}

}  // namespace fastscnn
