// The way from predictor to prefetcher: a bounded queue of prediction records that forgets what is old.
//
// Full, it drops its oldest record. A record of a newer step, or begin_step, ends the step before: what
// that one left is never handed out, and counts as expired.
//
// Threads    Any number of producers and consumers; any thread may call any method. After fork() the
//            child has a queue of its own with the same records, and may use it.
// Ownership  Records are copied in and out. Must outlive every call: close(), then join, then destroy.
// Ordering   Ring's release -> acquire pairs on each slot's sequence: a record is complete when popped,
//            and what its producer did before is visible to its consumer. step_ (relaxed) only filters:
//            a pop that runs while begin_step does may still return a record of the step that ends.
//            closed_ and records reach sleeping consumers through Parking.
// Errors     std::invalid_argument, "[PredictionQueue] rule, value", for a bad capacity. Else none.
// Units      Capacity in records (rounded up to a power of two); times in ns of std::chrono::steady_clock.
// Costs      128 bytes per record of capacity. try_push and try_pop neither lock, allocate nor make
//            system calls (a push does where a consumer sleeps: it wakes one). Expired records are
//            skipped one by one, by whoever pops. See Ring for what a thread that stalls can hide.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "mlx_od_moe/parking.h"
#include "mlx_od_moe/ring.h"

namespace mlx_od_moe {

// Experts that one layer's predictor wants at another layer, best first. More than kMaxIds are spread
// over several records, `part` 0, 1, 2 ...: part p begins with the expert of rank p * kMaxIds.
struct PredictionRecord {
  static constexpr int kMaxIds = 16;
  static constexpr int kMaxParts = 256;

  uint64_t step = 0;
  int64_t ready_ns = 0;      // when the hidden state was there
  int16_t source_layer = 0;  // -1: made from the token
  int16_t target_layer = 0;
  uint8_t distance = 0;  // MoE layers from source to target: 1 ... lookahead; 0: target is of the next token
  uint8_t count = 0;     // ids in this record
  uint8_t part = 0;
  bool batch = false;  // scores are numbers of tokens that want the expert, not logits
  int16_t ids[kMaxIds] = {};
  float scores[kMaxIds] = {};
};
static_assert(std::is_trivially_copyable_v<PredictionRecord> && sizeof(PredictionRecord) == 120);

// All counts since construction. pushed == popped + dropped + expired + waiting, where nobody uses the
// queue meanwhile.
struct QueueStatistics {
  uint64_t pushed = 0;  // calls of try_push while open
  uint64_t popped = 0;
  uint64_t dropped = 0;  // for want of room
  uint64_t expired = 0;  // of an older step than the current
  uint64_t waiting = 0;
};

class PredictionQueue {
 public:
  using Clock = Parking::Clock;

  explicit PredictionQueue(size_t capacity = 1024) : ring_(checked(capacity)) {}

  // False: closed, of an older step, or (rarely, counted as dropped) in the way of a stalled thread.
  bool try_push(const PredictionRecord& record) {
    if (closed()) return false;
    begin_step(record.step);
    if (record.step < step()) {
      count(refused_, expired_);
      return false;
    }
    const auto displaced = [this](PredictionRecord&& old) { count(old.step < step() ? expired_ : dropped_); };
    if (ring_.push(record, displaced) == Pushed::slot_busy) {
      count(refused_, dropped_);
      return false;
    }
    parking_.notify_one();
    return true;
  }

  // The oldest record of the current step. False: there is none; `out` then holds no record.
  bool try_pop(PredictionRecord& out) {
    while (ring_.try_pop(out)) {
      if (out.step >= step()) return true;
      count(expired_);
    }
    return false;
  }

  // Waits for a record: at first awake (Parking::kSpin), then asleep. False: the deadline has passed,
  // or the queue is closed and empty.
  bool wait_pop(PredictionRecord& out, Clock::time_point deadline = Parking::kForever) {
    bool popped = false;
    const auto ready = [&] {
      const bool last = closed();  // asked first: what was pushed before close() is still handed out
      popped = try_pop(out);
      return popped || last;
    };
    parking_.wait(ready, deadline);
    return popped;
  }

  // Records of earlier steps are invisible from now on. A step before the current one changes nothing.
  void begin_step(uint64_t step) {
    uint64_t current = step_.load(std::memory_order_relaxed);
    while (current < step && !step_.compare_exchange_weak(current, step, std::memory_order_relaxed)) continue;
  }
  uint64_t step() const { return step_.load(std::memory_order_relaxed); }

  // Refuses further records and wakes all who wait; what is inside can still be popped.
  void close() {
    closed_.store(true, std::memory_order_release);
    parking_.notify_all();
  }
  bool closed() const { return closed_.load(std::memory_order_acquire); }

  size_t capacity() const { return ring_.capacity(); }
  // Expired records that nobody has come upon yet included.
  size_t size_approx() const { return ring_.size_approx(); }

  // Approximate while others use the queue.
  QueueStatistics statistics() const {
    QueueStatistics s;
    s.dropped = dropped_.load(std::memory_order_relaxed);
    s.expired = expired_.load(std::memory_order_relaxed);
    const uint64_t refused = refused_.load(std::memory_order_relaxed);
    s.waiting = ring_.size_approx();
    s.pushed = ring_.accepted() + refused;
    const uint64_t gone = ring_.removed() + refused;
    s.popped = gone - std::min(gone, s.dropped + s.expired);
    return s;
  }

 private:
  using Counter = std::atomic<uint64_t>;

  static size_t checked(size_t capacity) {
    if (capacity >= 1 && capacity <= Ring<PredictionRecord>::kMaxCapacity) return capacity;
    throw std::invalid_argument("[PredictionQueue] capacity must be 1 ... 2^31 records, got " +
                                std::to_string(capacity));
  }

  template <class... Counters>
  static void count(Counters&... counters) {
    (counters.fetch_add(1, std::memory_order_relaxed), ...);
  }

  Ring<PredictionRecord> ring_;
  // Read by all, written rarely.
  alignas(kApart) std::atomic<uint64_t> step_{0};
  std::atomic<bool> closed_{false};
  Counter dropped_{0};
  Counter expired_{0};
  Counter refused_{0};  // of these two, what never entered the ring
  alignas(kApart) Parking parking_;
};

}  // namespace mlx_od_moe
