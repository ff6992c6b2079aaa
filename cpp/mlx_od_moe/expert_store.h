// Experts on disk, the right ones in memory in time.
//
// Of a model's routed experts as many as fit `capacity_bytes` are resident, in slots of each layer's pools.
// What the router chose is acquired: a lease keeps the experts where they are. What a predictor expects is
// prefetched: read when no demand waits, the likeliest of the soonest layers first, into slots that nothing
// leased or likelier holds. A newer step, or an acquire of its layer, ends a prediction that waits.
//
// Threads    Any thread may call any method. The store owns its readers; what they read into slots, or a thread
//            that acquires, is visible to whom wait() has returned true. A child process after fork() has no readers:
//            there every call but release() and destruction throws.
// Ownership  Shares the file. Lent pools must outlive the store and its leases. A lease may outlive the
//            store, and holds its memory. Destruction waits for system calls under way; what waits then, throws.
// Ordering   A request's `pending` (release -> acquire): what its readers wrote is there. All else is
//            guarded by one mutex, which nobody holds during I/O.
// Errors     std::invalid_argument, "[ExpertStore] rule, value", at the call. ExpertReadError from waiting
//            for an expert that could not be read, in every thread that waits for it; a later call tries
//            again. A prefetch that fails is only counted. std::runtime_error once closed.
// Units      Bytes; layers by the model's index; deadlines by std::chrono::steady_clock.
// Costs      Acquiring what is resident and prefetching lock the mutex once. Prefetching wakes a reader (a
//            system call) where nobody has prefetched for a while, or no idle reader has worked in the last
//            Parking::kWatch. A thread that holds a lease and waits for slots of the same layer may wait for
//            itself: give a deadline, or release first.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "mlx_od_moe/expert_file.h"
#include "mlx_od_moe/expert_reader.h"
#include "mlx_od_moe/expert_slots.h"
#include "mlx_od_moe/export.h"
#include "mlx_od_moe/parking.h"
#include "mlx_od_moe/store_counters.h"

namespace mlx_od_moe {

struct StoreOptions {
  uint64_t capacity_bytes = 0;  // of all slots together
  int top_k = 1;                // experts that one token needs of a layer: at least so many slots
  std::vector<int> slots;       // for each layer; in place of equally many for each in capacity_bytes
  std::string policy = "lru";
  int readers = 2;              // threads, 1 ... 64; all but one of them prefetch
  uint64_t prefetch_bytes = 0;  // in flight or resident and not used yet, at most; 0: half of the slots
  ReaderOptions reader;
};

// Experts of one layer that stay where they are until release().
class MLX_OD_MOE_API ExpertLease {
 public:
  using Clock = Parking::Clock;

  ExpertLease(ExpertLease&&) noexcept;
  ExpertLease& operator=(ExpertLease&&) noexcept;
  ~ExpertLease();

  // Whether wait() would return, or throw, at once.
  bool ready() const;
  // Until all are resident. False: the deadline has passed first.
  bool wait(Clock::time_point deadline = Parking::kForever);
  // Of an acquired expert, once wait() has returned true.
  int slot(int expert) const;
  // Twice is once.
  void release() noexcept;

 private:
  friend class ExpertStore;
  struct State;
  explicit ExpertLease(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

class MLX_OD_MOE_API ExpertStore {
 public:
  ExpertStore(std::shared_ptr<const ExpertFile> file, StoreOptions options, Pools lent = {});
  ~ExpertStore();
  ExpertStore(const ExpertStore&) = delete;
  ExpertStore& operator=(const ExpertStore&) = delete;

  // Begins to read what is missing of these experts, all at once; an id may come several times.
  ExpertLease request(int layer, std::span<const int32_t> ids);
  // The same, and waits, reading beside the readers; slots[i] is where ids[i] lies.
  ExpertLease acquire(int layer, std::span<const int32_t> ids, std::span<int32_t> slots);

  // Experts that the layer will probably use in that step, with their probabilities, or none: all 1. Step and
  // layer are the deadline: the layer's turn, counted in layers (PrefetchPolicy), not by a clock.
  // Returns at once: how many are now queued that were not. None of a step before the current.
  int prefetch(int layer, std::span<const int32_t> ids, std::span<const float> scores, uint64_t step);
  // The step has begun: what is queued for earlier ones is dropped. An earlier step changes nothing.
  void cancel(uint64_t step);
  uint64_t step() const;

  const std::vector<int>& layers() const;
  int slots(int layer) const;
  int num_experts(int layer) const;
  uint64_t expert_bytes(int layer) const;
  uint64_t capacity_bytes() const;  // of all slots
  std::byte* address(int layer, size_t part, int slot) const;
  std::vector<int> resident(int layer) const;
  StoreCounters counters() const;
  StoreCounters counters(int layer) const;

  // Ends the readers, and all waits with an error. Twice is once.
  void close();
  bool closed() const;

 private:
  friend class ExpertLease;
  class Core;
  ExpertLease begin(int layer, std::span<const int32_t> ids, bool helping);
  std::shared_ptr<Core> core_;
};

}  // namespace mlx_od_moe
