// Work that several threads do together.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace jaxkv {

constexpr int kSpins = 2000;       // looks at the others' tasks, some 40 us, before this thread sleeps
constexpr int64_t kAlone = 1 << 19;  // bytes, or as much arithmetic, below which another thread costs more than it brings

// Calls run(number, thread) for each of `tasks` numbers: on this thread and, if it pays, on up to `helpers` that
// `schedule` can have begin a function. This thread takes tasks until none is left, and then waits only for those that
// have been begun: never for a thread to become free.
template <class Run, class Schedule>
void divide(int64_t tasks, int64_t helpers, const Run& run, const Schedule& schedule) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0}, threads{0};
    const Run* run;
    int64_t tasks;
    std::mutex mutex;
    std::condition_variable finished;
    void work() {
      int64_t i = next.fetch_add(1, std::memory_order_relaxed);
      if (i >= tasks) return;
      for (const int64_t thread = threads.fetch_add(1, std::memory_order_relaxed); i < tasks;
           i = next.fetch_add(1, std::memory_order_relaxed)) {
        (*run)(i, thread);
        if (done.fetch_add(1, std::memory_order_acq_rel) + 1 < tasks) continue;
        std::lock_guard<std::mutex> lock(mutex);
        finished.notify_one();
      }
    }
    bool ready() const { return done.load(std::memory_order_acquire) == tasks; }
  };
  helpers = std::min(helpers, tasks - 1);
  if (helpers < 1) {
    for (int64_t i = 0; i < tasks; ++i) run(i, 0);
    return;
  }
  auto shared = std::make_shared<Shared>();  // a helper that comes late finds it, and nothing to do
  shared->run = &run;
  shared->tasks = tasks;
  for (int64_t i = 0; i < helpers; ++i) schedule([shared] { shared->work(); });
  shared->work();
  for (int spins = 0; spins < kSpins && !shared->ready(); ++spins) {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }
  // A thread that was stopped within a task may wait for this very core: sleep, and it comes here.
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->finished.wait(lock, [&] { return shared->ready(); });
}

}  // namespace jaxkv
