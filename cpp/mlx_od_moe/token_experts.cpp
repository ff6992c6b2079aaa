#include "mlx_od_moe/token_experts.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

namespace mlx_od_moe {
namespace {

constexpr float kSteps = 255;
constexpr auto kMost = size_t{PredictionRecord::kMaxIds};

float logit(uint8_t steps) {
  const float p = std::clamp(static_cast<float>(steps) / kSteps, 1e-3F, 1 - 1e-3F);
  return std::log(p / (1 - p));
}

}  // namespace

TokenExperts::TokenExperts(std::vector<int32_t> tokens, std::vector<uint16_t> experts,
                           std::vector<uint8_t> probabilities, std::vector<int> layers)
    : tokens_(std::move(tokens)),
      experts_(std::move(experts)),
      probabilities_(std::move(probabilities)),
      layers_(std::move(layers)),
      width_(layers_.empty() ? 0 : experts_.size() / (layers_.size() * (tokens_.size() + 1))) {
  if (width_ == 0 || experts_.size() != (tokens_.size() + 1) * layers_.size() * width_ ||
      probabilities_.size() != experts_.size()) {
    throw std::invalid_argument("[TokenExperts] experts and probabilities must be [tokens + 1, layers, width], got " +
                                std::to_string(experts_.size()) + " and " + std::to_string(probabilities_.size()) +
                                " for " + std::to_string(tokens_.size()) + " tokens and " +
                                std::to_string(layers_.size()) + " layers");
  }
}

size_t TokenExperts::row(int32_t token) const {
  const auto found = std::ranges::lower_bound(tokens_, token);
  const bool known = found != tokens_.end() && *found == token;
  return known ? static_cast<size_t>(found - tokens_.begin()) : tokens_.size();
}

std::vector<PredictionRecord> TokenExperts::predict(std::span<const int32_t> tokens, uint64_t step) const {
  std::vector<size_t> rows;
  for (int32_t token : tokens) rows.push_back(row(token));
  std::vector<PredictionRecord> records(layers_.size());
  for (size_t i = 0; i < layers_.size(); ++i) {
    PredictionRecord& record = records[i];
    record.step = step;
    record.source_layer = -1;
    record.target_layer = static_cast<int16_t>(layers_[i]);
    record.distance = static_cast<uint8_t>(i + 1);
    record.batch = rows.size() > 1;
    if (record.batch) {
      rank_several(rows, i, record);
    } else if (!rows.empty()) {
      rank_one(rows.front(), i, record);
    }
  }
  return records;
}

void TokenExperts::rank_one(size_t row, size_t layer, PredictionRecord& record) const {
  const size_t first = (row * layers_.size() + layer) * width_;
  record.count = static_cast<uint8_t>(std::min(width_, kMost));
  for (size_t i = 0; i < record.count; ++i) {
    record.ids[i] = static_cast<int16_t>(experts_[first + i]);
    record.scores[i] = logit(probabilities_[first + i]);
  }
}

void TokenExperts::rank_several(std::span<const size_t> rows, size_t layer, PredictionRecord& record) const {
  std::map<uint16_t, float> wanted;
  for (size_t row : rows) {
    const size_t first = (row * layers_.size() + layer) * width_;
    for (size_t i = first; i < first + width_; ++i) {
      wanted[experts_[i]] += static_cast<float>(probabilities_[i]) / kSteps;
    }
  }
  std::vector<std::pair<uint16_t, float>> best(wanted.begin(), wanted.end());
  std::ranges::stable_sort(best, std::greater(), &std::pair<uint16_t, float>::second);
  record.count = static_cast<uint8_t>(std::min(best.size(), kMost));
  for (size_t i = 0; i < record.count; ++i) {
    record.ids[i] = static_cast<int16_t>(best[i].first);
    record.scores[i] = best[i].second;
  }
}

}  // namespace mlx_od_moe
