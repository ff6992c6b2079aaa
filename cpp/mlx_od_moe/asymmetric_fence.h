// A pair of fences of which the frequent one costs nothing and the rare one pays for both.
//
// Of a thread that calls count_in and one that calls count, at least one sees, after that call, what the
// other did before its own: the counter included.
//
// Threads    Any.
// Ordering   Linux's membarrier: the heavy side makes every running thread of the process pass a full
//            fence, wherever it is. Elsewhere, and under ThreadSanitizer (which knows no membarrier), both
//            are a read-modify-write of the same variable, of which the later sees the earlier.
// Errors     None.
// Costs      count: a load, or one atomic operation. count_in: 1-10 us, or the same.
#pragma once

#include <atomic>
#include <cstdint>

#if defined(__linux__) && !defined(__SANITIZE_THREAD__)
#include <linux/membarrier.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mlx_od_moe {

#if defined(__linux__) && !defined(__SANITIZE_THREAD__) && defined(SYS_membarrier)
namespace detail {
// A child process after fork() inherits it.
inline const bool has_membarrier = syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0) == 0;
inline void membarrier() { syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0); }
}  // namespace detail
#else
namespace detail {
constexpr bool has_membarrier = false;
inline void membarrier() {}
}  // namespace detail
#endif

// A counter with such fences.
class AsymmetricCounter {
 public:
  // Light: the count.
  uint32_t count() {
    if (!detail::has_membarrier) return value_.fetch_add(0, std::memory_order_acq_rel);
    std::atomic_signal_fence(std::memory_order_seq_cst);  // the compiler, too, keeps the order
    return value_.load(std::memory_order_acquire);
  }
  // Heavy.
  void count_in() {
    value_.fetch_add(1, std::memory_order_acq_rel);
    if (detail::has_membarrier) detail::membarrier();
  }
  void count_out() { value_.fetch_sub(1, std::memory_order_relaxed); }

 private:
  std::atomic<uint32_t> value_{0};
};

}  // namespace mlx_od_moe
