// The MoE layers of a runner: what each one's states are good for.
//
// Threads    Immutable once made: any thread.
// Ownership  Shares the predictors' weights.
// Errors     std::invalid_argument, "[ShadowRunner] rule, value".
// Units      Layers by their place among the MoE layers; `number` and `index` translate the model's.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "mlx_od_moe/sequence_table.h"
#include "mlx_od_moe/shadow_runner.h"

namespace mlx_od_moe {

struct RunnerLayer {
  std::optional<Predictor> predictor;
  std::vector<size_t> targets;
  int k = 0;                // experts predicted per target
  int hidden_size = 0;      // of the states that are read; 0: none
  bool remembered = false;  // its states leave something for later tokens
};

class RunnerLayers {
 public:
  // `numbers`: of all MoE layers, rising. k as in RunnerOptions.
  RunnerLayers(std::vector<LayerPredictor> predictors, std::vector<int> numbers, int k);

  const RunnerLayer& operator[](size_t layer) const { return layers_[layer]; }
  size_t size() const { return layers_.size(); }
  const std::vector<RunnerLayer>& all() const { return layers_; }
  const std::vector<int>& numbers() const { return numbers_; }
  int number(size_t layer) const { return numbers_[layer]; }
  size_t index(int number) const;

  // For the contexts of the runner's sequences; null where no predictor has one.
  std::unique_ptr<SequenceTable> make_sequences() const;

 private:
  void add(LayerPredictor&& given, int k);
  void find_remembered();
  std::map<int, Predictor> readers() const;  // the predictors that have a context

  std::vector<int> numbers_;
  std::vector<RunnerLayer> layers_;
};

}  // namespace mlx_od_moe
