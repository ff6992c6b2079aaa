#include "mlx_od_moe/prefetch_policy.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace mlx_od_moe {

namespace {

void require(bool holds, const std::string& rule) {
  if (!holds) throw std::invalid_argument("[PrefetchPolicy] " + rule);
}

void check(const PrefetchOptions& options) {
  require(!options.widths.empty(), "widths: at least one distance is needed");
  require(options.thresholds.size() == options.widths.size(),
          "thresholds: as many as widths (" + std::to_string(options.widths.size()) + ") are needed, got " +
              std::to_string(options.thresholds.size()));
  for (int width : options.widths) require(width >= 0, "widths: none is negative, got " + std::to_string(width));
  for (float threshold : options.thresholds) {
    require(threshold >= 0 && threshold <= 1, "thresholds: each is 0 ... 1, got " + std::to_string(threshold));
  }
  require(options.discount >= 0 && options.discount <= 1,
          "discount: it is 0 ... 1, got " + std::to_string(options.discount));
  require(options.margin >= 0 && options.margin <= 1, "margin: it is 0 ... 1, got " + std::to_string(options.margin));
}

}  // namespace

PrefetchPolicy::PrefetchPolicy(int num_layers, int num_experts, PrefetchOptions options)
    : options_(std::move(options)), num_layers_(num_layers), num_experts_(num_experts), reached_(num_layers - 1) {
  require(num_layers > 0 && num_experts > 0, "num_layers and num_experts: both are positive, got " +
                                                 std::to_string(num_layers) + " and " + std::to_string(num_experts));
  check(options_);
  probability_.resize(size_t(num_layers) * size_t(num_experts), 0.f);
  predicted_.resize(size_t(num_layers));
}

void PrefetchPolicy::forget(int layer) {
  for (const LikelyExpert& e : predicted_[size_t(layer)]) probability_[index(layer, e.expert)] = 0;
  predicted_[size_t(layer)].clear();
}

void PrefetchPolicy::predicted(int layer, std::span<const LikelyExpert> experts) {
  // Once per prediction: no message is made where there is nothing to say.
  if (layer < 0 || layer >= num_layers_) {
    require(false, "layer: it is one of " + std::to_string(num_layers_) + ", got " + std::to_string(layer));
  }
  for (const LikelyExpert& e : experts) {
    if (e.expert >= 0 && e.expert < num_experts_) continue;
    require(false, "expert: it is one of " + std::to_string(num_experts_) + ", got " + std::to_string(e.expert));
  }
  forget(layer);
  for (const LikelyExpert& e : experts) {
    float& known = probability_[index(layer, e.expert)];
    if (!(e.probability > 0) || known > 0) continue;  // NaN too; named twice, the first counts
    known = e.probability;
    predicted_[size_t(layer)].push_back(e);
  }
}

void PrefetchPolicy::reached(int layer) {
  forget(layer);
  reached_ = layer;
}

std::span<const PrefetchRead> PrefetchPolicy::plan(const std::function<bool(int layer, int expert)>& absent) {
  plan_.clear();
  int ahead = std::min(lookahead(), num_layers_ - 1);
  by_deadline(reached_, num_layers_, ahead, options_, [&](int layer, int distance, float discount) {
    int left = options_.widths[size_t(distance - 1)];
    for (const LikelyExpert& e : predicted_[size_t(layer)]) {
      if (left-- == 0 || e.probability < options_.thresholds[size_t(distance - 1)]) break;
      if (absent(layer, e.expert)) {
        plan_.push_back({layer, e.expert, distance, e.probability, e.probability * discount});
      }
    }
  });
  std::sort(plan_.begin(), plan_.end(), [](const PrefetchRead& a, const PrefetchRead& b) {
    return a.priority != b.priority   ? a.priority > b.priority
           : a.distance != b.distance ? a.distance < b.distance
                                      : a.expert < b.expert;
  });
  return plan_;
}

}  // namespace mlx_od_moe
