// A bundle of random predictors with a context, and what earlier tokens add to them in float64, written as
// the formula in Python's context.py reads.
#pragma once

#include <cmath>
#include <map>
#include <memory>
#include <vector>

#include "mlx_od_moe/sequence_context.h"
#include "reference.h"

namespace mlx_od_moe::tests {

class RandomBundle {
 public:
  using States = std::map<int, std::vector<float>>;  // per layer [tokens, hidden_size]

  // Layers 1, 3, 4, 6; the predictors look `ahead` layers ahead, or as many as there are.
  RandomBundle(PredictorConfig config, int ahead, unsigned seed) {
    config.num_experts = 10;
    config.top_k = 2;
    for (size_t t = 1; t < layers.size(); ++t) {
      memories_[layers[t]] = {layers[t], {}};
      memories_[layers[t]].encode.weight = random(config.context.memory_size(), config.hidden_size, seed + 10 + t);
    }
    for (size_t l = 0; l + 1 < layers.size(); ++l) {
      config.lookahead = std::min(ahead, static_cast<int>(layers.size() - l) - 1);
      auto predictor = std::make_unique<RandomPredictor>(config, seed + l);
      PredictorWeights weights = predictor->weights();
      const ContextConfig& c = config.context;
      const int heads = config.lookahead * c.key_size;
      if (c.window > 0) {
        weights.context.query.weight = random(heads, config.hidden_size, seed + 20 + l);
        weights.context.attended.weight = random(config.predictor_size, heads, seed + 30 + l);
        weights.context.position_bias = random(config.lookahead, c.window + 1, seed + 40 + l);
        if (c.early_query && l > 0) weights.context.query_layer = layers[l - 1];
      }
      if (c.state_size > 0) {
        const int states = config.lookahead * c.state_size;
        weights.context.previous_state.weight = random(config.predictor_size, states, seed + 50 + l);
      }
      for (size_t d = 1; d <= static_cast<size_t>(config.lookahead); ++d) {
        weights.context.memories.push_back(&memories_.at(layers[l + d]));
      }
      predictors_[layers[l]] = std::move(predictor);
      weights_[layers[l]] = std::move(weights);
    }
  }

  std::map<int, Predictor> pack(const PredictorOptions& options) const {
    std::vector<PredictorWeights> weights;
    for (const auto& [layer, w] : weights_) weights.push_back(w);
    const std::vector<Predictor> packed = Predictor::pack(weights, options);
    std::map<int, Predictor> out;
    for (size_t i = 0; i < packed.size(); ++i) out.emplace(layers[i], packed[i]);
    return out;
  }

  States states(int tokens) {
    States out;
    for (int layer : layers) {
      out[layer] = predictors_.begin()->second->values(static_cast<size_t>(tokens * config().hidden_size), 1);
    }
    return out;
  }

  const PredictorConfig& config() const { return weights_.begin()->second.config; }
  std::vector<int> targets(int layer) const {
    std::vector<int> out;
    for (const TokenMemory* memory : weights_.at(layer).context.memories) out.push_back(memory->layer);
    return out;
  }

  // Logits of token `at` of one sequence, whose first token is `first`.
  std::vector<double> logits(int layer, const States& states, int at, int first = 0) const {
    const auto hidden = static_cast<size_t>(config().hidden_size);
    const std::vector<float> context = vector(layer, states, at, first);
    Query query;
    query.hidden = states.at(layer).data() + static_cast<size_t>(at) * hidden;
    query.tokens = 1;
    query.context = context.data();
    return predictors_.at(layer)->forward(query);
  }

  static constexpr int kLast = 6;
  const std::vector<int> layers = {1, 3, 4, kLast};

 private:
  using Row = std::vector<double>;

  Tensor random(int rows, int columns, size_t seed) {
    std::mt19937 generator(static_cast<unsigned>(seed));
    std::normal_distribution<float> distribution(0, 2 / std::sqrt(static_cast<float>(columns)));
    tensors_.push_back(std::make_unique<std::vector<float>>(static_cast<size_t>(rows * columns)));
    for (float& v : *tensors_.back()) v = distribution(generator);
    return {tensors_.back()->data(), DType::float32, static_cast<size_t>(rows), static_cast<size_t>(columns)};
  }

  template <class X>
  static Row product(const Linear& matrix, const X* x) {
    const auto* w = static_cast<const float*>(matrix.weight.data);
    Row out(matrix.rows());
    for (size_t r = 0; r < out.size(); ++r)
      for (size_t c = 0; c < matrix.columns(); ++c) out[r] += double{w[r * matrix.columns() + c]} * x[c];
    return out;
  }

  Row memory(int layer, const States& states, int token) const {
    const auto hidden = static_cast<size_t>(config().hidden_size);
    return product(memories_.at(layer).encode, states.at(layer).data() + static_cast<size_t>(token) * hidden);
  }

  std::vector<float> vector(int layer, const States& states, int at, int first) const {
    const PredictorWeights& w = weights_.at(layer);
    const ContextConfig& c = w.config.context;
    const auto size = static_cast<size_t>(c.key_size);
    Row sum(static_cast<size_t>(w.config.predictor_size));
    const auto add = [&](const Row& x) {
      for (size_t i = 0; i < sum.size(); ++i) sum[i] += x[i];
    };
    if (c.state_size > 0 && at > first) {
      Row previous;
      for (int target : targets(layer)) {
        const Row row = memory(target, states, at - 1);
        previous.insert(previous.end(), row.begin() + 2 * c.key_size, row.end());
      }
      add(product(w.context.previous_state, previous.data()));
    }
    if (c.window > 0) {
      const int asks = w.context.query_layer.value_or(layer);
      const float* h = states.at(asks).data() + static_cast<size_t>(at) * static_cast<size_t>(w.config.hidden_size);
      const Row query = product(w.context.query, h);
      Row read;
      for (size_t d = 0; d < w.context.memories.size(); ++d) {
        const float* bias = static_cast<const float*>(w.context.position_bias.data) + d * (c.window + 1);
        double total = std::exp(double{bias[0]});
        Row value(size);
        for (int age = 1; age <= c.window && at - age >= first; ++age) {
          const Row row = memory(w.context.memories[d]->layer, states, at - age);
          double score = 0;
          for (size_t i = 0; i < size; ++i) score += query[d * size + i] * row[i];
          const double weight = std::exp(score / std::sqrt(c.key_size) + bias[age]);
          total += weight;
          for (size_t i = 0; i < size; ++i) value[i] += weight * row[size + i];
        }
        for (double v : value) read.push_back(v / total);
      }
      add(product(w.context.attended, read.data()));
    }
    return {sum.begin(), sum.end()};
  }

  std::vector<std::unique_ptr<std::vector<float>>> tensors_;
  std::map<int, TokenMemory> memories_;
  std::map<int, std::unique_ptr<RandomPredictor>> predictors_;
  std::map<int, PredictorWeights> weights_;
};

}  // namespace mlx_od_moe::tests
