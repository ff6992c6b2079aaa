// Where threads sleep until something they poll for has come true: an event count.
//
// Threads    Any thread may call any method. In a child process after fork() it works on, without the
//            threads that waited here before: those stayed with the parent.
// Ownership  Must outlive every call.
// Ordering   waiters_ (see AsymmetricCounter): either the notifier sees the waiter and wakes it, or the
//            waiter sees all that the notifier did before, and does not sleep.
// Errors     None, but what `ready` throws.
// Units      Deadlines by std::chrono::steady_clock.
// Costs      A notice that finds nobody: a load (without membarrier: one atomic operation). One that wakes: two
//            system calls. A wait spins for up to kSpin, then sleeps; waking takes 5-60 us. Where spinning was
//            in vain the next waits go to sleep at once, but for one in kProbe: what they wait for may need
//            their core. A watch takes 4 to 14 % of a core while it lasts, most of it in its first milliseconds.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#include "mlx_od_moe/asymmetric_fence.h"

namespace mlx_od_moe {

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");  // yield returns at once on most cores
#endif
}

namespace detail {
inline std::atomic<uint32_t> forks{0};
}

// How many forks lie between this process and the first that asked.
inline uint32_t fork_count() {
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { detail::forks.fetch_add(1, std::memory_order_relaxed); });
  static_cast<void>(registered);
  return detail::forks.load(std::memory_order_relaxed);
}

class Parking {
 public:
  using Clock = std::chrono::steady_clock;
  // Bridges one forward of a predictor or two; short against a slice of the scheduler (some milliseconds).
  static constexpr std::chrono::microseconds kSpin{100};
  static constexpr uint32_t kProbe = 16;
  static constexpr std::chrono::microseconds kNap{50}, kLongestNap{400};
  static constexpr std::chrono::milliseconds kWatch{20};
  static constexpr Clock::time_point kForever = Clock::time_point::max();

  Parking() : lot_(new Lot) {}
  ~Parking() {
    // In a forked child the lot may be locked for ever, and destroying it would wait for that.
    if (Lot* lot = lot_.load(std::memory_order_relaxed); lot->forks == fork_count()) delete lot;
  }
  Parking(const Parking&) = delete;
  Parking& operator=(const Parking&) = delete;

  // Returns true once ready() does, false where it does not by the deadline.
  template <class Ready>
  bool wait(Ready ready, Clock::time_point deadline = kForever) {
    return spin(ready, deadline) || sleep(ready, deadline);
  }

  // For up to kWatch looks itself, too, whether ready() does: who makes it so may leave the notice out. Each nap
  // lasts an eighth of the time since the first, within kNap and kLongestNap.
  template <class Ready>
  bool watch(Ready ready) {
    if (spin(ready, kForever)) return true;
    Lot& lot = this_process();
    const Entry entry(waiters_);
    std::unique_lock lock(lot.mutex);
    const Clock::time_point start = Clock::now();
    for (Clock::duration waited{0}; waited < kWatch; waited = Clock::now() - start) {
      if (ready()) return true;
      lot.wake.wait_for(lock, std::clamp<Clock::duration>(waited / 8, kNap, kLongestNap));
    }
    return ready();
  }

  void notify_one() {
    if (Lot* lot = occupied()) lot->wake.notify_one();
  }
  void notify_all() {
    if (Lot* lot = occupied()) lot->wake.notify_all();
  }

 private:
  struct Lot {
    std::mutex mutex;
    std::condition_variable wake;
    const uint32_t forks = fork_count();
  };

  template <class Ready>
  bool spin(Ready& ready, Clock::time_point deadline) {
    if (ready()) return true;
    static const bool alone = std::thread::hardware_concurrency() == 1;
    const uint32_t vain = vain_.load(std::memory_order_relaxed);
    const Clock::time_point start = Clock::now();
    if (alone || deadline <= start) return false;
    if (vain % kProbe == 0) {
      const Clock::time_point end = deadline - start < kSpin ? deadline : start + kSpin;
      do {
        for (int i = 0; i < 16; ++i) {  // the clock is read rarely
          pause_cpu();
          if (ready()) {
            if (vain != 0) vain_.store(0, std::memory_order_relaxed);
            return true;
          }
        }
      } while (Clock::now() < end);
    }
    vain_.store(vain + 1, std::memory_order_relaxed);
    return false;
  }

  template <class Ready>
  bool sleep(Ready& ready, Clock::time_point deadline) {
    Lot& lot = this_process();
    const Entry entry(waiters_);
    std::unique_lock lock(lot.mutex);
    while (!ready()) {
      if (deadline == kForever) {
        lot.wake.wait(lock);
      } else if (lot.wake.wait_until(lock, deadline) == std::cv_status::timeout) {
        return ready();
      }
    }
    return true;
  }

  struct Entry {
    explicit Entry(AsymmetricCounter& count) : waiters(count) { waiters.count_in(); }
    ~Entry() { waiters.count_out(); }
    Entry(const Entry&) = delete;
    Entry& operator=(const Entry&) = delete;
    AsymmetricCounter& waiters;
  };

  // The lot, where someone sleeps in it or is about to.
  Lot* occupied() {
    if (waiters_.count() == 0) return nullptr;
    Lot& lot = this_process();
    // A waiter that has looked in vain holds the mutex until it sleeps.
    const std::lock_guard lock(lot.mutex);
    return &lot;
  }

  // The parent's lot is left to the parent: its memory is lost, which a fork's child can bear.
  Lot& this_process() {
    Lot* lot = lot_.load(std::memory_order_acquire);
    if (lot->forks == fork_count()) return *lot;
    auto* fresh = new Lot;
    if (lot_.compare_exchange_strong(lot, fresh, std::memory_order_acq_rel)) return *fresh;
    delete fresh;
    return *lot;
  }

  std::atomic<Lot*> lot_;
  AsymmetricCounter waiters_;
  std::atomic<uint32_t> vain_{0};  // waits since spinning last helped; a hint, so races do no harm
};

}  // namespace mlx_od_moe
