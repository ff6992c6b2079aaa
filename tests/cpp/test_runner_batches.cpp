// ShadowRunner with batches: what it predicts for one is the union of what each of its texts wants alone.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <map>
#include <numeric>
#include <thread>
#include <tuple>

#include "context_model.h"

using namespace mlx_od_moe;
using tests::ContextModel;
using tests::Gaps;
using tests::RandomBundle;
using tests::settle;

namespace {

// A prediction of several tokens: experts with the number that want them, as PredictionRecord has them.
using Demand = std::vector<std::pair<int, float>>;
using Demands = std::map<std::pair<int, int>, Demand>;

Demand demand_of(const PredictionRecord& r) {
  Demand out;
  for (size_t i = 0; i < r.count; ++i) out.emplace_back(r.ids[i], r.scores[i]);
  return out;
}

// The union of what each text's last token wants by itself.
Demands united(const ContextModel& model, const std::vector<std::vector<int>>& texts,
               const std::vector<Gaps>& gaps = {}) {
  std::map<std::pair<int, int>, std::map<int, std::pair<int, int>>> wanted;  // expert: -tokens, best rank
  for (size_t i = 0; i < texts.size(); ++i) {
    for (const auto& [layers, ids] : model.expected(texts[i], gaps.empty() ? Gaps() : gaps[i])) {
      for (int rank = 0; rank < static_cast<int>(ids.size()); ++rank) {
        auto& [tokens, best] = wanted[layers].try_emplace(ids[static_cast<size_t>(rank)], 0, rank).first->second;
        --tokens;
        best = std::min(best, rank);
      }
    }
  }
  Demands out;
  for (const auto& [layers, experts] : wanted) {
    std::vector<std::tuple<int, int, int>> order;
    for (const auto& [id, by] : experts) order.emplace_back(by.first, by.second, id);
    std::ranges::sort(order);
    for (const auto& [tokens, rank, id] : order) out[layers].emplace_back(id, static_cast<float>(-tokens));
  }
  return out;
}

// These tokens of a layer, which are the next ones of these sequences.
void hand_in(ShadowRunner& runner, const ContextModel& model, int layer, const std::vector<int>& sequences,
             const std::vector<int>& tokens, uint64_t step) {
  const auto width = static_cast<size_t>(model.bundle.config().hidden_size);
  std::vector<float> rows;
  for (int token : tokens) {
    const auto* row = static_cast<const float*>(model.query(layer, token).hidden);
    rows.insert(rows.end(), row, row + width);
  }
  Query query;
  query.hidden = rows.data();
  query.tokens = static_cast<int>(tokens.size());
  runner.predict_async(layer, query, nullptr, step, sequences);
}

// A state that is there once it may be; until then the runner's thread waits in it.
struct Held : PendingBytes {
  Held(const void* state, std::atomic<int>& turn) : state_(state), turn_(turn) {}
  const void* wait() override {
    turn_ = 1;
    while (turn_ == 1) std::this_thread::yield();
    return state_;
  }

 private:
  const void* state_;
  std::atomic<int>& turn_;
};

}  // namespace

TEST_CASE("a batch's rows have each its own context, and no sequence can tell whether it was in one") {
  const ContextModel model;
  std::map<uint64_t, Demands> found;
  ShadowRunner runner(model.layers(), model.bundle.layers, {0, 512}, nullptr, [&](const PredictionRecord& r) {
    CHECK(r.batch);
    found[r.step][{r.source_layer, r.target_layer}] = demand_of(r);
  });
  // What each says alone, every other pass, beside a runner that knows no batches.
  using Alone = std::map<std::tuple<uint64_t, int, int>, Demand>;
  Alone alone, always_alone;
  const auto keeping = [](Alone& in) {
    return [&](const PredictionRecord& r) {
      CHECK(!r.batch);
      in[{r.step, r.source_layer, r.target_layer}] = demand_of(r);
    };
  };
  ShadowRunner mixed(model.layers(), model.bundle.layers, {0, 512}, nullptr, [&](const PredictionRecord& r) {
    if (!r.batch) keeping(alone)(r);
  });
  ShadowRunner single(model.layers(), model.bundle.layers, {0, 512}, nullptr, keeping(always_alone));

  std::map<int, std::vector<int>> texts;
  std::map<uint64_t, std::vector<std::vector<int>>> passes;
  std::mt19937 generator(5);
  int token = 0;
  uint64_t step = 0;
  for (int round = 0; round < 40; ++round) {
    const int changed = static_cast<int>(generator() % 5);
    std::vector<int>& text = texts[changed];
    const auto change = [&](auto act) {
      for (ShadowRunner* r : {&runner, &mixed, &single}) act(*r);
    };
    switch (generator() % 6) {
      case 0: {
        const size_t n = std::min<size_t>(generator() % 3, text.size());
        change([&](ShadowRunner& r) { r.trim(changed, static_cast<int64_t>(n)); });
        text.resize(text.size() - n);
        break;
      }
      case 1:
        change([&](ShadowRunner& r) { r.fork(changed, (changed + 1) % 5); });
        texts[(changed + 1) % 5] = std::vector<int>(text);
        break;
      case 2:
        if (generator() % 2 > 0) break;
        change([&](ShadowRunner& r) { r.reset(changed); });
        text.clear();
        break;
      default:
        break;
    }
    std::vector<int> sequences = {0, 1, 2, 3, 4};
    std::ranges::shuffle(sequences, generator);
    sequences.resize(2 + generator() % 4);
    std::vector<int> tokens(sequences.size());
    std::iota(tokens.begin(), tokens.end(), token);
    token += static_cast<int>(tokens.size());
    ++step;
    for (size_t i = 0; i < tokens.size(); ++i) {
      texts[sequences[i]].push_back(tokens[i]);
      passes[step].push_back(texts[sequences[i]]);
    }
    for (int layer : model.bundle.layers) {
      hand_in(runner, model, layer, sequences, tokens, step);
      if (round % 2 == 0) hand_in(mixed, model, layer, sequences, tokens, 10 * step);
    }
    for (size_t i = 0; i < tokens.size(); ++i) {
      for (ShadowRunner* r : {&mixed, &single}) {
        if (r == &mixed && round % 2 == 0) continue;
        for (int layer : model.bundle.layers) {
          if (i % 2 == 0) {
            hand_in(*r, model, layer, {sequences[i]}, {tokens[i]}, 10 * step + i);
          } else {
            r->predict_async(layer, model.query(layer, tokens[i]), nullptr, 10 * step + i, sequences[i]);
          }
        }
        settle(*r);
      }
    }
    if (round % 3 > 0) settle(runner);  // else it is over when the thread comes to it, and observed all the same
  }
  for (ShadowRunner* r : {&runner, &mixed, &single}) {
    settle(*r);
    r->close();
    CHECK(r->statistics().dropped + r->statistics().failed == 0);
  }
  CHECK(found.size() >= 26);
  for (const auto& [at, demands] : found) {
    CAPTURE(at);
    const Demands expected = united(model, passes.at(at));
    for (const auto& [layers, demand] : demands) CHECK(demand == expected.at(layers));
  }
  CHECK(alone.size() >= 20 * 5 * 2);
  for (const auto& [key, demand] : alone) CHECK(demand == always_alone.at(key));
}

TEST_CASE("a batch may be larger than what a forward takes, its texts of any length or none") {
  const ContextModel model;
  std::map<uint64_t, Demands> found;
  ShadowRunner runner(model.layers(), model.bundle.layers, {0, 512}, nullptr, [&](const PredictionRecord& r) {
    found[r.step][{r.source_layer, r.target_layer}] = demand_of(r);
  });
  std::map<uint64_t, Demands> expected;
  std::vector<std::vector<int>> texts(150);
  for (uint64_t step = 0; step < 14; ++step) {
    std::vector<int> sequences, tokens;
    std::vector<std::vector<int>> of;
    for (int s = 149; s >= 0; --s) {
      if (step < 13 && (s + static_cast<int>(step)) % 5 > s % 3) continue;  // alone or not there at all
      sequences.push_back(s);
      tokens.push_back((s * 7 + static_cast<int>(step) * 31) % 300);
      texts[static_cast<size_t>(s)].push_back(tokens.back());
      of.push_back(texts[static_cast<size_t>(s)]);
    }
    for (int layer : model.bundle.layers) hand_in(runner, model, layer, sequences, tokens, step);
    settle(runner);
    if (step % 4 == 1) expected[step] = united(model, of);
  }
  runner.close();
  for (const auto& [step, demands] : expected) CHECK(found.at(step) == demands);
  CHECK(runner.statistics().failed == 0);
}

TEST_CASE("what a batch can't be is refused, and nothing of it is taken") {
  const ContextModel model;
  std::map<uint64_t, Demands> found;
  ShadowRunner runner(model.layers(), model.bundle.layers, {0, 512}, nullptr, [&](const PredictionRecord& r) {
    found[r.step][{r.source_layer, r.target_layer}] = demand_of(r);
  });
  for (int layer : model.bundle.layers) hand_in(runner, model, layer, {3, 8}, {0, 1}, 1);
  CHECK_THROWS_WITH_AS(hand_in(runner, model, 1, {3, 8, 3}, {2, 3, 4}, 2),
                       "[ShadowRunner] a batch's sequences must be distinct, got 3 twice", std::invalid_argument);
  CHECK_THROWS_WITH_AS(hand_in(runner, model, 1, {3, 8}, {2}, 2),
                       "[ShadowRunner] a batch has one token of each sequence, got 1 tokens of 2 sequences",
                       std::invalid_argument);
  Query prompt = model.query(1, 10);
  prompt.tokens = 4;
  runner.predict_async(1, prompt, nullptr, 3, 7);
  CHECK_THROWS_WITH_AS(hand_in(runner, model, 3, {3, 7}, {2, 3}, 3),
                       "[ShadowRunner] a forward pass has as many tokens at each layer, got 1 at layer 3 after 4, in "
                       "sequence 7",
                       std::invalid_argument);
  for (int layer : model.bundle.layers) hand_in(runner, model, layer, {8, 3}, {5, 6}, 4);
  settle(runner);
  runner.close();
  CHECK(found.at(4) == united(model, {{1, 5}, {0, 6}}));
}

TEST_CASE("what fails or is dropped leaves a gap in its own rows alone") {
  ContextModel model;
  std::map<uint64_t, Demands> found;
  ShadowRunner runner(model.layers(), model.bundle.layers, {0, 1}, nullptr, [&](const PredictionRecord& r) {
    found[r.step][{r.source_layer, r.target_layer}] = demand_of(r);
  });
  std::vector<std::vector<int>> texts(3);
  const auto pass = [&](uint64_t step, const std::vector<int>& layers, const std::vector<int>& sequences) {
    std::vector<int> tokens;
    for (int s : sequences) tokens.push_back(static_cast<int>(step) * 3 + s);
    for (int layer : layers) {
      hand_in(runner, model, layer, sequences, tokens, step);
      settle(runner);
    }
    for (int s : sequences) {
      if (layers.back() == RandomBundle::kLast) texts[static_cast<size_t>(s)].push_back(static_cast<int>(step) * 3 + s);
    }
  };
  pass(0, model.bundle.layers, {0, 1, 2});
  pass(1, model.bundle.layers, {0, 1, 2});

  // The batch of 0 and 1 waits for room at layer 3 while the thread does for a state of another; 2 takes its place.
  pass(2, {1}, {0, 1});
  std::atomic<int> turn{0};
  Query held = model.query(3, 290);
  runner.predict_async(3, held, std::make_unique<Held>(held.hidden, turn), 2, 9);
  while (turn == 0) std::this_thread::yield();
  hand_in(runner, model, 3, {0, 1}, {6, 7}, 2);
  hand_in(runner, model, 1, {2}, {8}, 2);
  turn = 2;
  settle(runner);
  CHECK(runner.statistics().dropped == 1);
  pass(2, {4, 6}, {0, 1});
  pass(2, {3, 4, 6}, {2});
  std::vector<Gaps> gaps = {{{3, 2}}, {{3, 2}}, {}};
  pass(3, model.bundle.layers, {0, 1, 2});
  const Demands after_drop = united(model, texts, gaps);

  // Of a batch that fails for one row the others are observed.
  const auto width = static_cast<size_t>(model.bundle.config().hidden_size);
  float& bad = model.states.at(4)[(4 * 3 + 1) * width];
  const float good = std::exchange(bad, std::numeric_limits<float>::infinity());
  pass(4, {1, 3, 4}, {0, 1, 2});
  CHECK_THROWS_WITH_AS(runner.check(), "[NativePredictor] the hidden state of token 1 is not finite",
                       std::invalid_argument);
  runner.check();  // told once
  pass(4, {6}, {0, 1, 2});
  bad = good;
  CHECK(runner.statistics().failed == 1);
  gaps[1].insert({4, 4});
  std::map<uint64_t, Demands> expected = {{3, after_drop}};
  for (uint64_t step = 5; step < 12; ++step) {
    pass(step, model.bundle.layers, {0, 1, 2});
    expected[step] = united(model, texts, gaps);
  }
  runner.close();
  for (const auto& [step, demands] : expected) CHECK(found.at(step) == demands);
}
