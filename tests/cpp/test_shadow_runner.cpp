#include "mlx_od_moe/shadow_runner.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <future>
#include <map>
#include <thread>

#include "mlx_od_moe/latency_histogram.h"
#include "reference.h"

using namespace mlx_od_moe;
using namespace mlx_od_moe::tests;
using std::chrono::milliseconds;

namespace {

constexpr int kHidden = 64;
constexpr int kExperts = 24;
constexpr int kLookahead = 2;
constexpr int kTopK = 4;
const std::vector<int> kLayers = {1, 3, 5, 6};

PredictorConfig small() {
  PredictorConfig c;
  c.hidden_size = kHidden;
  c.predictor_size = 32;
  c.num_experts = kExperts;
  c.lookahead = kLookahead;
  c.top_k = kTopK;
  return c;
}

struct Model {
  RandomPredictor random{small(), 7};
  Predictor predictor{random.weights(), {Format::f32, 1, 64}};

  // Layers 1 and 3 predict two layers ahead, 5 one, 6 none.
  std::vector<LayerPredictor> layers() const {
    return {{1, predictor, {3, 5}}, {3, predictor, {5, 6}}, {5, predictor, {6}}};
  }
  std::vector<float> state(int tokens = 1) { return random.values(static_cast<size_t>(kHidden * tokens), 1); }

  std::vector<int> expected(const std::vector<float>& state, size_t distance) const {
    std::vector<int32_t> ids(kLookahead * kTopK);
    predictor.predict(query(state), kTopK, ids.data());
    const auto first = ids.begin() + static_cast<std::ptrdiff_t>((distance - 1) * kTopK);
    return {first, first + kTopK};
  }

  static Query query(const std::vector<float>& state) {
    Query q;
    q.hidden = state.data();
    q.tokens = static_cast<int>(state.size()) / kHidden;
    return q;
  }
};

// Keeps a runner's thread waiting for a hidden state until the test says so.
class Gate {
 public:
  // Submits the state and returns once the thread waits for it.
  Gate(ShadowRunner& runner, int layer, const std::vector<float>& state) {
    Query query = Model::query(state);
    query.hidden = nullptr;
    auto bytes = std::make_unique<Bytes>();
    bytes->state = state;
    bytes->opened = open_.get_future();
    const std::future<void> entered = bytes->entered.get_future();
    runner.predict_async(layer, query, std::move(bytes), runner.step());
    entered.wait();
  }
  void open() { open_.set_value(); }

 private:
  struct Bytes : PendingBytes {
    const void* wait() override {
      entered.set_value();
      opened.wait();
      return state.data();
    }
    std::vector<float> state;
    std::promise<void> entered;
    std::future<void> opened;
  };
  std::promise<void> open_;
};

ShadowRunner::Clock::time_point soon() { return ShadowRunner::Clock::now() + std::chrono::seconds(20); }

std::vector<int> ids(const std::vector<ScoredExpert>& experts) {
  std::vector<int> out;
  for (const ScoredExpert& e : experts) out.push_back(e.id);
  return out;
}

std::vector<int> waited(const ShadowRunner& runner, int layer) { return ids(runner.get_predictions(layer, soon())); }

void check_identity(const RunnerStatistics& s) {
  CHECK(s.submitted == s.predicted + s.dropped + s.expired + s.failed + s.waiting);
}

}  // namespace

TEST_CASE("a prediction comes out by layer, by queue and by callback, as the predictor makes it") {
  Model model;
  std::vector<PredictionRecord> called;
  ShadowRunner runner(model.layers(), kLayers, {}, nullptr, [&](const PredictionRecord& r) { called.push_back(r); });
  const std::vector<float> x = model.state();
  CHECK(runner.predict_async(3, Model::query(x)) == 0);
  CHECK(waited(runner, 5) == model.expected(x, 1));
  CHECK(waited(runner, 6) == model.expected(x, 2));
  CHECK(waited(runner, 3).empty());
  const auto queue = runner.queue();
  runner.close();
  std::vector<PredictionRecord> popped;
  for (PredictionRecord r; queue->wait_pop(r);) popped.push_back(r);
  REQUIRE(popped.size() == 2);
  REQUIRE(called.size() == 2);
  std::vector<float> logits(kLookahead * kExperts);
  model.predictor.logits(Model::query(x), logits.data());
  for (size_t d = 0; d < 2; ++d) {
    const PredictionRecord& r = popped[d];
    CHECK(r.source_layer == 3);
    CHECK(r.target_layer == (d == 0 ? 5 : 6));
    CHECK(r.distance == d + 1);
    CHECK(r.count == kTopK);
    CHECK_FALSE(r.batch);
    CHECK(std::vector<int>(r.ids, r.ids + r.count) == model.expected(x, d + 1));
    CHECK(r.scores[0] == logits[d * kExperts + static_cast<size_t>(r.ids[0])]);
    CHECK(std::equal(r.ids, r.ids + r.count, called[d].ids));
  }
}

TEST_CASE("the newest prediction of a layer wins, and a new step forgets all") {
  Model model;
  ShadowRunner runner(model.layers(), kLayers);
  const std::vector<float> x = model.state(), y = model.state();
  runner.predict_async(1, Model::query(x));
  CHECK(waited(runner, 5) == model.expected(x, 2));
  CHECK(runner.predict_async(3, Model::query(y)) == 0);
  CHECK(waited(runner, 5) == model.expected(y, 1));
  CHECK(waited(runner, 3) == model.expected(x, 1));
  CHECK(runner.predict_async(5, Model::query(y)) == 0);
  CHECK(runner.predict_async(1, Model::query(y)) == 1);  // not after the last one: the next pass
  CHECK(waited(runner, 3) == model.expected(y, 1));
  CHECK(waited(runner, 6).empty());
  CHECK(runner.predict_async(3, Model::query(y), nullptr, 7) == 7);
  CHECK(waited(runner, 3).empty());
  CHECK(runner.queue()->step() == 7);
  CHECK_THROWS_WITH_AS(runner.predict_async(3, Model::query(y), nullptr, 6), doctest::Contains("got 6 after 7"),
                       std::invalid_argument);
}

TEST_CASE("layers without a predictor are accepted, unknown ones refused by name") {
  Model model;
  ShadowRunner runner(model.layers(), kLayers);
  const std::vector<float> x = model.state();
  CHECK(runner.predict_async(6, Model::query(x)) == 0);
  CHECK(runner.predict_async(1, Model::query(x)) == 1);  // the last layer counts for the steps
  CHECK(runner.statistics().submitted == 1);
  CHECK(runner.predictor(6) == nullptr);
  CHECK(runner.predictor(1) != nullptr);
  for (const int layer : {-1, 0, 2, 7}) {
    CHECK_THROWS_WITH_AS(runner.predict_async(layer, Model::query(x)), doctest::Contains("[1, 3, 5, 6], got"),
                         std::invalid_argument);
    CHECK_THROWS_AS(runner.get_predictions(layer), std::invalid_argument);
  }
}

TEST_CASE("previous experts and context reach the predictor") {
  PredictorConfig c = small();
  c.previous_experts = true;
  RandomPredictor random(c, 9);
  const Predictor predictor(random.weights(), {Format::f32, 1, 64});
  ShadowRunner runner({{0, predictor, {1, 2}}}, {0, 1, 2});
  const std::vector<float> x = random.values(kHidden, 1);
  std::vector<int32_t> previous = {3, 9, 17, -1};  // two per distance
  std::vector<float> context = random.values(32, 2);
  Query query = Model::query(x);
  query.previous = previous.data();
  query.num_previous = 2;
  query.context = context.data();
  std::vector<int32_t> expected(kLookahead * kTopK), without(kLookahead * kTopK);
  predictor.predict(query, kTopK, expected.data());
  predictor.predict(Model::query(x), kTopK, without.data());
  REQUIRE(expected != without);
  runner.predict_async(0, query);
  previous.assign(4, 0);  // the runner has copied them
  context.assign(32, 0);
  CHECK(waited(runner, 1) == std::vector<int>(expected.begin(), expected.begin() + kTopK));
  CHECK(waited(runner, 2) == std::vector<int>(expected.begin() + kTopK, expected.end()));
}

TEST_CASE("several tokens give the union of what they want, most wanted first") {
  Model model;
  ShadowRunner runner(model.layers(), kLayers, {6, 8});
  for (const int tokens : {2, 64, 150}) {
    const std::vector<float> x = model.state(tokens);
    std::vector<int32_t> each(static_cast<size_t>(tokens * kLookahead * 6));
    model.predictor.predict(Model::query(x), 6, each.data());
    std::map<int, int> wanted;
    for (size_t i = 0; i < each.size(); ++i) wanted[each[i]] += i / 6 % kLookahead == 1;
    std::erase_if(wanted, [](const auto& entry) { return entry.second == 0; });
    runner.predict_async(1, Model::query(x));
    const std::vector<ScoredExpert> got = runner.get_predictions(5, soon());
    CHECK(got.size() == wanted.size());
    for (const ScoredExpert& e : got) CHECK(static_cast<int>(e.score) == wanted[e.id]);
    CHECK(std::is_sorted(got.begin(), got.end(), [](const auto& a, const auto& b) { return a.score > b.score; }));
    std::vector<int> queued;
    for (PredictionRecord r; runner.queue()->try_pop(r);) {
      CHECK(r.batch);
      if (r.target_layer != 5) continue;
      CHECK(static_cast<size_t>(r.part) * PredictionRecord::kMaxIds == queued.size());
      queued.insert(queued.end(), r.ids, r.ids + r.count);
    }
    CHECK(queued == ids(got));
  }
}

TEST_CASE("of experts wanted by equally many, the one that a token ranks higher comes first") {
  Model model;
  ShadowRunner runner(model.layers(), kLayers);
  std::vector<float> x = model.state();
  const std::vector<int> alone = model.expected(x, 1);
  x.insert(x.end(), x.begin(), x.begin() + kHidden);  // the same token twice
  runner.predict_async(1, Model::query(x));
  CHECK(waited(runner, 3) == alone);
}

TEST_CASE("a runner that falls behind drops the oldest states, and says so") {
  Model model;
  ShadowRunner runner(model.layers(), kLayers, {0, 2});
  std::vector<std::vector<float>> later;
  Gate gate(runner, 1, model.state());
  for (int i = 0; i < 6; ++i) {
    later.push_back(model.state());
    runner.predict_async(1, Model::query(later.back()), nullptr, 0);
  }
  CHECK(runner.get_predictions(3).empty());  // does not wait
  CHECK(runner.statistics().dropped == 4);
  gate.open();
  CHECK(waited(runner, 3) == model.expected(later.back(), 1));
  check_identity(runner.statistics());
  CHECK(runner.statistics().waiting == 0);
}

TEST_CASE("states whose step is over are not predicted, and waiting for them ends") {
  Model model;
  ShadowRunner runner(model.layers(), kLayers);
  const std::vector<float> x = model.state(), y = model.state();
  Gate gate(runner, 1, x);
  runner.predict_async(3, Model::query(x), nullptr, 0);
  runner.predict_async(1, Model::query(y), nullptr, 1);
  bool settled = true;
  CHECK(runner.get_predictions(5, ShadowRunner::Clock::now() + milliseconds(1), &settled).empty());
  CHECK_FALSE(settled);
  gate.open();
  CHECK(waited(runner, 3) == model.expected(y, 1));
  CHECK(waited(runner, 6).empty());
  const RunnerStatistics s = runner.statistics();
  CHECK(s.expired == 2);
  CHECK(s.predicted == 1);
  CHECK(runner.queue()->statistics().pushed == 2);
}

TEST_CASE("what fails on the thread is thrown by later calls, in order, and the runner goes on") {
  Model model;
  std::atomic<int> calls{0};
  ShadowRunner runner(model.layers(), kLayers, {}, nullptr, [&](const PredictionRecord&) {
    if (++calls == 1) throw std::runtime_error("from the callback");
  });
  std::vector<float> x = model.state();
  const std::vector<float> good = x;
  x[3] = NAN;
  Gate gate(runner, 1, x);  // else the second call may throw what the first one did
  runner.predict_async(1, Model::query(good), nullptr, 0);
  gate.open();
  while (runner.statistics().errors < 2) std::this_thread::yield();
  CHECK_THROWS_WITH_AS(runner.predict_async(1, Model::query(good)), doctest::Contains("not finite"),
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(runner.get_predictions(3), "from the callback", std::runtime_error);
  CHECK(waited(runner, 3) == model.expected(good, 1));
  CHECK(runner.statistics().failed == 1);
  CHECK(runner.statistics().submitted == 2);
}

TEST_CASE("closing drops what waits, ends the queue, and wakes who waits") {
  Model model;
  ShadowRunner runner(model.layers(), kLayers, {0, 4});
  const std::vector<float> x = model.state();
  Gate gate(runner, 1, x);
  runner.predict_async(1, Model::query(x), nullptr, 0);
  std::thread consumer([queue = runner.queue()] {
    for (PredictionRecord r; queue->wait_pop(r);) continue;
  });
  std::thread waiter([&] { runner.get_predictions(3, ShadowRunner::Clock::time_point::max()); });
  std::thread closer([&] { runner.close(); });
  while (!runner.closed()) std::this_thread::yield();
  gate.open();
  closer.join();
  waiter.join();
  consumer.join();
  runner.close();
  CHECK(runner.statistics().waiting == 0);
  CHECK(runner.statistics().dropped == 1);
  CHECK_THROWS_WITH_AS(runner.predict_async(1, Model::query(x)), doctest::Contains("is closed"), std::runtime_error);
}

TEST_CASE("a queue that is given stays open, and serves several runners") {
  Model model;
  const auto queue = std::make_shared<PredictionQueue>(64);
  const std::vector<float> x = model.state();
  for (int i = 0; i < 2; ++i) {
    ShadowRunner runner(model.layers(), kLayers, {}, queue);
    CHECK(runner.queue() == queue);
    runner.predict_async(5, Model::query(x));
    CHECK(waited(runner, 6) == model.expected(x, 1));
  }
  CHECK_FALSE(queue->closed());
  CHECK(queue->statistics().pushed == 2);
}

TEST_CASE("a callback may wait for predictions, close its runner, and let go of it") {
  Model model;
  std::promise<std::vector<int>> seen;
  std::shared_ptr<ShadowRunner> runner;
  std::promise<void> made;
  runner = std::make_shared<ShadowRunner>(
      model.layers(), kLayers, RunnerOptions{}, nullptr,
      [&, once = false, ready = made.get_future().share()](const PredictionRecord& r) mutable {
        if (std::exchange(once, true)) return;
        ready.wait();
        const std::vector<int> found = waited(*runner, r.target_layer);
        runner->close();
        runner.reset();
        seen.set_value(found);
      });
  const std::vector<float> x = model.state();
  runner->predict_async(5, Model::query(x));
  made.set_value();
  CHECK(seen.get_future().get() == model.expected(x, 1));
}

TEST_CASE("impossible settings are refused with the rule and the value") {
  Model model;
  const auto make = [&](std::vector<int> moe_layers, RunnerOptions options) {
    ShadowRunner runner(model.layers(), std::move(moe_layers), options);
  };
  CHECK_THROWS_WITH_AS(make(kLayers, {25, 8}), doctest::Contains("k must be 1 ... 24, got 25"), std::invalid_argument);
  CHECK_THROWS_WITH_AS(make(kLayers, {0, 0}), doctest::Contains("got 0"), std::invalid_argument);
  CHECK_THROWS_WITH_AS(make({1, 3, 3}, {}), doctest::Contains("[1, 3, 3]"), std::invalid_argument);
  CHECK_THROWS_WITH_AS(make({1, 3, 5}, {}), doctest::Contains("got 6"), std::invalid_argument);
  CHECK_THROWS_AS(make({}, {}), std::invalid_argument);
  CHECK_THROWS_WITH_AS(ShadowRunner({{3, model.predictor, {1}}}, kLayers), doctest::Contains("after layer 3, got 1"),
                       std::invalid_argument);
}

TEST_CASE("threads that read while steps pass see whole predictions of a step that was current") {
  Model model;
  std::vector<std::vector<float>> states;
  std::vector<std::vector<int>> wanted;
  for (int i = 0; i < 4; ++i) {
    states.push_back(model.state());
    wanted.push_back(model.expected(states.back(), 1));
  }
  ShadowRunner runner(model.layers(), kLayers, {0, 2});
  std::atomic<bool> stop{false};
  std::atomic<int> wrong{0}, seen{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 2; ++t) {
    threads.emplace_back([&] {
      while (!stop.load()) {
        const uint64_t before = runner.step();
        const std::vector<int> got = ids(runner.get_predictions(3));
        if (got.empty() || runner.step() != before) continue;
        ++seen;
        wrong += got != wanted[before % wanted.size()];
      }
    });
  }
  threads.emplace_back([&] {
    for (PredictionRecord r; runner.queue()->wait_pop(r);) {
      if (r.distance != 1) continue;
      wrong += std::vector<int>(r.ids, r.ids + r.count) != wanted[r.step % wanted.size()];
    }
  });
  for (uint64_t step = 0; step < 2000 || (seen == 0 && step < 200000); ++step) {
    runner.predict_async(1, Model::query(states[step % states.size()]), nullptr, step);
    if (step % 3 == 0) waited(runner, 3);
    if (step % 30 == 0) std::this_thread::yield();
  }
  stop = true;
  runner.close();
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
  CHECK(seen > 0);
  check_identity(runner.statistics());
}

TEST_CASE("latencies: quantiles are within an eighth, from nanoseconds to hours") {
  for (const int64_t unit : {int64_t{1}, int64_t{1000}, int64_t{1000000000}, int64_t{3600} * 1000000000}) {
    LatencyHistogram histogram;
    CHECK(histogram.quantile(0.5) == 0);
    for (int64_t i = 1; i <= 1000; ++i) histogram.add(i * unit);
    CHECK(histogram.count() == 1000);
    for (const double share : {0.01, 0.5, 0.99}) {
      const double exact = share * 1000 * static_cast<double>(unit);
      const auto found = static_cast<double>(histogram.quantile(share));
      CHECK(found >= exact);
      CHECK(found <= (exact + static_cast<double>(unit)) * 1.125);
    }
  }
}
