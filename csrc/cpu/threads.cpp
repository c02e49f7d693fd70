#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <thread>

#include "denormals.h"
#if defined(FASTSCNN_STD_THREADS)
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastscnn {
namespace {

bool g_forked = false;
const int kForkHandler = pthread_atfork(nullptr, nullptr, [] { g_forked = true; });

// OpenMP's own barrier spins for milliseconds where another process holds the processor that the
// last thread needs: this one gives way after the few microseconds that a stage's end takes.
class Barrier {
 public:
  void wait(int size) {
    const unsigned round = round_.load(std::memory_order_acquire);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      waiting_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++)
      spins < kSpins ? pause() : std::this_thread::yield();
  }

 private:
  static constexpr int kSpins = 1000;
  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }
  alignas(64) std::atomic<int> waiting_{0};
  alignas(64) std::atomic<unsigned> round_{0};
};

// Of the team that this thread is in.
thread_local Barrier* t_barrier = nullptr;
thread_local int t_size = 0;

template <class Body>
void run_member(Barrier& barrier, int rank, int size, Body& body) {
  t_barrier = &barrier, t_size = size;
  body(Team{rank, size, [] { t_barrier->wait(t_size); }});
  t_barrier = nullptr, t_size = 0;
}

#if defined(FASTSCNN_STD_THREADS)

bool in_team() { return t_barrier; }

template <class Body>
void fork_and_join(int threads, Body body) {
  Barrier barrier;
  std::vector<std::thread> others;
  for (int rank = 1; rank < threads; rank++)
    others.emplace_back([&, rank] { run_member(barrier, rank, threads, body); });
  run_member(barrier, 0, threads, body);
  for (std::thread& other : others) other.join();
}

#elif defined(_OPENMP)

bool in_team() { return omp_in_parallel(); }

template <class Body>
void fork_and_join(int threads, Body body) {
  Barrier barrier;
#pragma omp parallel num_threads(threads)
  run_member(barrier, omp_get_thread_num(), omp_get_num_threads(), body);
}

#else

bool in_team() { return true; }

template <class Body>
void fork_and_join(int, Body body) {
  body(Team{0, 1, nullptr});
}

#endif

}  // namespace

int allowed_threads(int threads) { return g_forked || in_team() ? 1 : std::max(threads, 1); }

void run_team(int threads, void (*body)(void*, const Team&), void* context) {
  auto flushed = [&](const Team& team) {
    const FlushDenormals flush;
    body(context, team);
  };
  if (threads == 1) return flushed(Team{0, 1, nullptr});
  fork_and_join(threads, flushed);
}

}  // namespace fastscnn
