// What makes a predictor's logits those of probabilities: score = a (z - boundary) + b per distance, where
// `boundary` is the mean of a token's logits around the k-th, as Python's calibration.py defines it.
//
// Threads    Immutable once made: any.
// Errors     std::invalid_argument, "[NativePredictor] rule, value", for numbers that are none.
// Costs      The choice of 3/2 k of the experts and one pass over them.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "mlx_od_moe/export.h"
#include "mlx_od_moe/kernels/kernels.h"
#include "mlx_od_moe/weights.h"

namespace mlx_od_moe {

// Ranks [first, end) whose logits' mean is the boundary, 0 the largest: as many among the top_k as below them.
// Throws where all experts are chosen.
MLX_OD_MOE_API std::pair<int, int> boundary_ranks(const PredictorConfig& config);

class Calibration {
 public:
  Calibration() = default;  // none: logits stay as they are
  // From `calibration` [lookahead, 2]; none where that is no tensor.
  Calibration(const Tensor& calibration, const PredictorConfig& config);

  explicit operator bool() const { return !distances_.empty(); }
  // One token's logits z [lookahead, num_experts], in place. `ids`: scratch for twice num_experts.
  void apply(const kernels::KernelSet& kernels, float* z, int32_t* ids) const;

 private:
  struct Distance {
    float factor;
    float offset;
  };

  float boundary(const kernels::KernelSet& kernels, const float* z, int32_t* ids) const;

  std::vector<Distance> distances_;
  int experts_ = 0;
  int first_ = 0;  // ranks [first, end) make the boundary, 0 the largest
  int end_ = 0;
};

}  // namespace mlx_od_moe
