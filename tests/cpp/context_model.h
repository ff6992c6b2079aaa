// A runner's model for the tests of its contexts, and what a SequenceContext of each text predicts with it.
#pragma once

#include <map>
#include <set>
#include <thread>
#include <vector>

#include "mlx_od_moe/shadow_runner.h"
#include "random_bundle.h"

namespace mlx_od_moe::tests {

inline PredictorConfig small_config() {
  PredictorConfig c;
  c.hidden_size = 24;
  c.predictor_size = 16;
  c.context = {10, 5, 3};
  return c;
}

using Gaps = std::set<std::pair<int, int>>;

struct ContextModel {
  RandomBundle bundle{small_config(), 2, 9};
  std::map<int, Predictor> predictors = bundle.pack({Format::f32, 1, 64});
  RandomBundle::States states = bundle.states(300);

  std::vector<LayerPredictor> layers() const {
    std::vector<LayerPredictor> out;
    for (const auto& [layer, predictor] : predictors) out.push_back({layer, predictor, bundle.targets(layer)});
    return out;
  }
  Query query(int layer, int token) const {
    Query q;
    q.hidden = states.at(layer).data() + token * bundle.config().hidden_size;
    q.tokens = 1;
    return q;
  }
  // What the last token of a text is predicted to want: {(layer, target): ids}. `gaps`: {(layer, place)} of
  // tokens that were not observed there.
  std::map<std::pair<int, int>, std::vector<int>> expected(const std::vector<int>& text, const Gaps& gaps = {}) const {
    SequenceContext context(predictors);
    std::map<std::pair<int, int>, std::vector<int>> out;
    for (size_t i = 0; i < text.size(); ++i) {
      for (int layer : bundle.layers) {
        Query q = query(layer, text[i]);
        q.position = static_cast<int64_t>(i);
        const auto found = predictors.find(layer);
        if (i + 1 == text.size() && found != predictors.end()) {
          q.sequence = &context;
          std::vector<int32_t> ids(static_cast<size_t>(found->second.config().lookahead * 2));
          found->second.predict(q, 2, ids.data());
          for (size_t d = 0; d < bundle.targets(layer).size(); ++d) {
            out[{layer, bundle.targets(layer)[d]}] = {ids[2 * d], ids[2 * d + 1]};
          }
        }
        if (!gaps.contains({layer, static_cast<int>(i)})) context.observe(layer, q);
      }
    }
    return out;
  }
};

inline void settle(const ShadowRunner& runner) {
  while (runner.statistics().waiting > 0) std::this_thread::yield();
}

}  // namespace mlx_od_moe::tests
