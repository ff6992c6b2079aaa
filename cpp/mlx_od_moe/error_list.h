// What went wrong on one thread, until another asks.
//
// Threads    Any thread may call any method.
// Ownership  Holds up to kKept exceptions; further ones are only counted.
// Ordering   The mutex; waiting_ (release -> acquire) lets `check` pass it by where there is nothing.
// Costs      One load where there is nothing.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <mutex>

namespace mlx_od_moe {

class ErrorList {
 public:
  static constexpr size_t kKept = 100;

  // In a handler: keeps the current exception.
  void keep() {
    const std::lock_guard lock(mutex_);
    ++count_;
    if (errors_.size() < kKept) errors_.push_back(std::current_exception());
    waiting_.store(errors_.size(), std::memory_order_release);
  }

  // Throws the oldest that was not thrown yet, if any.
  void check() {
    if (waiting_.load(std::memory_order_acquire) == 0) return;
    std::exception_ptr error;
    {
      const std::lock_guard lock(mutex_);
      if (errors_.empty()) return;
      error = std::move(errors_.front());
      errors_.pop_front();
      waiting_.store(errors_.size(), std::memory_order_release);
    }
    std::rethrow_exception(error);
  }

  // All that ever were.
  uint64_t count() const {
    const std::lock_guard lock(mutex_);
    return count_;
  }

 private:
  mutable std::mutex mutex_;
  std::deque<std::exception_ptr> errors_;
  uint64_t count_ = 0;
  std::atomic<size_t> waiting_{0};
};

}  // namespace mlx_od_moe
