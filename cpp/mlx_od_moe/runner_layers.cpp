#include "mlx_od_moe/runner_layers.h"

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <utility>

#include "mlx_od_moe/kernels/kernels.h"

namespace mlx_od_moe {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("[ShadowRunner] " + what); }

std::string listed(const std::vector<int>& layers) {
  std::string out = "[";
  for (int layer : layers) out += (out.size() > 1 ? ", " : "") + std::to_string(layer);
  return out + "]";
}

}  // namespace

RunnerLayers::RunnerLayers(std::vector<LayerPredictor> predictors, std::vector<int> numbers, int k)
    : numbers_(std::move(numbers)), layers_(numbers_.size()) {
  const auto falls = std::adjacent_find(numbers_.begin(), numbers_.end(), std::greater_equal<>());
  if (numbers_.empty() || falls != numbers_.end() || numbers_.front() < 0 || numbers_.back() > INT16_MAX) {
    refuse("moe_layers must be rising numbers from 0 to 32767, got " + listed(numbers_));
  }
  for (LayerPredictor& p : predictors) add(std::move(p), k);
  find_remembered();
}

size_t RunnerLayers::index(int number) const {
  const auto found = std::lower_bound(numbers_.begin(), numbers_.end(), number);
  if (found == numbers_.end() || *found != number) {
    refuse("layer must be one of the MoE layers " + listed(numbers_) + ", got " + std::to_string(number));
  }
  return static_cast<size_t>(found - numbers_.begin());
}

void RunnerLayers::add(LayerPredictor&& given, int k) {
  RunnerLayer& layer = layers_[index(given.layer)];
  const PredictorConfig& config = given.predictor.config();
  layer.k = k == 0 ? config.top_k : k;
  const int most = std::min(kernels::kMaxTopK, config.num_experts);
  if (layer.k < 1 || layer.k > most) {
    refuse("k must be 1 ... " + std::to_string(most) + ", got " + std::to_string(layer.k));
  }
  if (config.num_experts > PredictionRecord::kMaxIds * PredictionRecord::kMaxParts) {
    refuse("num_experts must be at most 4096, got " + std::to_string(config.num_experts));
  }
  for (int target : given.targets) {
    if (layer.targets.size() == static_cast<size_t>(config.lookahead)) break;
    if (target <= given.layer) {
      refuse("targets must come after layer " + std::to_string(given.layer) + ", got " + std::to_string(target));
    }
    layer.targets.push_back(index(target));
  }
  if (layer.targets.empty()) return;
  layer.hidden_size = config.hidden_size;
  layer.predictor.emplace(std::move(given.predictor));
}

// What predictors with a context look at is observed there, also where no predictor is.
void RunnerLayers::find_remembered() {
  const SequenceContext context(readers());
  for (size_t i = 0; i < layers_.size(); ++i) {
    if (!context.remembers(numbers_[i])) continue;
    layers_[i].remembered = true;
    layers_[i].hidden_size = context.hidden_size();
  }
}

std::map<int, Predictor> RunnerLayers::readers() const {
  std::map<int, Predictor> readers;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const RunnerLayer& layer = layers_[i];
    if (!layer.predictor || !layer.predictor->config().has_context()) continue;
    const std::vector<int> memories = layer.predictor->memory_layers();
    std::vector<int> targets;
    for (size_t target : layer.targets) targets.push_back(numbers_[target]);
    if (memories != targets) {
      refuse("the predictor of layer " + std::to_string(numbers_[i]) + " reads the memories of layers " +
             listed(targets) + ", but has those of " + listed(memories) + ": its bundle holds them");
    }
    readers.emplace(numbers_[i], *layer.predictor);
  }
  return readers;
}

std::unique_ptr<SequenceTable> RunnerLayers::make_sequences() const {
  const std::map<int, Predictor> found = readers();
  return found.empty() ? nullptr : std::make_unique<SequenceTable>(found);
}

}  // namespace mlx_od_moe
