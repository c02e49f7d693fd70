// Teams of threads: OpenMP's, which torch's own loops run on too, or, with FASTSCNN_STD_THREADS,
// plain ones: ThreadSanitizer takes libgomp's synchronisation for none.
#pragma once
#include "kernels.h"

namespace fastscnn {

// How many threads a call may use: one in a forked child, which has none of OpenMP's, and within a
// team.
int allowed_threads(int threads);

// Calls body(context, team) on at most so many threads at once, each with denormals flushed to
// zero; returns when all have returned. The team may be smaller than asked for. `body` must not
// throw where it has company.
void run_team(int threads, void (*body)(void* context, const Team&), void* context);

template <class Body>
void run_team(int threads, Body body) {
  run_team(
      threads, [](void* context, const Team& team) { (*static_cast<Body*>(context))(team); },
      &body);
}

}  // namespace fastscnn
