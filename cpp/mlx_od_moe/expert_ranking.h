// Which experts some tokens want of each layer ahead, best first: one forward of a predictor, ranked.
//
// Threads    One thread at a time.
// Errors     Those of Predictor::logits.
// Costs      `reserve` allocates for one token; a batch allocates once more. Ranking one token takes about
//            1 us for 4 x 384 experts.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "mlx_od_moe/kernels/select.h"
#include "mlx_od_moe/prediction_table.h"
#include "mlx_od_moe/predictor.h"

namespace mlx_od_moe {

class ExpertRanking {
 public:
  // Called per distance, 0 for the next layer, with its experts.
  using Publish = std::function<void(size_t distance, std::span<const ScoredExpert> experts)>;

  // Room for this predictor's results.
  void reserve(const PredictorConfig& config);

  // One token: its k best with their logits. More tokens: the union of each one's k best, with the number
  // of tokens that want it, of equals that one first which some token ranks higher. `distances`: how many
  // to publish. False, with nothing published: `over()` came true between two chunks of tokens.
  bool rank(const Predictor& predictor, const Query& query, int k, size_t distances, const std::function<bool()>& over,
            const Publish& publish);

 private:
  struct Demand {
    int tokens = 0;
    int best_rank = 0;
  };

  void rank_token(const Predictor& predictor, const Query& query, int k, size_t distances, const Publish& publish);
  void count_chunk(const Predictor& predictor, const Query& chunk, int k, size_t distances);
  void rank_demand(size_t experts, size_t distance, const Publish& publish);

  const kernels::KernelSet& kernels_ = kernels::select_kernels();
  std::vector<float> logits_;
  std::vector<int32_t> ids_, candidates_;
  std::vector<Demand> demand_;  // [distances, experts]
  std::vector<ScoredExpert> ranked_;
};

}  // namespace mlx_od_moe
