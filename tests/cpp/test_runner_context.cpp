// ShadowRunner with contexts: what it predicts is what a SequenceContext of each text predicts.
#include <doctest/doctest.h>

#include <map>
#include <tuple>

#include "context_model.h"

using namespace mlx_od_moe;
using tests::ContextModel;
using tests::settle;

TEST_CASE("sequences live side by side: decoding, trims, forks and resets") {
  const ContextModel model;
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
      settle(runner);
    }
  }
  settle(runner);
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
  const ContextModel model;
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
      settle(runner);
    }
    text.push_back(i);
  }
  runner.close();
  CHECK(runner.statistics().dropped > 0);
  CHECK(last == model.expected(text));
}

TEST_CASE("a predictor whose memories are not there is refused") {
  ContextModel model;
  std::vector<LayerPredictor> layers = model.layers();
  layers[0].targets = {3, 6};
  CHECK_THROWS_WITH_AS(ShadowRunner(layers, model.bundle.layers),
                       doctest::Contains("layer 1 reads the memories of layers [3, 6], but has those of [3, 4]"),
                       std::invalid_argument);
}
