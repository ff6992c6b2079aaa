// Other queues behind one face: try_push and try_pop of PredictionRecord, one producer and one consumer.
#pragma once

#include <atomic>
#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "mlx_od_moe/prediction_queue.h"

#if defined(MLX_OD_MOE_BOOST)
#include <boost/lockfree/queue.hpp>
#include <boost/lockfree/spsc_queue.hpp>
#endif

namespace peers {

using Record = mlx_od_moe::PredictionRecord;
constexpr size_t kCapacity = 1024;

// Ours, without steps, dropping and waking: the ring alone.
class Ring {
 public:
  static constexpr const char* kName = "Ring (ours)";
  bool try_push(const Record& r) { return ring_.try_push(r); }
  bool try_pop(Record& r) { return ring_.try_pop(r); }

 private:
  mlx_od_moe::Ring<Record> ring_{kCapacity};
};

// Ours. It drops where others refuse, so the producer looks at a count of what was popped.
class Prediction {
 public:
  static constexpr const char* kName = "PredictionQueue (ours)";
  bool try_push(const Record& r) {
    if (pushed_ - known_ >= kCapacity - kBatch) {
      known_ = shared_.load(std::memory_order_acquire);
      if (pushed_ - known_ >= kCapacity - kBatch) return false;
    }
    pushed_ += queue_.try_push(r);
    return true;
  }
  bool try_pop(Record& r) {
    if (!queue_.try_pop(r)) return false;
    if (++popped_ % kBatch == 0) shared_.store(popped_, std::memory_order_release);
    return true;
  }

 private:
  static constexpr size_t kBatch = 64;
  mlx_od_moe::PredictionQueue queue_{kCapacity};
  alignas(128) size_t pushed_ = 0, known_ = 0;
  alignas(128) size_t popped_ = 0;
  alignas(128) std::atomic<size_t> shared_{0};
};

// One producer, one consumer, each with a copy of the other's index: after rigtorp's SPSCQueue.
class CachedIndexSpsc {
 public:
  static constexpr const char* kName = "SPSC, cached index (rigtorp's way)";
  bool try_push(const Record& r) {
    const size_t at = write_.load(std::memory_order_relaxed);
    const size_t next = at + 1 == records_.size() ? 0 : at + 1;
    if (next == known_read_) {
      known_read_ = read_.load(std::memory_order_acquire);
      if (next == known_read_) return false;
    }
    records_[at] = r;
    write_.store(next, std::memory_order_release);
    return true;
  }
  bool try_pop(Record& r) {
    const size_t at = read_.load(std::memory_order_relaxed);
    if (at == known_write_) {
      known_write_ = write_.load(std::memory_order_acquire);
      if (at == known_write_) return false;
    }
    r = records_[at];
    read_.store(at + 1 == records_.size() ? 0 : at + 1, std::memory_order_release);
    return true;
  }

 private:
  std::vector<Record> records_ = std::vector<Record>(kCapacity + 1);
  alignas(64) std::atomic<size_t> write_{0};
  alignas(64) size_t known_read_ = 0;
  alignas(64) std::atomic<size_t> read_{0};
  alignas(64) size_t known_write_ = 0;
};

#if defined(MLX_OD_MOE_BOOST)
class BoostSpsc {
 public:
  static constexpr const char* kName = "boost::lockfree::spsc_queue";
  bool try_push(const Record& r) { return queue_.push(r); }
  bool try_pop(Record& r) { return queue_.pop(r); }

 private:
  boost::lockfree::spsc_queue<Record> queue_{kCapacity};
};

class BoostQueue {
 public:
  static constexpr const char* kName = "boost::lockfree::queue";
  bool try_push(const Record& r) { return queue_.bounded_push(r); }
  bool try_pop(Record& r) { return queue_.pop(r); }

 private:
  boost::lockfree::queue<Record> queue_{kCapacity};
};
#endif

class MutexDeque {
 public:
  static constexpr const char* kName = "std::mutex + std::deque";
  bool try_push(const Record& r) {
    const std::lock_guard lock(mutex_);
    if (records_.size() == kCapacity) return false;
    records_.push_back(r);
    return true;
  }
  bool try_pop(Record& r) {
    const std::lock_guard lock(mutex_);
    if (records_.empty()) return false;
    r = records_.front();
    records_.pop_front();
    return true;
  }

 private:
  std::mutex mutex_;
  std::deque<Record> records_;
};

}  // namespace peers
