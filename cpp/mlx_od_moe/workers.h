// Helper threads that join a calculation block by block, and never make its caller wait for them.
//
// A calculation is cut into phases of blocks. Caller and helpers claim blocks one at a time, first of
// their own share, which stays in their core's cache from call to call, then of the others'. Each lane
// (0 is the caller) writes its results to memory of its own. A block that a helper has claimed but
// does not finish, because the system took its core away, is computed again by the caller, and the
// late result is ignored: a slice of the scheduler is never waited for.
//
// Threads    Workers owns threads - 1 threads. Any thread may call `run`; a helper that is busy with
//            one caller is simply missing to the next. Helpers spin for a short while after work, then
//            park, and a parked helper costs its caller one system call.
// Ownership  SharedWork is counted: the caller holds it, and each helper that has joined. It may be
//            reused when `exclusive`; who drops the last reference deletes it.
// Ordering   opened_ (release) -> helper's load (acquire): the phase's inputs. done (release) -> the
//            caller's load (acquire): the helper's results. references_ (acq_rel): reuse and deletion.
//            Slot::work and Slot::parked are seq_cst: a helper that parks sees the work, or its
//            caller sees it parked.
// Errors     run_block must not throw. The constructor throws std::system_error without threads.
// Costs      One fork and join takes about as long as a cache line takes between cores, twice.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "mlx_od_moe/placement.h"

namespace mlx_od_moe {

class SharedWork {
 public:
  static constexpr int kPhases = 3;  // at most
  static constexpr int kMaxLanes = 64;

  virtual ~SharedWork() = default;

  // Computes one block into the lane's own memory. May run twice for a block, on two lanes at once.
  virtual void run_block(int phase, int block, int lane) noexcept = 0;

  void add_reference() { references_.fetch_add(1, std::memory_order_relaxed); }
  void release();
  // Whether no helper holds it: the caller may write to it.
  bool exclusive() const { return references_.load(std::memory_order_acquire) == 1; }

  // Caller, exclusive: before the first phase.
  void restart();
  // Caller: computes all blocks of the next phase, with up to lanes - 1 helpers.
  void run_phase(int phase, int blocks, int lanes);
  // Caller: helpers leave.
  void close() { opened_.store(kClosed, std::memory_order_release); }
  // Caller, after run_phase: whose result of the block counts.
  int lane_of(int phase, int block) const { return phases_[phase].source[static_cast<size_t>(block)]; }

  // Helper: takes part until the caller closes it.
  void join(int lane) noexcept;

 private:
  static constexpr int kClosed = kPhases + 1;
  using Clock = std::chrono::steady_clock;

  // A lane's share of a phase's blocks: those from `next` to `end` are not claimed.
  struct alignas(64) Share {
    std::atomic<int> next{0};
    int end = 0;
  };

  struct Phase {
    int blocks = 0;
    int lanes = 0;
    std::unique_ptr<Share[]> shares;  // [kMaxLanes]
    size_t capacity = 0;
    std::unique_ptr<std::atomic<int>[]> done;  // lane + 1 of the helper that finished the block
    std::vector<int> source;                   // caller only
  };

  int claim(Phase& phase, int lane) noexcept;  // a block, or -1
  bool wait_until_open(int phase) const noexcept;
  void await_helpers(int phase, Clock::duration patience);

  Phase phases_[kPhases];
  std::atomic<int> opened_{0};  // phases open so far
  std::atomic<int> references_{1};
};

class Workers {
 public:
  explicit Workers(int threads);
  ~Workers();
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  int threads() const { return static_cast<int>(helpers_.size()) + 1; }

  // Offers the work to helpers that are free; `withdraw` takes back what none took.
  void offer(SharedWork& work);
  void withdraw(SharedWork& work);

 private:
  struct alignas(64) Slot {
    std::atomic<SharedWork*> work{nullptr};
    std::atomic<int> parked{0};
    Placement placement;
  };

  void help(int lane);
  SharedWork* wait_for_work(Slot& slot) const;

  std::vector<Slot> slots_;
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> helpers_;
};

}  // namespace mlx_od_moe
