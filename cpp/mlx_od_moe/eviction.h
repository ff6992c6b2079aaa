// Which resident expert of a layer makes room: the policies that ExpertStore and the simulator share.
//
// A policy sees one layer's accesses, in order, and ranks what is resident. It decides nothing about
// leases or reads: `victim` is given a test, and returns the best expert that passes it, or -1.
//
//   lru     the one not used for longest
//   lfuda   least frequently used with dynamic ageing (Arlitt et al., "Evaluating content management
//           techniques for Web proxy caches", 2000): the lowest of count + the age when last used, where
//           the age is the rank of what was last evicted. As in bigrig, counts end at 12, and one that is
//           evicted keeps half of its count; of equals the one not used for longest.
//   lrfu    the lowest sum of its uses, each worth .97 of what it was a step before, of those before it was
//           evicted too (after Lee et al., "LRFU: a spectrum of policies that subsumes the least recently
//           used and least frequently used policies", 2001): the best on every trace that was measured
//   s3fifo  Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023: a small queue for
//           newcomers, a main queue for what was used again, and a memory of what the small one dropped
//   score   lru among what is not predicted; then the lowest score, of equals the one not used for longest
//
// Threads    None of its own: the caller serialises the calls on one policy.
// Ownership  Knows experts by id, 0 ... num_experts - 1; holds no bytes.
// Errors     std::invalid_argument, "[eviction] rule, value", for an unknown name, a capacity outside
//            1 ... num_experts, and an expert that does not exist; std::logic_error for inserting what is
//            resident and evicting what is not.
// Costs      Every call is O(1), but `next_step` of score, which is linear in the predictions that it
//            forgets, and `victim`: lru and s3fifo pass over what the test refuses, lfuda, lrfu and
//            score look at all that is resident.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "mlx_od_moe/export.h"

namespace mlx_od_moe {

class MLX_OD_MOE_API EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;

  // A demand for an expert: resident or not, before `inserted`.
  virtual void accessed(int expert) = 0;
  // The expert is resident from now on, by demand or (prefetch) by prediction.
  virtual void inserted(int expert, bool prefetch) = 0;
  // It no longer is.
  virtual void evicted(int expert) = 0;
  // A prediction that this step will want the expert, with a score in [0, 1]; the newest holds.
  // Forgotten by `next_step`. Only score heeds it.
  virtual void predicted(int expert, float score) = 0;
  // The layer has had its experts of this step.
  virtual void next_step() = 0;
  // The resident expert to evict first among those that `evictable` accepts, or -1. Nothing is evicted
  // yet: that is what `evicted` says.
  virtual int victim(const std::function<bool(int)>& evictable) = 0;
};

// One of `eviction_policies()`, for one layer of `num_experts` experts with room for `capacity` of them.
MLX_OD_MOE_API std::unique_ptr<EvictionPolicy> make_eviction_policy(const std::string& name, int num_experts,
                                                                    int capacity);
MLX_OD_MOE_API std::vector<std::string> eviction_policies();

}  // namespace mlx_od_moe
