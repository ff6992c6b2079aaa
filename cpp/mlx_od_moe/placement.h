// Keeps a helper thread off the CPU of the thread that wakes it.
//
// Seen on Linux 6.18 with two CPUs: a helper that last ran on its caller's CPU is woken there again and
// again, though the other is idle, and waits for the very thread that wants its help.
//
// Threads    `settle` by the helper, `keep_clear` by any thread that is about to wake it.
// Ownership  Nothing. The helper must live when keep_clear is called.
// Errors     None. Where the caller may use no other CPU, and on systems other than Linux, nothing is done.
// Costs      Some nanoseconds; where the CPUs are the same, two system calls (about 3 us).
#pragma once

#include <atomic>

#if defined(__linux__)
#include <sched.h>
#include <unistd.h>
#endif

namespace mlx_od_moe {

class Placement {
 public:
#if defined(__linux__)
  // The helper, whenever it is about to wait.
  void settle() {
    if (thread_.load(std::memory_order_relaxed) == 0) thread_.store(gettid(), std::memory_order_relaxed);
    cpu_.store(sched_getcpu(), std::memory_order_relaxed);
  }

  // From now on the helper may run wherever its caller may, but for the CPU where the caller is.
  void keep_clear() {
    const int here = sched_getcpu();
    if (here < 0 || cpu_.load(std::memory_order_relaxed) != here) return;
    cpu_set_t others;
    if (sched_getaffinity(0, sizeof(others), &others) != 0) return;
    CPU_CLR(here, &others);
    if (CPU_COUNT(&others) == 0) return;
    sched_setaffinity(thread_.load(std::memory_order_relaxed), sizeof(others), &others);
    cpu_.store(-1, std::memory_order_relaxed);
  }

 private:
  std::atomic<int> thread_{0};
  std::atomic<int> cpu_{-1};  // where the helper settled last
#else
  void settle() {}
  void keep_clear() {}
#endif
};

}  // namespace mlx_od_moe
