// ShadowRunner with contexts: what it predicts is what a SequenceContext of each text predicts.
#include <doctest/doctest.h>

#include <chrono>
#include <map>
#include <thread>
#include <tuple>

#include "mlx_od_moe/shadow_runner.h"
#include "random_bundle.h"

using namespace mlx_od_moe;
using tests::RandomBundle;

namespace {

PredictorConfig small() {
  PredictorConfig c;
  c.hidden_size = 24;
  c.predictor_size = 16;
  c.context = {10, 5, 3};
  return c;
}

struct Model {
  RandomBundle bundle{small(), 2, 9};
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
  // What the last token of a text is predicted to want: {(layer, target): ids}.
  std::map<std::pair<int, int>, std::vector<int>> expected(const std::vector<int>& text) const {
    SequenceContext context(predictors);
    std::map<std::pair<int, int>, std::vector<int>> out;
    for (size_t i = 0; i < text.size(); ++i) {
      for (int layer : bundle.layers) {
        Query q = query(layer, text[i]);
        const auto found = predictors.find(layer);
        if (i + 1 == text.size() && found != predictors.end()) {
          q.sequence = &context;
          std::vector<int32_t> ids(static_cast<size_t>(found->second.config().lookahead * 2));
          found->second.predict(q, 2, ids.data());
          for (size_t d = 0; d < bundle.targets(layer).size(); ++d) {
            out[{layer, bundle.targets(layer)[d]}] = {ids[2 * d], ids[2 * d + 1]};
          }
        }
        context.observe(layer, query(layer, text[i]));
      }
    }
    return out;
  }
};

}  // namespace

TEST_CASE("sequences live side by side: decoding, trims, forks and resets") {
  const Model model;
  std::map<std::tuple<uint64_t, int, int>, std::vector<int>> found;
  ShadowRunner runner(model.layers(), model.bundle.layers, {0, 512}, nullptr, [&](const PredictionRecord& r) {
    found[{r.step, r.source_layer, r.target_layer}].assign(r.ids, r.ids + r.count);
  });
  std::map<int, std::vector<int>> texts;
  std::map<uint64_t, std::vector<int>> passes;
  std::mt19937 generator(4);
  int token = 0;
  for (uint64_t step = 1; step <= 150; ++step) {
    const int sequence = static_cast<int>(generator() % 3);
    std::vector<int>& text = texts[sequence];
    switch (generator() % 8) {
      case 0: {
        const size_t n = std::min<size_t>(generator() % 3, text.size());
        runner.trim(sequence, static_cast<int64_t>(n));
        text.resize(text.size() - n);
        break;
      }
      case 1:
        runner.fork(sequence, (sequence + 1) % 3);
        texts[(sequence + 1) % 3] = std::vector<int>(text);
        break;
      case 2:
        if (generator() % 3 > 0) break;
        runner.reset(sequence);
        text.clear();
        break;
      default:
        break;
    }
    text.push_back(token);
    for (int layer : model.bundle.layers) {
      runner.predict_async(layer, model.query(layer, token), nullptr, step, sequence);
    }
    ++token;
    passes[step] = text;
    // Some passes are over before the thread comes to them: they are observed all the same.
    if (step % 4 == 0) {
      while (runner.statistics().waiting > 0) std::this_thread::yield();
    }
  }
  while (runner.statistics().waiting > 0) std::this_thread::yield();
  runner.close();
  const RunnerStatistics s = runner.statistics();
  CHECK(s.submitted == 600);
  CHECK(s.observed == 150);
  CHECK(s.submitted == s.predicted + s.observed + s.dropped + s.expired + s.failed + s.waiting);
  CHECK(s.dropped + s.failed == 0);
  CHECK(found.size() >= 37 * 5);
  for (const auto& [key, ids] : found) {
    const auto& [step, source, target] = key;
    CAPTURE(step);
    CAPTURE(source);
    CHECK(ids == model.expected(passes.at(step)).at({source, target}));
  }
}

TEST_CASE("a state that was dropped leaves a gap, and the next ones stay in place") {
  const Model model;
  std::map<std::pair<int, int>, std::vector<int>> last;
  ShadowRunner runner(model.layers(), model.bundle.layers, {0, 1}, nullptr, [&](const PredictionRecord& r) {
    last[{r.source_layer, r.target_layer}].assign(r.ids, r.ids + r.count);
  });
  for (int i = 0; i < 200; ++i) {
    for (int layer : model.bundle.layers) runner.predict_async(layer, model.query(layer, i), nullptr, i);
  }
  // The window is full of what is handed in slowly: what was dropped is too far back to matter.
  std::vector<int> text;
  for (int i = 200; i < 230; ++i) {
    for (int layer : model.bundle.layers) {
      runner.predict_async(layer, model.query(layer, i), nullptr, i);
      while (runner.statistics().waiting > 0) std::this_thread::yield();
    }
    text.push_back(i);
  }
  runner.close();
  CHECK(runner.statistics().dropped > 0);
  CHECK(last == model.expected(text));
}

TEST_CASE("a predictor whose memories are not there is refused") {
  Model model;
  std::vector<LayerPredictor> layers = model.layers();
  layers[0].targets = {3, 6};
  CHECK_THROWS_WITH_AS(ShadowRunner(layers, model.bundle.layers),
                       doctest::Contains("layer 1 reads the memories of layers [3, 6], but has those of [3, 4]"),
                       std::invalid_argument);
}
