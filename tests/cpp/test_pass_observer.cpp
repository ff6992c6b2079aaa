#include "mlx_od_moe/pass_observer.h"

#include <doctest/doctest.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <thread>
#include <vector>

#include "reference.h"
#include "store_rig.h"

using namespace mlx_od_moe;
using namespace mlx_od_moe::tests;

namespace {

using Layers = std::map<int, std::vector<int>>;

constexpr int kHidden = 12;

PredictorConfig config() {
  PredictorConfig c;
  c.hidden_size = kHidden;
  c.predictor_size = 8;
  c.num_experts = 8;
  c.lookahead = 1;
  c.top_k = 2;
  return c;
}

// Layers 1 and 3 of eight experts: token 5 chooses 6 and 2 at layer 1, any other 0 and 1.
struct ObserverRig : Rig {
  explicit ObserverRig(Layers previous_at = {}) : Rig(4) {
    const std::shared_ptr<ExpertStore> shared(std::shared_ptr<void>(), store.get());
    prefetcher = std::make_shared<Prefetcher>(shared, queue, PrefetcherOptions());
    runner = std::make_shared<ShadowRunner>(
        std::vector<LayerPredictor>{{1, Predictor(RandomPredictor(config(), 3).weights()), {3}}},
        std::vector<int>{1, 3});
    PassObserver::Parts parts;
    parts.store = shared;
    parts.queue = queue;
    parts.prefetcher = prefetcher;
    parts.runner = runner;
    parts.watched = {1};
    parts.tokens.emplace(std::vector<int32_t>{5}, std::vector<uint16_t>{6, 2, 0, 1},
                         std::vector<uint8_t>{250, 200, 250, 200}, std::vector<int>{1});
    parts.previous_at = std::move(previous_at);
    next = std::make_shared<ShadowRunner>(
        std::vector<LayerPredictor>{{0, Predictor(RandomPredictor(config(), 4).weights()), {1}}},
        std::vector<int>{0, 1});
    parts.next = {next, 3};
    observer = std::make_unique<PassObserver>(std::move(parts));
  }

  void observe(int layer, uint64_t step, float value = 1) {
    const std::vector<float> hidden(kHidden, value);
    Query query;
    query.hidden = hidden.data();
    query.tokens = 1;
    observer->observe(layer, Ids{0, 1}, step, &query);
  }

  std::shared_ptr<PredictionQueue> queue = std::make_shared<PredictionQueue>(16);
  std::shared_ptr<Prefetcher> prefetcher;
  std::shared_ptr<ShadowRunner> runner, next;
  std::unique_ptr<PassObserver> observer;
};

}  // namespace

TEST_CASE("a token's experts are read once the token is known") {
  ObserverRig rig;
  rig.observer->begin(Ids{5}, 1);
  rig.settle();
  CHECK(rig.resident(1) == Ids{2, 6});
  CHECK(rig.store->step() == 1);
  rig.observer->begin(Ids{77}, 2);
  rig.settle();
  CHECK(rig.resident(1) == Ids{0, 1, 2, 6});
  rig.observer->begin(Ids{5}, 1);  // computed late: steps do not go back
  CHECK(rig.store->step() == 2);
}

TEST_CASE("of several tokens what more of them want comes first") {
  const TokenExperts table({5, 9}, {6, 2, 6, 3, 0, 1}, {100, 200, 110, 40, 250, 200}, {4});
  const PredictionRecord record = table.predict(std::vector<int32_t>{5, 9}, 8).at(0);
  CHECK(record.batch);
  CHECK(record.step == 8);
  CHECK(record.target_layer == 4);
  CHECK(record.distance == 1);
  REQUIRE(record.count == 3);
  CHECK(std::vector<int>(record.ids, record.ids + 3) == std::vector<int>{6, 2, 3});
  CHECK(record.scores[0] == doctest::Approx(210.0 / 255));
  const PredictionRecord one = table.predict(std::vector<int32_t>{5}, 8).at(0);
  CHECK(!one.batch);
  CHECK(1 / (1 + std::exp(-one.scores[1])) == doctest::Approx(200.0 / 255));
  CHECK_THROWS_WITH_AS(TokenExperts({5}, {1, 2, 3}, {1, 2, 3}, {4}),
                       "[TokenExperts] experts and probabilities must be [tokens + 1, layers, width], got 3 and 3 for "
                       "1 tokens and 1 layers",
                       std::invalid_argument);
}

TEST_CASE("states are predicted from, and what has no state is missed") {
  ObserverRig rig;
  rig.observe(1, 1);
  CHECK(rig.runner->get_predictions(3, ShadowRunner::Clock::time_point::max()).size() == 2);
  CHECK(rig.runner->statistics().submitted == 1);
  rig.observe(3, 1);  // not watched
  CHECK(!rig.observer->take_missed());
  rig.observer->observe(1, Ids{4}, 2);
  CHECK(rig.runner->statistics().submitted == 1);
  CHECK(rig.prefetcher->uses(1) == std::vector<uint64_t>{1, 1, 0, 0, 1, 0, 0, 0});
  CHECK(rig.observer->take_missed());
  CHECK(!rig.observer->take_missed());
  rig.observe(1, 3);
  rig.observe(1, 2);  // older than what the runner has seen
  CHECK(rig.runner->statistics().submitted == 2);
  CHECK(rig.observer->take_missed());
}

TEST_CASE("the last layer's states are predicted from for the next token") {
  ObserverRig rig;
  rig.observe(1, 4);
  CHECK(rig.next->statistics().submitted == 0);
  rig.observe(3, 4);
  CHECK(rig.next->get_predictions(1, Parking::kForever).size() == 2);
  CHECK(rig.next->step() == 4);
  rig.observer->observe(3, Ids{0, 1}, 5);
  rig.observe(3, 3);  // an earlier pass, computed late
  CHECK(rig.next->statistics().submitted == 1);
  rig.next->close();
  rig.observe(3, 6);
  CHECK(rig.observer->take_error() == "the next token: [ShadowRunner] is closed");
}

TEST_CASE("what was chosen before is known of all layers, of as many sequences, or not at all") {
  ObserverRig rig(Layers{{1, {3}}, {0, {1, 3}}});
  CHECK(rig.observer->previous(1, 1).empty());
  rig.observer->remember(3, Ids{4, 5, 6, 7}, 2);
  CHECK(rig.observer->previous(1, 2) == Ids{4, 5, 6, 7});
  CHECK(rig.observer->previous(1, 1).empty());
  CHECK(rig.observer->previous(0, 2).empty());
  rig.observer->remember(1, Ids{0, 1, 2, 3}, 2);
  CHECK(rig.observer->previous(0, 2) == Ids{0, 1, 4, 5, 2, 3, 6, 7});
  CHECK(rig.observer->previous(7, 2).empty());
  rig.observe(3, 1);
  CHECK(rig.observer->previous(1, 1) == Ids{0, 1});
  rig.observer->miss();
  CHECK(rig.observer->previous(1, 1).empty());
}

TEST_CASE("a state that cannot be predicted from ends predicting, and says so once") {
  ObserverRig rig;
  rig.observe(1, 1, std::numeric_limits<float>::quiet_NaN());
  rig.runner->get_predictions(3, ShadowRunner::Clock::time_point::max());
  rig.observe(1, 2);
  const std::optional<std::string> error = rig.observer->take_error();
  REQUIRE(error);
  CHECK(error->starts_with("layer 1: "));
  CHECK(!rig.observer->take_error());
  rig.observe(1, 3);
  rig.observer->begin(Ids{5}, 3);
  CHECK(rig.runner->statistics().submitted == 1);
  CHECK(rig.resident(1).empty());
  CHECK(rig.prefetcher->uses(1)[0] == 3);  // what was chosen still counts
}

TEST_CASE("after close it holds nothing, and nobody is told") {
  ObserverRig rig;
  rig.observer->close();
  CHECK(rig.runner.use_count() == 1);
  CHECK(rig.prefetcher.use_count() == 1);
  rig.observe(1, 1);
  rig.observer->begin(Ids{5}, 1);
  CHECK(rig.runner->statistics().submitted == 0);
  CHECK(rig.resident(1).empty());
}

TEST_CASE("one thread computes while others ask, and it is closed meanwhile") {
  ObserverRig rig(Layers{{1, {3}}});
  std::atomic<bool> done{false};
  std::thread asks([&] {
    while (!done) {
      rig.observer->take_missed();
      rig.observer->take_error();
      rig.observer->previous(1, 1);
      rig.observer->remember(3, Ids{1, 2}, 1);
      rig.prefetcher->recalls();
    }
  });
  std::thread computes([&] {
    for (uint64_t step = 1; step <= 300; ++step) {
      rig.observer->begin(Ids{5}, step);
      for (int layer : {1, 3}) {
        rig.observe(layer, step);
        rig.use(layer, {0, 1});
      }
      if (step == 200) rig.observer->close();
    }
  });
  computes.join();
  done = true;
  asks.join();
  rig.runner->close();
  CHECK(rig.runner->statistics().submitted == 200);
  CHECK(rig.prefetcher->uses(1)[0] == 200);
  check_identities(rig.store->counters());
}
