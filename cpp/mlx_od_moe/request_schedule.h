// Who waits for which experts, and what is read next: all that ExpertStore guards with its mutex.
//
// A request is admitted once there are slots for all that it misses: it then holds leases, and waits for
// reads only. Until then it holds nothing, so that no two requests wait for each other. Demands are read
// before prefetches, first come first served, those of one request in the order of the file. Of prefetches
// those of the current step come first, and of these the one whose score is best, discounted by its deadline,
// the turn of its layer, as in PrefetchPolicy.
//
// Threads    None of its own: the caller serialises all calls, but `slot` of a leased or loading expert.
// Ownership  Requests are the caller's, from `add` until they settle or `release`.
// Ordering   Request::pending (release -> acquire) tells the thread that waits.
// Errors     std::invalid_argument, "[ExpertStore] rule, value", for more experts than slots. Ids are
//            checked by the caller.
// Costs      O(1) for each expert, and to settle one, for each expert of the requests that wait.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "mlx_od_moe/expert_reader.h"
#include "mlx_od_moe/expert_slots.h"
#include "mlx_od_moe/resident_experts.h"

namespace mlx_od_moe {

struct ExpertRequest {
  size_t layer = 0;
  std::vector<int> experts;                    // distinct, as they first came; none once it failed
  bool admitted = false;                       // has slots and leases
  bool stalled = false;                        // was waited for
  std::atomic<int> pending{1};                 // experts that are not there yet
  std::shared_ptr<const ReadFailure> failure;  // set before pending becomes 0

  bool settled() const { return pending.load(std::memory_order_acquire) == 0; }
};

// An expert to be read into its slot.
struct ExpertRead {
  size_t layer = 0;
  int expert = 0;
  Cause cause = Cause::demand;
};

class RequestSchedule {
 public:
  // At most `prefetchers` prefetches at a time, and `prefetch_bytes` that are in flight or not used yet.
  RequestSchedule(const ExpertLayout& layout, const ExpertSlots& slots, const std::string& policy, int prefetchers,
                  uint64_t prefetch_bytes);

  void add(ExpertRequest& request, std::span<const int32_t> ids);
  void release(ExpertRequest& request);
  // How many are now queued that were not.
  int predict(size_t layer, std::span<const int32_t> ids, std::span<const float> scores, uint64_t step);
  void begin_step(uint64_t step);
  uint64_t step() const { return step_; }

  std::optional<ExpertRead> next();
  std::optional<ExpertRead> next_demand();
  // Whether `next` may have something; it may have nothing all the same.
  bool has_more() const;
  size_t demands() const { return demands_.size(); }  // that no one has begun to read
  // `failure`: none where it was read.
  void finish(const ExpertRead& read, const std::shared_ptr<const ReadFailure>& failure);

  const ResidentExperts& experts(size_t layer) const { return layers_[layer].experts; }
  ResidentExperts& experts(size_t layer) { return layers_[layer].experts; }

 private:
  struct Layer {
    ResidentExperts experts;
    std::vector<uint64_t> seen;           // by expert: the number of the request that named it last
    std::vector<ExpertRequest*> loading;  // wait for experts
    std::vector<ExpertRequest*> waiting;  // for slots, first come first served
  };

  struct Candidate {
    size_t layer;
    int expert;
    float priority;
  };

  void check_fits(const ExpertRequest& request) const;
  bool admit(ExpertRequest& request);
  void admit_waiting(Layer& layer);
  std::optional<ExpertRead> next_prefetch();
  void find_candidates(bool later);
  static bool settles(ExpertRequest& request, Layer& layer, int expert,
                      const std::shared_ptr<const ReadFailure>& failure);

  const ExpertLayout& layout_;
  const int prefetchers_;
  const uint64_t prefetch_bytes_;
  std::vector<Layer> layers_;
  std::deque<ExpertRead> demands_;
  std::vector<int> reads_;             // admit's own
  std::vector<Candidate> candidates_;  // next_prefetch's own
  uint64_t requests_ = 0;
  uint64_t step_ = 0;
  size_t reached_ = 0;  // the layer that was asked for last; before that the last one
  int prefetching_ = 0;
  bool stuck_ = true;  // when last looked no prefetch could begin, and nothing has changed that since
};

}  // namespace mlx_od_moe
