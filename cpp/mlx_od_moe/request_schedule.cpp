#include "mlx_od_moe/request_schedule.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "mlx_od_moe/prefetch_policy.h"

namespace mlx_od_moe {

static const PrefetchOptions kPolicy;

RequestSchedule::RequestSchedule(const ExpertLayout& layout, const ExpertSlots& slots, const std::string& policy,
                                 int prefetchers, uint64_t prefetch_bytes)
    : layout_(layout), prefetchers_(prefetchers), prefetch_bytes_(prefetch_bytes) {
  reached_ = layout.layers.size() - 1;
  for (size_t i = 0; i < layout.layers.size(); ++i) {
    const ExpertLayer& layer = layout.layers[i];
    std::vector<uint64_t> seen(static_cast<size_t>(layer.num_experts));
    layers_.push_back({ResidentExperts(layer, slots.slots(i), policy), std::move(seen), {}, {}});
  }
}

void RequestSchedule::add(ExpertRequest& request, std::span<const int32_t> ids) {
  Layer& layer = layers_[request.layer];
  ++requests_;
  for (int32_t id : ids) {
    uint64_t& seen = layer.seen[static_cast<size_t>(id)];
    if (std::exchange(seen, requests_) != requests_) request.experts.push_back(id);
  }
  check_fits(request);
  if (layer.experts.speculative_bytes() > 0 || layer.experts.queued() > 0) stuck_ = false;
  layer.experts.begin_pass(request.experts, step_);
  reached_ = request.layer;
  // Who waits goes first, but never stands in the way of what needs no slot.
  const bool in_turn = layer.waiting.empty() || layer.experts.holds(request.experts);
  if (!in_turn || !admit(request)) layer.waiting.push_back(&request);
}

void RequestSchedule::check_fits(const ExpertRequest& request) const {
  const ResidentExperts& experts = layers_[request.layer].experts;
  const size_t n = request.experts.size();
  if (n <= static_cast<size_t>(experts.slots())) return;
  throw std::invalid_argument("[ExpertStore] layer " + std::to_string(layout_.layers[request.layer].layer) + " has " +
                              std::to_string(experts.slots()) + " slots, but one call asks for " + std::to_string(n) +
                              " experts: they take " + std::to_string(n * experts.expert_bytes()) +
                              " bytes of this layer");
}

// Slots and leases for all experts of a request, or for none.
bool RequestSchedule::admit(ExpertRequest& request) {
  Layer& layer = layers_[request.layer];
  if (!layer.experts.has_room(request.experts)) return false;
  reads_.clear();
  const int missing = layer.experts.lease(request.experts, reads_);
  request.admitted = true;
  if (missing > 0) layer.loading.push_back(&request);
  const auto& extents = layout_.layers[request.layer].extents;
  const auto place = [&](int expert) {
    const std::vector<Extent>& e = extents[static_cast<size_t>(expert)];
    return e.empty() ? std::pair<int32_t, uint64_t>() : std::pair(e[0].file, e[0].offset);
  };
  std::sort(reads_.begin(), reads_.end(), [&](int a, int b) { return place(a) < place(b); });
  for (int expert : reads_) demands_.push_back({request.layer, expert, Cause::demand});
  request.pending.store(missing, std::memory_order_release);
  return true;
}

void RequestSchedule::admit_waiting(Layer& layer) {
  while (!layer.waiting.empty() && admit(*layer.waiting.front())) layer.waiting.erase(layer.waiting.begin());
}

void RequestSchedule::release(ExpertRequest& request) {
  Layer& layer = layers_[request.layer];
  if (request.admitted) {
    for (int expert : request.experts) layer.experts.release(expert);
  }
  std::erase(request.admitted ? layer.loading : layer.waiting, &request);
  if (layer.experts.queued() > 0) stuck_ = false;
  admit_waiting(layer);
}

int RequestSchedule::predict(size_t layer, std::span<const int32_t> ids, std::span<const float> scores, uint64_t step) {
  if (step < step_) return 0;
  int accepted = 0;
  for (size_t i = 0; i < ids.size(); ++i) {
    accepted += layers_[layer].experts.predict(ids[i], scores.empty() ? 1.0F : scores[i], step);
  }
  if (accepted > 0) stuck_ = false;
  return accepted;
}

void RequestSchedule::begin_step(uint64_t step) {
  if (step <= step_) return;
  step_ = step;
  for (Layer& layer : layers_) layer.experts.cancel(step);
}

std::optional<ExpertRead> RequestSchedule::next() { return demands_.empty() ? next_prefetch() : next_demand(); }

std::optional<ExpertRead> RequestSchedule::next_demand() {
  if (demands_.empty()) return std::nullopt;
  const ExpertRead read = demands_.front();
  demands_.pop_front();
  return read;
}

bool RequestSchedule::has_more() const { return !demands_.empty() || (prefetching_ < prefetchers_ && !stuck_); }

std::optional<ExpertRead> RequestSchedule::next_prefetch() {
  if (prefetching_ >= prefetchers_ || stuck_) return std::nullopt;
  stuck_ = true;
  uint64_t room = prefetch_bytes_;
  for (const Layer& layer : layers_) room -= std::min(room, layer.experts.speculative_bytes());
  for (const bool later : {false, true}) {
    find_candidates(later);
    for (const Candidate& candidate : candidates_) {
      ResidentExperts& experts = layers_[candidate.layer].experts;
      if (experts.expert_bytes() > room) return std::nullopt;
      if (!experts.begin_prefetch(candidate.expert)) continue;
      ++prefetching_;
      stuck_ = false;
      return ExpertRead{candidate.layer, candidate.expert, Cause::prefetch};
    }
  }
  return std::nullopt;
}

// The best of each layer, the best of all first.
void RequestSchedule::find_candidates(bool later) {
  candidates_.clear();
  const int n = static_cast<int>(layers_.size());
  const int reached = later ? n - 1 : static_cast<int>(reached_);  // a later step begins with the first layer
  by_deadline(reached, n, n, kPolicy, [&](int at, int, float discount) {
    const auto i = static_cast<size_t>(at);
    const Layer& layer = layers_[i];
    if (layer.experts.queued() == 0 || !layer.waiting.empty()) return;
    const int expert = layer.experts.best_queued(step_, later);
    if (expert >= 0) candidates_.push_back({i, expert, discount * layer.experts.score(expert)});
  });
  std::stable_sort(candidates_.begin(), candidates_.end(),
                   [](const Candidate& a, const Candidate& b) { return a.priority > b.priority; });
}

void RequestSchedule::finish(const ExpertRead& read, const std::shared_ptr<const ReadFailure>& failure) {
  Layer& layer = layers_[read.layer];
  layer.experts.finish(read.expert, read.cause, failure == nullptr);
  if (read.cause == Cause::prefetch) --prefetching_;
  stuck_ = false;
  std::erase_if(layer.loading, [&](ExpertRequest* request) { return settles(*request, layer, read.expert, failure); });
  admit_waiting(layer);
}

// Tells a request that an expert has come, or won't. True: it waits no longer.
bool RequestSchedule::settles(ExpertRequest& request, Layer& layer, int expert,
                              const std::shared_ptr<const ReadFailure>& failure) {
  if (std::find(request.experts.begin(), request.experts.end(), expert) == request.experts.end()) return false;
  if (!failure) return request.pending.fetch_sub(1, std::memory_order_acq_rel) == 1;
  for (int held : request.experts) {
    if (held != expert) layer.experts.release(held);
  }
  request.experts.clear();
  request.failure = failure;
  request.pending.store(0, std::memory_order_release);
  return true;
}

}  // namespace mlx_od_moe
