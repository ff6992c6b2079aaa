// Predictor files, as Python's ExpertPredictor.save and PredictorBundle.save write them.
//
// Threads    A bundle is immutable; its predictors share one allocation and one set of helper threads.
// Ownership  A bundle owns its predictors; copies of a Predictor keep the allocation alive.
// Errors     std::invalid_argument, "[path] rule, value", for any file that is not one.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "mlx_od_moe/export.h"
#include "mlx_od_moe/predictor.h"

namespace mlx_od_moe {

// The predictor of a file of kind "predictor".
MLX_OD_MOE_API Predictor load_predictor(const std::string& path, const PredictorOptions& options = {});

// The predictors of all MoE layers of a model, by the model's layer index.
class MLX_OD_MOE_API PredictorBundle {
 public:
  // From a file of kind "bundle".
  static PredictorBundle load(const std::string& path, const PredictorOptions& options = {});
  // From tensors and metadata as such a file holds them; `path` names them in errors.
  static PredictorBundle make(const Tensors& tensors, const std::map<std::string, std::string>& metadata,
                              const PredictorOptions& options, const std::string& path);

  const std::vector<int>& moe_layers() const { return moe_layers_; }
  const std::map<int, Predictor>& predictors() const { return predictors_; }
  const Predictor& at(int layer) const;       // throws std::out_of_range
  std::vector<int> targets(int layer) const;  // the layers that its predictor speaks of, nearest first

 private:
  std::vector<int> moe_layers_;
  std::map<int, Predictor> predictors_;
};

}  // namespace mlx_od_moe
