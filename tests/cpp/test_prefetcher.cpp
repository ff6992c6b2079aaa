#include "mlx_od_moe/prefetcher.h"

#include <doctest/doctest.h>

#include <memory>
#include <thread>
#include <vector>

#include "store_rig.h"

using namespace mlx_od_moe;
using namespace mlx_od_moe::tests;

namespace {

// Layers 1 and 3 of eight experts, two slots each.
struct PrefetcherRig : Rig {
  explicit PrefetcherRig(PrefetcherOptions options = {}) : Rig(2) {
    prefetcher = std::make_unique<Prefetcher>(std::shared_ptr<ExpertStore>(std::shared_ptr<void>(), store.get()), queue,
                                              std::move(options));
  }

  // What a predictor says of layer 3, likeliest first.
  static PredictionRecord record_of(const Ids& ids, uint64_t step, float logit, int distance = 1, bool batch = false) {
    PredictionRecord record;
    record.step = step;
    record.source_layer = 1;
    record.target_layer = 3;
    record.distance = static_cast<uint8_t>(distance);
    record.count = static_cast<uint8_t>(ids.size());
    record.batch = batch;
    for (size_t i = 0; i < ids.size(); ++i) {
      record.ids[i] = static_cast<int16_t>(ids[i]);
      record.scores[i] = logit;
    }
    return record;
  }
  void predict(const Ids& ids, uint64_t step, float logit = 3, int distance = 1, bool batch = false) {
    queue->try_push(record_of(ids, step, logit, distance, batch));
    prefetcher->drain();
  }
  PredictionRecall recall(int distance = 1) const {
    for (const PredictionRecall& r : prefetcher->recalls()) {
      if (r.layer == 3 && r.distance == distance) return r;
    }
    return {};
  }

  std::shared_ptr<PredictionQueue> queue = std::make_shared<PredictionQueue>(16);
  std::unique_ptr<Prefetcher> prefetcher;
};

}  // namespace

TEST_CASE("what is predicted is read, and judged when its layer has chosen") {
  PrefetcherRig rig;
  rig.use(3, {0});
  rig.predict({4, 0, 5}, 0);
  rig.settle(1);  // there are two slots, and none for the third
  rig.prefetcher->reached(3, Ids{4, 0, 4, 7}, 0);
  const PredictionRecall r = rig.recall();
  CHECK(r.predictions == 1);
  CHECK(r.chosen == 3);
  CHECK(r.named == 2);
  CHECK(r.useful == 1);  // 4: 0 was there
  CHECK(r.wasted == 1);  // 5
  CHECK(rig.recall(2).predictions == 0);
  rig.prefetcher->reached(3, Ids{4}, 0);
  CHECK(rig.recall().predictions == 1);
}

TEST_CASE("what is unlikely is neither read nor judged") {
  PrefetcherRig rig;
  rig.predict({4}, 0, -6);
  CHECK(rig.store->counters().accepted == 0);
  rig.predict({4}, 0, 0);  // a probability of a half
  rig.settle();
  CHECK(rig.resident(3) == Ids{4});
  rig.predict({5}, 0, 0, 1, true);  // no token wants it
  rig.settle();
  CHECK(rig.resident(3) == Ids{4});
  rig.predict({5}, 0, 1, 1, true);  // one does
  CHECK(rig.store->counters().accepted == 2);
}

TEST_CASE("a prediction of an earlier step is not judged") {
  PrefetcherRig rig;
  rig.predict({4}, 1);
  rig.prefetcher->reached(3, Ids{4}, 2);
  CHECK(rig.recall().predictions == 0);
}

TEST_CASE("what the next token will choose is read at once, and judged when it has chosen") {
  PrefetcherRig rig;
  rig.prefetcher->take_next(PrefetcherRig::record_of({4, 5}, 0, 3));
  rig.settle();
  rig.prefetcher->reached(3, Ids{6}, 0);
  CHECK(rig.recall(0).predictions == 0);
  rig.prefetcher->reached(3, Ids{4, 7}, 1);
  CHECK(rig.recall(0).predictions == 1);
  CHECK(rig.recall(0).named == 1);
  CHECK(rig.recall(0).useful == 1);
  CHECK(rig.recall(0).wasted == 1);
  CHECK(rig.recall().predictions == 0);
}

TEST_CASE("of the next token only what is likely enough is named") {
  PrefetcherRig rig;
  rig.prefetcher->take_next(PrefetcherRig::record_of({4}, 0, -1));  // .27
  rig.prefetcher->reached(3, Ids{4}, 1);
  CHECK(rig.recall(0).predictions == 1);
  CHECK(rig.recall(0).named == 0);
  CHECK(rig.store->counters().accepted == 0);
}

TEST_CASE("what comes when the next token has begun is not read") {
  PrefetcherRig rig;
  rig.store->cancel(1);
  rig.prefetcher->take_next(PrefetcherRig::record_of({4}, 0, 3));
  CHECK(rig.store->counters().accepted == 0);
}

TEST_CASE("predictions that waste cause no reads until they are right again") {
  PrefetcherOptions options;
  options.evidence = 8;
  options.memory = .9f;
  PrefetcherRig rig(options);
  uint64_t step = 0;
  const auto pass = [&](const Ids& predicted, const Ids& chosen) {
    rig.store->cancel(++step);
    rig.predict(predicted, step);
    rig.prefetcher->reached(3, chosen, step);
    rig.use(3, {6, 7});  // whatever was prefetched has gone
  };
  for (int i = 0; i < 10; ++i) pass({1, 2}, {3, 4});
  CHECK_FALSE(rig.recall().on);
  std::vector<PrefetchChange> changes = rig.prefetcher->take_changes();
  REQUIRE(changes.size() == 1);
  CHECK(changes[0].layer == 3);
  CHECK(changes[0].distance == 1);
  CHECK_FALSE(changes[0].on);
  const uint64_t accepted = rig.store->counters().accepted;
  for (int i = 0; i < 10; ++i) pass({3, 4}, {3, 4});
  CHECK(rig.recall().on);
  CHECK(rig.prefetcher->take_changes().size() == 1);
  CHECK(rig.prefetcher->take_changes().empty());
  CHECK(rig.store->counters().accepted > accepted);
}

TEST_CASE("what does not exist is refused") {
  PrefetcherRig rig;
  CHECK_THROWS_WITH_AS(rig.predict({8}, 0), "[Prefetcher] layer 3: expert ids must be 0 ... 7, got 8",
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(rig.prefetcher->reached(2, Ids{1}, 0), "[Prefetcher] layer 2 has no experts in the store",
                       std::invalid_argument);
  CHECK_THROWS_AS(rig.prefetcher->reached(3, Ids{-1}, 0), std::invalid_argument);
  PrefetcherOptions options;
  options.pays = .5f;
  CHECK_THROWS_AS(PrefetcherRig{options}, std::invalid_argument);
}

TEST_CASE("threads predict, choose and look at once") {
  PrefetcherRig rig;
  std::thread predicting([&] {
    for (uint64_t step = 0; step < 300; ++step) rig.predict({static_cast<int32_t>(step % 8)}, step);
  });
  std::thread looking([&] {
    for (int i = 0; i < 300; ++i) CHECK(rig.prefetcher->recalls().size() == 10);
  });
  for (uint64_t step = 0; step < 300; ++step) {
    rig.store->cancel(step);
    rig.prefetcher->reached(3, Ids{static_cast<int32_t>(step % 8)}, step);
  }
  predicting.join();
  looking.join();
  CHECK(rig.prefetcher->uses(3)[0] == 38);
  CHECK(rig.prefetcher->uses(1)[0] == 0);
}
