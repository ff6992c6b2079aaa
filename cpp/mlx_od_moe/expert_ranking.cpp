#include "mlx_od_moe/expert_ranking.h"

#include <algorithm>
#include <tuple>

namespace mlx_od_moe {
namespace {

constexpr int kChunk = 64;  // tokens predicted at once, as many as the forward takes

size_t size(int n) { return static_cast<size_t>(n); }

Query part_of(const Query& query, const PredictorConfig& config, int first) {
  Query part = query;
  part.tokens = std::min(kChunk, query.tokens - first);
  const size_t element = query.dtype == DType::float32 ? 4 : 2;
  part.hidden = static_cast<const char*>(query.hidden) + size(first) * size(config.hidden_size) * element;
  if (query.previous) part.previous += size(first) * size(config.lookahead) * size(query.num_previous);
  if (query.position >= 0) part.position += first;
  if (query.rows) part.rows += first;
  if (query.context) part.context += size(first) * size(config.predictor_size);
  return part;
}

}  // namespace

void ExpertRanking::reserve(const PredictorConfig& config) {
  logits_.resize(std::max(logits_.size(), size(kChunk) * size(config.lookahead) * size(config.num_experts)));
  ids_.resize(size(kernels::kMaxTopK));
  candidates_.resize(std::max(candidates_.size(), size(config.num_experts)));
  ranked_.reserve(size(config.num_experts));
}

bool ExpertRanking::rank(const Predictor& predictor, const Query& query, int k, size_t distances,
                         const std::function<bool()>& over, const Publish& publish) {
  const PredictorConfig& config = predictor.config();
  if (query.tokens == 1) {
    rank_token(predictor, query, k, distances, publish);
    return true;
  }
  demand_.assign(distances * size(config.num_experts), {0, k});
  for (int first = 0; first < query.tokens; first += kChunk) {
    if (first > 0 && over()) return false;
    count_chunk(predictor, part_of(query, config, first), k, distances);
  }
  for (size_t d = 0; d < distances; ++d) rank_demand(size(config.num_experts), d, publish);
  return true;
}

void ExpertRanking::rank_token(const Predictor& predictor, const Query& query, int k, size_t distances,
                               const Publish& publish) {
  const int experts = predictor.config().num_experts;
  predictor.logits(query, logits_.data());
  for (size_t d = 0; d < distances; ++d) {
    const float* scores = logits_.data() + d * size(experts);
    kernels_.top_k(scores, experts, k, candidates_.data(), ids_.data());
    ranked_.clear();
    for (size_t i = 0; i < size(k); ++i) ranked_.push_back({ids_[i], scores[ids_[i]]});
    publish(d, ranked_);
  }
}

void ExpertRanking::count_chunk(const Predictor& predictor, const Query& chunk, int k, size_t distances) {
  const PredictorConfig& config = predictor.config();
  const size_t experts = size(config.num_experts);
  predictor.logits(chunk, logits_.data());
  for (size_t row = 0; row < size(chunk.tokens) * size(config.lookahead); ++row) {
    const size_t d = row % size(config.lookahead);
    if (d >= distances) continue;
    const float* scores = logits_.data() + row * experts;
    kernels_.top_k(scores, config.num_experts, k, candidates_.data(), ids_.data());
    for (int rank = 0; rank < k; ++rank) {
      Demand& demand = demand_[d * experts + size(ids_[size(rank)])];
      ++demand.tokens;
      demand.best_rank = std::min(demand.best_rank, rank);
    }
  }
}

void ExpertRanking::rank_demand(size_t experts, size_t distance, const Publish& publish) {
  const Demand* demand = demand_.data() + distance * experts;
  ranked_.clear();
  for (size_t e = 0; e < experts; ++e) {
    if (demand[e].tokens > 0) ranked_.push_back({static_cast<int32_t>(e), static_cast<float>(demand[e].tokens)});
  }
  const auto key = [&](const ScoredExpert& x) { return std::tuple(-x.score, demand[x.id].best_rank, x.id); };
  std::sort(ranked_.begin(), ranked_.end(),
            [&](const ScoredExpert& a, const ScoredExpert& b) { return key(a) < key(b); });
  publish(distance, ranked_);
}

}  // namespace mlx_od_moe
