#include "mlx_od_moe/prefetcher.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

namespace mlx_od_moe {
namespace {

// Logits are trained or calibrated so that their sigmoid is a probability. Of several tokens a record says
// how many want the expert, each of which is about as likely to be right as not.
float probability(const PredictionRecord& record, size_t i) {
  const float score = record.scores[i];
  return record.batch ? 1.0F - std::exp2(-score) : 1.0F / (1.0F + std::exp(-score));
}

}  // namespace

Prefetcher::Prefetcher(std::shared_ptr<ExpertStore> store, std::shared_ptr<PredictionQueue> queue,
                       PrefetcherOptions options)
    : store_(std::move(store)), queue_(std::move(queue)), options_(std::move(options)) {
  if (!(options_.pays <= options_.pays_again)) {
    throw std::invalid_argument("[Prefetcher] pays is at most pays_again, got " + std::to_string(options_.pays) +
                                " and " + std::to_string(options_.pays_again));
  }
  for (int number : store_->layers()) {
    Layer layer;
    layer.distances.resize(options_.policy.widths.size() + 1);
    for (size_t d = 0; d < layer.distances.size(); ++d) {
      layer.distances[d].recall.layer = number;
      layer.distances[d].recall.distance = d + 1 < layer.distances.size() ? static_cast<int>(d) + 1 : 0;
    }
    const auto experts = static_cast<size_t>(store_->num_experts(number));
    layer.uses.resize(experts);
    layer.chosen.resize(experts);
    layers_.push_back(std::move(layer));
  }
}

size_t Prefetcher::index(int layer) const {
  const std::vector<int>& layers = store_->layers();
  const auto found = std::lower_bound(layers.begin(), layers.end(), layer);
  if (found != layers.end() && *found == layer) return static_cast<size_t>(found - layers.begin());
  throw std::invalid_argument("[Prefetcher] layer " + std::to_string(layer) + " has no experts in the store");
}

void Prefetcher::drain() {
  for (PredictionRecord record; queue_->try_pop(record);) take(record);
}

void Prefetcher::take(const PredictionRecord& record) {
  const size_t d = record.distance - size_t{1};
  const PrefetchOptions& policy = options_.policy;
  if (d < policy.widths.size()) {
    take(record, d, static_cast<size_t>(std::max(policy.widths[d], 0)), policy.thresholds[d], record.step);
  }
}

void Prefetcher::take_next(const PredictionRecord& record) {
  take(record, options_.policy.widths.size(), PredictionRecord::kMaxIds, options_.next_token_threshold,
       record.step + 1);
}

void Prefetcher::take(const PredictionRecord& record, size_t distance, size_t width, float threshold, uint64_t due) {
  const size_t first = size_t{record.part} * PredictionRecord::kMaxIds;
  std::array<int32_t, PredictionRecord::kMaxIds> ids;
  std::array<float, PredictionRecord::kMaxIds> likely;
  size_t count = 0;
  while (count < record.count && first + count < width) {
    ids[count] = record.ids[count];
    likely[count] = probability(record, count);
    if (!(likely[count] >= threshold)) break;
    ++count;
  }
  bool reads = false;
  {
    const std::lock_guard lock(mutex_);
    Layer& layer = layers_[index(record.target_layer)];
    check(layer, {ids.data(), count});
    reads = keep(layer.distances[distance], record, count, due);
  }
  if (reads && count > 0) {
    store_->prefetch(record.target_layer, std::span(ids.data(), count), std::span(likely.data(), count), record.step);
  }
}

void Prefetcher::check(const Layer& layer, std::span<const int32_t> ids) {
  for (int32_t id : ids) {
    if (id >= 0 && static_cast<size_t>(id) < layer.uses.size()) continue;
    throw std::invalid_argument("[Prefetcher] layer " + std::to_string(layer.distances.front().recall.layer) +
                                ": expert ids must be 0 ... " + std::to_string(layer.uses.size() - 1) + ", got " +
                                std::to_string(id));
  }
}

bool Prefetcher::keep(Distance& distance, const PredictionRecord& record, size_t count, uint64_t due) {
  Named& named = distance.named;
  if (record.part == 0) {
    named.step = due;
    named.judged = false;
    named.experts.clear();
    named.absent.clear();
  } else if (named.judged || named.step != due) {
    return false;  // its first part was lost
  }
  const std::vector<int> resident = store_->resident(record.target_layer);  // ascending
  for (size_t i = 0; i < count; ++i) {
    named.experts.push_back(record.ids[i]);
    named.absent.push_back(!std::binary_search(resident.begin(), resident.end(), int{record.ids[i]}));
  }
  return distance.recall.on;
}

void Prefetcher::reached(int layer, std::span<const int32_t> ids, uint64_t step) {
  const std::lock_guard lock(mutex_);
  Layer& at = layers_[index(layer)];
  check(at, ids);
  ++calls_;
  size_t chosen = 0;
  for (int32_t id : ids) {
    uint64_t& seen = at.chosen[static_cast<size_t>(id)];
    if (std::exchange(seen, calls_) == calls_) continue;
    ++at.uses[static_cast<size_t>(id)];
    ++chosen;
  }
  for (Distance& distance : at.distances) {
    Named& named = distance.named;
    if (named.judged || named.step > step) continue;
    named.judged = true;
    if (named.step == step) judge(at, distance, chosen);
  }
}

void Prefetcher::judge(Layer& layer, Distance& distance, size_t chosen) {
  const Named& named = distance.named;
  PredictionRecall& recall = distance.recall;
  uint64_t useful = 0, wasted = 0;
  for (size_t i = 0; i < named.experts.size(); ++i) {
    const bool right = layer.chosen[static_cast<size_t>(named.experts[i])] == calls_;
    recall.named += right && i < chosen;
    useful += right && named.absent[i];
    wasted += !right && named.absent[i];
  }
  ++recall.predictions;
  recall.chosen += chosen;
  recall.useful += useful;
  recall.wasted += wasted;
  distance.useful = distance.useful * options_.memory + static_cast<double>(useful);
  distance.wasted = distance.wasted * options_.memory + static_cast<double>(wasted);
  turn(distance);
}

void Prefetcher::turn(Distance& distance) {
  const double all = distance.useful + distance.wasted;
  if (all < options_.evidence) return;
  const double share = distance.useful / all;
  const bool on = share >= (distance.recall.on ? options_.pays : options_.pays_again);
  if (on == std::exchange(distance.recall.on, on)) return;
  changes_.push_back({distance.recall.layer, distance.recall.distance, on, static_cast<float>(share)});
}

std::vector<PredictionRecall> Prefetcher::recalls() const {
  const std::lock_guard lock(mutex_);
  std::vector<PredictionRecall> all;
  for (const Layer& layer : layers_) {
    for (const Distance& distance : layer.distances) all.push_back(distance.recall);
  }
  return all;
}

std::vector<PrefetchChange> Prefetcher::take_changes() {
  const std::lock_guard lock(mutex_);
  return std::exchange(changes_, {});
}

std::vector<uint64_t> Prefetcher::uses(int layer) const {
  const std::lock_guard lock(mutex_);
  return layers_[index(layer)].uses;
}

}  // namespace mlx_od_moe
