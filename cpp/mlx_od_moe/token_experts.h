// What tokens choose at the first MoE layers, which no predictor looks at: a table that training has learned.
//
// Threads    Immutable: any thread may call any method.
// Ownership  Holds its table.
// Errors     std::invalid_argument, "[TokenExperts] rule, value".
// Costs      A token: a binary search, and one record per layer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "mlx_od_moe/export.h"
#include "mlx_od_moe/prediction_queue.h"

namespace mlx_od_moe {

class MLX_OD_MOE_API TokenExperts {
 public:
  // `tokens` [n] rise; `experts` and `probabilities` (0 ... 255 for 0 ... 1) are [n + 1, layers, width], likeliest
  // first, the last row for any other token. `layers`: the model's indices of these.
  TokenExperts(std::vector<int32_t> tokens, std::vector<uint16_t> experts, std::vector<uint8_t> probabilities,
               std::vector<int> layers);

  // For each layer the experts that these tokens, of one sequence each, probably choose in that step. Of
  // several tokens the scores are how many of them are expected to want the expert.
  std::vector<PredictionRecord> predict(std::span<const int32_t> tokens, uint64_t step) const;

 private:
  size_t row(int32_t token) const;
  void rank_one(size_t row, size_t layer, PredictionRecord& record) const;
  void rank_several(std::span<const size_t> rows, size_t layer, PredictionRecord& record) const;

  std::vector<int32_t> tokens_;
  std::vector<uint16_t> experts_;
  std::vector<uint8_t> probabilities_;
  std::vector<int> layers_;
  size_t width_;
};

}  // namespace mlx_od_moe
