// Which of one layer's experts are where: absent -> loading -> resident -> absent, with leases.
//
// A lease forbids eviction. Eviction takes no time of its own: a slot passes from an expert that is
// resident to one that is loading within one call.
//
// A pass is one use of the layer by the model. Predictions speak of the next pass: until it begins, what is
// predicted makes room for another prediction only where that is far likelier (PrefetchOptions::margin).
//
// Threads    None of its own: ExpertStore serialises all calls, but `slot` of a leased expert.
// Ownership  Knows slots by number; holds no bytes.
// Errors     std::invalid_argument for an unknown policy. Else none: ids are checked by the caller.
// Costs      A call is O(1) for each expert; making room asks the policy, which may pass over what is leased.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "mlx_od_moe/eviction.h"
#include "mlx_od_moe/expert_layout.h"
#include "mlx_od_moe/store_counters.h"

namespace mlx_od_moe {

enum class Cause : uint8_t { demand, prefetch };

class ResidentExperts {
 public:
  ResidentExperts(const ExpertLayer& layer, int slots, const std::string& policy);

  // Ends the predictions of the pass before, but for what is queued for a step after `step`.
  void begin_pass(std::span<const int> wanted, uint64_t step);
  // Whether all have slots.
  bool holds(std::span<const int> experts) const;
  // Whether slots can be had for all that are absent while the others stay.
  bool has_room(std::span<const int> experts) const;
  // Counts lookups and takes leases; slots for what is absent. Returns how many are not resident yet, and
  // appends to `reads` those that no one reads yet.
  int lease(std::span<const int> experts, std::vector<int>& reads);
  void release(int expert);

  // A prediction. True: the expert is absent, and now queued.
  bool predict(int expert, float score, uint64_t step);
  // The queued expert with the best score, of a step up to `step` or after it; -1: there is none.
  int best_queued(uint64_t step, bool later) const;
  float score(int expert) const { return at(expert).score; }
  // Takes a slot for a queued expert. False: all are taken by what is leased, loading or likelier.
  bool begin_prefetch(int expert);
  // Drops what is queued for steps before `step`.
  void cancel(uint64_t step);

  // A read has ended.
  void finish(int expert, Cause cause, bool read);

  int slot(int expert) const { return at(expert).slot; }
  bool is_resident(int expert) const { return at(expert).state == State::resident; }
  size_t queued() const { return queue_.size(); }
  // Prefetches of this pass that no lookup has used.
  uint64_t speculative_bytes() const { return speculative_ * bytes_; }
  uint64_t expert_bytes() const { return bytes_; }
  int num_experts() const { return static_cast<int>(experts_.size()); }
  int slots() const { return slots_; }
  StoreCounters counters() const;
  StoreCounters& count() { return counters_; }

 private:
  enum class State : uint8_t { absent, loading, resident };
  struct Expert {
    State state = State::absent;
    bool queued = false;
    bool unused = false;  // brought by a prefetch that no lookup has used
    bool late = false;    // and is still to be counted as useful bytes
    int slot = -1;
    int leases = 0;
    uint64_t predicted = 0;    // the pass before which it was predicted last
    uint64_t speculative = 0;  // the pass before which its prefetch was begun
    float score = 0;           // that it was predicted with
    uint64_t step = 0;         // for which it is queued
  };

  Expert& at(int expert) { return experts_[static_cast<size_t>(expert)]; }
  const Expert& at(int expert) const { return experts_[static_cast<size_t>(expert)]; }
  void overtake(int expert);
  void look_up(int expert);
  void used(Expert& expert);
  int slot_for(int expert, Cause cause);
  void evict(int expert);
  template <class Drop>
  void drop_queued(Drop drop);

  const uint64_t bytes_;
  const int slots_;
  std::vector<Expert> experts_;
  std::vector<int> free_;   // slots
  std::vector<int> queue_;  // experts, as they were predicted
  int resident_ = 0;
  int leased_ = 0;  // of the resident ones
  uint64_t pass_ = 1;
  uint64_t speculative_ = 0;
  std::unique_ptr<EvictionPolicy> policy_;
  StoreCounters counters_;
};

}  // namespace mlx_od_moe
