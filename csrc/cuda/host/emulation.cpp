#include "emulation.h"

#include <setjmp.h>
#include <ucontext.h>
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastscnn::cuda::emulation {
namespace {

constexpr unsigned kLanes = 32;
constexpr size_t kStack = 128 * 1024;
constexpr size_t kLocals = 4 * 1024;     // bytes of a stack that a kernel's locals take at most
constexpr size_t kGuard = 1024;          // bytes before and after shared memory
constexpr unsigned char kPoison = 0xff;  // NaN in every type

enum class State { ready, at_barrier, in_collective, waits_for_launches, done };

using Memory = std::vector<std::pair<uintptr_t, size_t>>;  // addresses and bytes

struct Fiber {
  ucontext_t first;  // where it begins
  jmp_buf at;        // where it goes on
  bool begun;
  State state;
  unsigned id;
  int line;     // of the barrier
  bool waited;  // for the launches before
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
  std::vector<std::pair<float4*, float4>> unpublished;  // what other blocks do not see yet
  bool published;                                       // whether it has, once at least
  bool sees_others;                                     // whether it has since its block arrived
};

struct Warp {
  void* arguments[kLanes];
  void (*act)(void* const*);
  unsigned arrived;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> stacks;
  std::vector<unsigned char> memory;  // guard, shared memory, guard
  unsigned char* shared;
  size_t shared_bytes;
  bool arrived;  // at a counter
  bool early;    // whether copies arrive at once, not when they are waited for
  uint3 index;
  dim3 size, grid;
  const std::function<void()>* kernel;
  const Memory* in_flight;
  std::function<void()> when_waited;  // of the block that began while the launches before ran
  jmp_buf scheduler;
  Fiber* current;
  std::string error;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
};

thread_local Block* block = nullptr;
std::atomic<unsigned> warp_order{0};
thread_local Memory in_flight;

bool is_in_flight(const void* p, const Memory& memory) {
  const auto at = reinterpret_cast<uintptr_t>(p);
  return std::any_of(memory.begin(), memory.end(), [at](const auto& one) {
    return at >= one.first && at - one.first < one.second;
  });
}

// The launches before, as those see it that begin before they end: the memory in flight is poison,
// and must be when they end. In odd orders it is of small numbers: NaN may lead a kernel to a
// slower way that is right.
class LaunchesBefore {
 public:
  explicit LaunchesBefore(unsigned order) : poison_(order % 2 ? 0x3c : kPoison) {
    for (const auto& [at, bytes] : in_flight) {
      auto* begin = reinterpret_cast<unsigned char*>(at);
      values_.emplace_back(begin, begin + bytes);
      std::memset(begin, poison_, bytes);
    }
  }
  ~LaunchesBefore() { end(); }
  // Whether nobody wrote there.
  bool end() {
    bool untouched = true;
    for (size_t i = 0; i < values_.size(); ++i) {
      auto* begin = reinterpret_cast<unsigned char*>(in_flight[i].first);
      const auto written = [this](unsigned char byte) { return byte != poison_; };
      untouched &= std::none_of(begin, begin + values_[i].size(), written);
      std::copy(values_[i].begin(), values_[i].end(), begin);
    }
    values_.clear();
    return untouched;
  }

 private:
  const unsigned char poison_;
  std::vector<std::vector<unsigned char>> values_;
};

// AddressSanitizer must know which stack is in use; `saved` is null where the one that is left will
// not be entered again.
void about_to_enter(void** saved, const void* stack, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(saved, stack, bytes);
#else
  (void)saved, (void)stack, (void)bytes;
#endif
}

void entered(void* saved, const void** from, size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(saved, from, bytes);
#else
  (void)saved, (void)from, (void)bytes;
#endif
}

unsigned char* stack_of(const Fiber& fiber) { return &block->stacks[fiber.id * kStack]; }

void to_scheduler(bool ends = false) {
  void* saved = nullptr;
  about_to_enter(ends ? nullptr : &saved, block->scheduler_stack, block->scheduler_stack_bytes);
  if (ends || _setjmp(block->current->at) == 0) _longjmp(block->scheduler, 1);
  entered(saved, nullptr, nullptr);
}

void to_fiber(Fiber& fiber) {
  block->current = &fiber;
  void* saved = nullptr;
  if (_setjmp(block->scheduler) == 0) {
    about_to_enter(&saved, stack_of(fiber), kStack);
    if (std::exchange(fiber.begun, true)) _longjmp(fiber.at, 1);
    setcontext(&fiber.first);
  }
  entered(saved, nullptr, nullptr);
}

void pause(State state) {
  block->current->state = state;
  to_scheduler();
}

void body() {
  entered(nullptr, &block->scheduler_stack, &block->scheduler_stack_bytes);
  (*block->kernel)();
  Fiber& fiber = *block->current;
  const auto unwaited = [](const std::vector<Copy>& group) { return !group.empty(); };
  if (!fiber.open.empty() || std::any_of(fiber.groups.begin(), fiber.groups.end(), unwaited)) {
    fail("a thread must wait for its asynchronous copies before it ends");
  }
  if (!fiber.unpublished.empty()) fail("a thread must publish what it stores for other blocks");
  if (!fiber.waited) fail("a thread must wait for the launches before");
  fiber.state = State::done;
  to_scheduler(true);
}

void begin(Fiber& fiber) {
  fiber.begun = false;
  fiber.state = State::ready;
  fiber.open.clear();
  fiber.groups.clear();
  fiber.unpublished.clear();
  fiber.published = fiber.sees_others = fiber.waited = false;
  std::fill_n(stack_of(fiber) + kStack - kLocals, kLocals, kPoison);
  getcontext(&fiber.first);
  fiber.first.uc_stack.ss_sp = stack_of(fiber);
  fiber.first.uc_stack.ss_size = kStack;
  fiber.first.uc_link = nullptr;
  makecontext(&fiber.first, body, 0);
}

unsigned count(State state) {
  const auto is = [state](const Fiber& fiber) { return fiber.state == state; };
  return unsigned(std::count_if(block->fibers.begin(), block->fibers.end(), is));
}

// Lets all threads go on that wait at the barrier, if all do; whether they did.
bool pass_barrier() {
  const auto& fibers = block->fibers;
  const unsigned waiting = count(State::at_barrier), done = count(State::done);
  if (waiting == 0 || waiting + done < fibers.size()) return false;
  const int line = std::find_if(fibers.begin(), fibers.end(), [](const Fiber& fiber) {
                     return fiber.state == State::at_barrier;
                   })->line;
  for (const Fiber& fiber : fibers) {
    if (fiber.state == State::done) {
      block->error = "a barrier is not reached by threads that ended";
    } else if (fiber.line != line) {
      block->error = "threads of one block wait at different barriers";
    }
  }
  for (Fiber& fiber : block->fibers) fiber.state = State::ready;
  return true;
}

// Lets the threads go on that wait for the launches before, if all do; whether they did.
bool pass_launches_before() {
  const unsigned waiting = count(State::waits_for_launches);
  if (waiting < block->fibers.size()) return false;
  std::exchange(block->when_waited, nullptr)();
  for (Fiber& fiber : block->fibers) fiber.state = State::ready;
  return true;
}

void check_guards() {
  const auto broken = [](unsigned char byte) { return byte != kPoison; };
  const unsigned char *begin = block->memory.data(), *end = begin + block->memory.size();
  if (std::any_of(begin, static_cast<const unsigned char*>(block->shared), broken) ||
      std::any_of(static_cast<const unsigned char*>(block->shared) + block->shared_bytes, end,
                  broken)) {
    block->error = "a thread wrote outside of its block's shared memory";
  }
}

void run_block(unsigned order) {
  std::fill(block->memory.begin(), block->memory.end(), kPoison);
  block->arrived = false;
  for (Fiber& fiber : block->fibers) begin(fiber);
  for (Warp& warp : block->warps) warp.arrived = 0;
  const unsigned warps = unsigned(block->warps.size());
  unsigned random = order * 2654435761u + block->index.x * 7919u + block->index.y * 104729u;
  while (block->error.empty() && count(State::done) < block->fibers.size()) {
    bool ran = false;
    random = random * 1664525u + 1013904223u;
    const unsigned first = order ? (random >> 8) % warps : 0;
    for (unsigned w = 0; w < warps && block->error.empty(); ++w) {
      const unsigned turn = (first + w) % warps, warp = order % 2 ? warps - 1 - turn : turn;
      // As far as it gets, or a step of each lane: what one order hides another shows.
      for (bool more = true; more && block->error.empty();) {
        more = false;
        for (unsigned lane = 0; lane < kLanes && block->error.empty(); ++lane) {
          Fiber& fiber = block->fibers[warp * kLanes + lane];
          if (fiber.state != State::ready) continue;
          ran = true;
          more = order < 2;
          to_fiber(fiber);
        }
      }
    }
    if (!ran && !pass_launches_before() && !pass_barrier()) {
      block->error = "a barrier or a collective of the warp is not reached by all threads";
    }
  }
  if (block->error.empty()) check_guards();
}

// Which of `all` blocks begins as the i-th: each does once, whatever the order.
uint64_t place(uint64_t i, uint64_t all, unsigned order) {
  if (order < 2) return order ? all - 1 - i : i;
  uint64_t step = 2 * order + 1;
  while (std::gcd(step, all) != 1) ++step;
  return (i * step + order) % all;
}

void run_blocks(Block& mine, std::atomic<uint64_t>& next, uint64_t end, unsigned order,
                std::atomic<bool>& failed) {
  block = &mine;
  for (uint64_t i; !failed && (i = next++) < end;) {
    const uint64_t at = place(i, end, order);
    mine.index = {unsigned(at % mine.grid.x), unsigned(at / mine.grid.x), 0};
    run_block(order);
    if (!mine.error.empty()) {
      mine.error +=
          " (block " + std::to_string(mine.index.x) + ", " + std::to_string(mine.index.y) + ")";
      failed = true;
    }
  }
  block = nullptr;
}

}  // namespace

void set_warp_order(unsigned order) { warp_order = order; }

void launch(unsigned blocks, unsigned rows, unsigned threads, size_t shared,
            const std::function<void()>& kernel) {
  if (threads == 0 || threads % kLanes) throw std::runtime_error("a block must be of whole warps");
  const uint64_t total = uint64_t{blocks} * rows;
  const unsigned workers =
      unsigned(std::min<uint64_t>(std::max(1u, std::thread::hardware_concurrency()), total));
  const unsigned order = warp_order;
  std::vector<Block> all(workers);
  for (Block& one : all) {
    one.fibers.resize(threads);
    for (unsigned i = 0; i < threads; ++i) one.fibers[i].id = i;
    one.warps.resize(threads / kLanes);
    one.stacks.reset(new unsigned char[threads * kStack]);
    one.memory.resize(2 * kGuard + shared + 128);
    const auto start = reinterpret_cast<uintptr_t>(one.memory.data()) + kGuard;
    one.shared = reinterpret_cast<unsigned char*>((start + 127) / 128 * 128);
    one.shared_bytes = shared;
    one.early = order % 2;
    one.size = dim3(threads);
    one.grid = dim3(blocks, rows);
    one.kernel = &kernel;
    one.in_flight = &in_flight;
  }
  std::atomic<uint64_t> next{0};
  std::atomic<bool> failed{false};
  std::vector<std::thread> others;
  LaunchesBefore before(order);
  all[0].when_waited = [&] {
    if (!before.end()) {
      all[0].error = "what launches before use must not be written until they were waited for";
      return;
    }
    for (unsigned i = 1; i < workers; ++i) {
      others.emplace_back([&, i] { run_blocks(all[i], next, total, order, failed); });
    }
  };
  run_blocks(all[0], next, total, order, failed);
  for (std::thread& other : others) other.join();
  for (const Block& one : all) {
    if (!one.error.empty()) throw std::runtime_error(one.error);
  }
}

void fail(const char* rule) {
  block->error = std::string(rule) + " (thread " + std::to_string(block->current->id) + ")";
  to_scheduler(true);
  __builtin_unreachable();
}

uint3 thread_index() { return {block->current->id, 0, 0}; }
uint3 block_index() { return block->index; }
dim3 block_size() { return block->size; }
dim3 grid_size() { return block->grid; }
unsigned char* shared_memory() { return block->shared; }

void barrier(int line) {
  block->current->line = line;
  pause(State::at_barrier);
}

void set_in_flight(const Memory& memory) { in_flight = memory; }

void wait_for_launches_before() {
  // Only what began early has something to wait for: to the others this is no barrier, as on a GPU.
  if (block->when_waited) pause(State::waits_for_launches);
  block->current->waited = true;
}

void arrive(const Copy& copy) {
  if (copy.from) {
    std::memcpy(copy.to, copy.from, 16);
  } else {
    std::memset(copy.to, 0, 16);
  }
}

void copy_16(const Copy& copy) {
  const auto* to = static_cast<unsigned char*>(copy.to);
  if (to < block->shared || to + 16 > block->shared + block->shared_bytes) {
    fail("an asynchronous copy must go to the block's shared memory");
  }
  if (copy.from && !block->current->waited && is_in_flight(copy.from, *block->in_flight)) {
    fail("what launches before use must not be read until they were waited for");
  }
  if (block->early) arrive(copy);
  block->current->open.push_back(copy);
}

void commit() {
  Fiber& fiber = *block->current;
  fiber.groups.push_back(std::exchange(fiber.open, {}));
}

void wait(int pending) {
  auto& groups = block->current->groups;
  while (groups.size() > size_t(pending)) {
    if (!block->early) {
      for (const Copy& copy : groups.front()) arrive(copy);
    }
    groups.erase(groups.begin());
  }
}

void store_for_others(float4* to, float4 v) { block->current->unpublished.emplace_back(to, v); }

float4 load_from_others(const float4* from) {
  if (!block->current->sees_others) {
    fail("a thread must publish between its block's arrival and what it loads from other blocks");
  }
  return *from;
}

void publish() {
  Fiber& fiber = *block->current;
  for (const auto& [to, value] : std::exchange(fiber.unpublished, {})) *to = value;
  fiber.published = true;
  fiber.sees_others = block->arrived;
}

int arrive(int* counter) {
  for (const Fiber& fiber : block->fibers) {
    if (!fiber.unpublished.empty() || !fiber.published) {
      fail("all threads of a block must have published before one of them arrives");
    }
  }
  block->arrived = true;
  return __atomic_fetch_add(counter, 1, __ATOMIC_SEQ_CST);
}

void collective(void* argument, void (*act)(void* const*)) {
  Warp& warp = block->warps[block->current->id / kLanes];
  if (warp.arrived == 0) warp.act = act;
  if (warp.act != act) fail("lanes of one warp must be in the same collective");
  warp.arguments[block->current->id % kLanes] = argument;
  if (++warp.arrived < kLanes) {
    pause(State::in_collective);
    return;
  }
  act(warp.arguments);
  warp.arrived = 0;
  const unsigned first = block->current->id / kLanes * kLanes;
  for (unsigned lane = 0; lane < kLanes; ++lane) block->fibers[first + lane].state = State::ready;
}

}  // namespace fastscnn::cuda::emulation
