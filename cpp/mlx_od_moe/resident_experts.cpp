#include "mlx_od_moe/resident_experts.h"

#include <algorithm>

#include "mlx_od_moe/prefetch_policy.h"

namespace mlx_od_moe {

static const float kMargin = PrefetchOptions().margin;

ResidentExperts::ResidentExperts(const ExpertLayer& layer, int slots, const std::string& policy)
    : bytes_(layer.expert_bytes()),
      slots_(slots),
      experts_(static_cast<size_t>(layer.num_experts)),
      policy_(make_eviction_policy(policy, layer.num_experts, slots)) {
  for (int slot = slots; slot-- > 0;) free_.push_back(slot);
}

template <class Drop>
void ResidentExperts::drop_queued(Drop drop) {
  std::erase_if(queue_, [&](int expert) {
    if (!drop(at(expert))) return false;
    at(expert).queued = false;
    ++counters_.cancelled;
    return true;
  });
}

void ResidentExperts::begin_pass(std::span<const int> wanted, uint64_t step) {
  for (int expert : wanted) overtake(expert);
  if (!queue_.empty()) drop_queued([&](const Expert& e) { return e.step <= step; });
  ++pass_;
  speculative_ = 0;
  policy_->next_step();
}

void ResidentExperts::overtake(int expert) {
  if (!at(expert).queued) return;
  at(expert).queued = false;
  std::erase(queue_, expert);
  ++counters_.overtaken;
}

bool ResidentExperts::holds(std::span<const int> experts) const {
  return std::none_of(experts.begin(), experts.end(), [this](int e) { return at(e).state == State::absent; });
}

bool ResidentExperts::has_room(std::span<const int> experts) const {
  int absent = 0, stay = 0;
  for (int expert : experts) {
    const Expert& e = at(expert);
    absent += e.state == State::absent;
    stay += e.state == State::resident && e.leases == 0;
  }
  return absent <= static_cast<int>(free_.size()) + resident_ - leased_ - stay;
}

int ResidentExperts::lease(std::span<const int> experts, std::vector<int>& reads) {
  for (int expert : experts) look_up(expert);
  int missing = 0;
  for (int expert : experts) {
    Expert& e = at(expert);
    if (e.state == State::resident) continue;
    ++missing;
    if (e.state == State::loading) continue;
    overtake(expert);  // predicted while the request waited for slots
    e.slot = slot_for(expert, Cause::demand);
    e.state = State::loading;
    policy_->inserted(expert, false);
    reads.push_back(expert);
  }
  return missing;
}

void ResidentExperts::look_up(int expert) {
  Expert& e = at(expert);
  policy_->accessed(expert);
  ++counters_.lookups;
  if (e.state == State::resident) {
    ++counters_.hits;
    if (e.unused) {
      ++counters_.useful;
      counters_.useful_bytes += bytes_;
    }
    if (e.leases == 0) ++leased_;
  } else if (e.unused) {
    ++counters_.late;
    e.late = true;
  } else {
    ++counters_.misses;
  }
  used(e);
  ++e.leases;
}

// No longer speculation.
void ResidentExperts::used(Expert& e) {
  if (e.unused && e.speculative == pass_) --speculative_;
  e.unused = false;
}

void ResidentExperts::release(int expert) {
  Expert& e = at(expert);
  if (--e.leases == 0 && e.state == State::resident) --leased_;
}

bool ResidentExperts::predict(int expert, float score, uint64_t step) {
  Expert& e = at(expert);
  e.predicted = pass_;
  e.score = score;
  policy_->predicted(expert, score);
  if (e.state != State::absent) return false;
  e.step = step;
  if (e.queued) return false;
  e.queued = true;
  queue_.push_back(expert);
  ++counters_.accepted;
  return true;
}

int ResidentExperts::best_queued(uint64_t step, bool later) const {
  int best = -1;
  for (int expert : queue_) {
    const Expert& e = at(expert);
    if ((e.step > step) == later && (best < 0 || e.score > at(best).score)) best = expert;
  }
  return best;
}

bool ResidentExperts::begin_prefetch(int expert) {
  const int slot = slot_for(expert, Cause::prefetch);
  if (slot < 0) return false;
  std::erase(queue_, expert);
  Expert& e = at(expert);
  e.queued = false;
  e.state = State::loading;
  e.slot = slot;
  e.unused = true;
  e.speculative = pass_;
  ++speculative_;
  ++counters_.prefetched;
  policy_->inserted(expert, true);
  return true;
}

void ResidentExperts::cancel(uint64_t step) {
  if (!queue_.empty()) drop_queued([&](const Expert& e) { return e.step < step; });
}

int ResidentExperts::slot_for(int expert, Cause cause) {
  if (free_.empty()) {
    const auto idle = [this](int other) { return is_resident(other) && at(other).leases == 0; };
    const float least = cause == Cause::prefetch ? kMargin * at(expert).score : 0;
    int victim = policy_->victim([&](int other) {
      const bool likely = at(other).predicted == pass_ && !(at(other).score < least);
      return idle(other) && !likely;
    });
    if (victim < 0 && cause == Cause::demand) victim = policy_->victim(idle);
    if (victim < 0) return -1;
    evict(victim);
  }
  const int slot = free_.back();
  free_.pop_back();
  return slot;
}

void ResidentExperts::evict(int expert) {
  Expert& e = at(expert);
  if (e.unused) {
    ++counters_.wasted;
    counters_.wasted_bytes += bytes_;
  }
  used(e);
  policy_->evicted(expert);
  ++counters_.evicted;
  --resident_;
  e.state = State::absent;
  free_.push_back(e.slot);
  e.slot = -1;
}

void ResidentExperts::finish(int expert, Cause cause, bool read) {
  Expert& e = at(expert);
  if (read) {
    e.state = State::resident;
    ++resident_;
    if (e.leases > 0) ++leased_;
    (cause == Cause::demand ? counters_.demand_bytes : counters_.prefetch_bytes) += bytes_;
    if (e.late) counters_.useful_bytes += bytes_;
  } else {
    const bool unwanted = e.unused;
    ++(unwanted ? counters_.failed_prefetches : counters_.failed_demands);
    if (unwanted) ++counters_.wasted;
    used(e);
    policy_->evicted(expert);
    e.state = State::absent;
    e.leases = 0;
    free_.push_back(e.slot);
    e.slot = -1;
  }
  e.late = false;
}

StoreCounters ResidentExperts::counters() const {
  StoreCounters all = counters_;
  all.queued = queue_.size();
  for (const Expert& e : experts_) all.pending += e.unused;
  return all;
}

}  // namespace mlx_od_moe
