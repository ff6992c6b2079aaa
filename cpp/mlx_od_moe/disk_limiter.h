// Makes reads take as long as one disk of a given bandwidth and latency would: for tests and benchmarks.
//
// Transfers come one after the other; latencies of several reads overlap.
//
// Threads    Any thread may call any method.
// Ownership  Must outlive every call: stop(), then join, then destroy.
// Errors     None.
// Units      Bytes, bytes per second, ns of std::chrono::steady_clock.
#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace mlx_od_moe {

struct DiskModel {
  double bytes_per_second = 0;  // 0: no limit
  std::chrono::nanoseconds latency{0};
};

class DiskLimiter {
 public:
  using Clock = std::chrono::steady_clock;

  explicit DiskLimiter(const DiskModel& disk) : disk_(disk) {}

  // Called where a read of that many bytes begins: when it may end.
  Clock::time_point begin(uint64_t bytes) {
    const std::lock_guard lock(mutex_);
    const double seconds = disk_.bytes_per_second > 0 ? static_cast<double>(bytes) / disk_.bytes_per_second : 0;
    const auto transfer = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    free_at_ = std::max(free_at_, Clock::now()) + transfer;
    return free_at_ + disk_.latency;
  }

  void wait_until(Clock::time_point end) {
    std::unique_lock lock(mutex_);
    stopping_.wait_until(lock, end, [&] { return stopped_; });
  }

  // All waits end at once, from now on.
  void stop() {
    const std::lock_guard lock(mutex_);
    stopped_ = true;
    stopping_.notify_all();
  }

 private:
  const DiskModel disk_;
  std::mutex mutex_;
  std::condition_variable stopping_;
  Clock::time_point free_at_{};
  bool stopped_ = false;
};

}  // namespace mlx_od_moe
