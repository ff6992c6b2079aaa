// Which resident expert of a layer makes room: the policies that ExpertStore and the simulator share.
//
// A policy sees one layer's accesses, in order, and ranks what is resident. It decides nothing about
// leases or reads: `victim` is given a test, and returns the best expert that passes it, or -1.
//
// Threads    None of its own: the caller serialises the calls on one policy.
// Ownership  Knows experts by id, 0 ... num_experts - 1; holds no bytes.
// Errors     std::invalid_argument, "[eviction] rule, value", for an unknown name.
// Costs      Every call is O(1) amortised but `victim`, which may pass over experts that the test refuses.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace mlx_od_moe {

class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;

  // A demand for an expert: resident or not, before `inserted`.
  virtual void accessed(int expert) = 0;
  // The expert is resident from now on, by demand or (prefetch) by prediction.
  virtual void inserted(int expert, bool prefetch) = 0;
  // It no longer is.
  virtual void evicted(int expert) = 0;
  // A prediction that the expert will be wanted in `distance` MoE layers, with a score in [0, 1].
  // Forgotten by `next_step`.
  virtual void predicted(int expert, float score) = 0;
  virtual void next_step() = 0;
  // The resident expert to evict first among those that `evictable` accepts, or -1.
  virtual int victim(const std::function<bool(int)>& evictable) = 0;
};

// "lru", "lfuda", "s3fifo" or "score".
std::unique_ptr<EvictionPolicy> make_eviction_policy(const std::string& name, int num_experts, int capacity);
std::vector<std::string> eviction_policies();

}  // namespace mlx_od_moe
