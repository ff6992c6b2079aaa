// What is read ahead, in which order, and what it may displace.
#include <doctest/doctest.h>

#include <chrono>
#include <thread>
#include <utility>
#include <vector>

#include "mlx_od_moe/prefetch_policy.h"
#include "store_rig.h"

using namespace mlx_od_moe;
using namespace mlx_od_moe::tests;
using std::chrono::milliseconds;

TEST_CASE("what is predicted while a request waits for slots is read once") {
  Rig rig(2, 1);
  ExpertLease first = rig.acquire(1, {0, 1});
  ExpertLease second = rig.store->request(1, Ids{2});
  CHECK(rig.prefetch(1, {2}) == 1);
  first.release();
  CHECK(second.wait());
  rig.settle();
  CHECK(rig.disk->begun().size() == 3);
  CHECK(rig.store->counters().overtaken == 1);
  check_identities(rig.store->counters());
}

TEST_CASE("a prefetched expert is useful, an unused one wasted once it is evicted") {
  Rig rig(2);
  CHECK(rig.prefetch(1, {3, 4}) == 2);
  rig.settle();
  StoreCounters c = rig.store->counters();
  CHECK(c.prefetched == 2);
  CHECK(c.pending == 2);
  rig.use(1, {3});
  rig.use(1, {5, 6});
  c = rig.store->counters();
  CHECK(c.useful == 1);
  CHECK(c.wasted == 1);
  CHECK(c.pending == 0);
  CHECK(c.useful_bytes == PackedExperts::kBytes);
  CHECK(c.wasted_bytes == PackedExperts::kBytes);
  CHECK(c.prefetch_bytes == 2 * PackedExperts::kBytes);
  CHECK(c.demand_bytes == 2 * PackedExperts::kBytes);
  CHECK(c.non_resident_recall() == doctest::Approx(1.0 / 3));
  check_identities(c);
}

TEST_CASE("a prediction of what is resident, loading or queued costs no read") {
  Rig rig(4, 1);
  rig.use(1, {0});
  CHECK(rig.prefetch(1, {0}) == 0);
  rig.disk->shut();
  CHECK(rig.prefetch(1, {1, 2, 2}) == 2);
  rig.disk->wait_for_reads(2);
  CHECK(rig.prefetch(1, {1, 2}) == 0);
  rig.disk->open();
  rig.settle();
  CHECK(rig.disk->begun().size() == 3);
}

TEST_CASE("a lookup joins a prefetch in flight, and is late") {
  Rig rig;
  rig.disk->shut();
  rig.prefetch(1, {3});
  rig.disk->wait_for_reads(1);
  ExpertLease lease = rig.store->request(1, Ids{3});
  ExpertLease again = rig.store->request(1, Ids{3});
  CHECK_FALSE(lease.wait(Parking::Clock::now() + milliseconds(5)));
  rig.disk->open();
  CHECK(lease.wait());
  CHECK(again.wait());
  CHECK(rig.disk->begun().size() == 1);
  const StoreCounters c = rig.store->counters();
  CHECK(c.late == 1);
  CHECK(c.stalls >= 1);  // the second's may have been there before it was waited for
  CHECK(c.stall_ns >= 5000000);
  CHECK(c.misses == 1);  // the second joined what was a demand by then
  CHECK(c.useful_bytes == PackedExperts::kBytes);
  check_identities(c);
}

TEST_CASE("demand is read before prefetch, and overtakes what is queued") {
  Rig rig(4, 1);
  rig.disk->shut();
  rig.prefetch(1, {7});
  rig.disk->wait_for_reads(1);
  rig.prefetch(3, {0, 1, 2});
  ExpertLease lease = rig.store->request(3, Ids{2, 5});
  rig.disk->open();
  CHECK(lease.wait());
  CHECK(rig.disk->begun() == std::vector<std::pair<int, int>>{{1, 7}, {3, 2}, {3, 5}});
  const StoreCounters c = rig.store->counters();
  CHECK(c.overtaken == 1);
  CHECK(c.cancelled == 2);  // the layer's turn has come without them
  check_identities(c);
}

TEST_CASE("likely experts of soon layers are prefetched first, later steps last") {
  Rig rig(4, 1, {}, 4);  // layers 1, 3, 5, 7
  rig.use(3, {0});
  rig.disk->shut();
  rig.prefetch(7, {0});
  rig.disk->wait_for_reads(2);
  rig.prefetch(1, {1, 2});
  rig.prefetch(5, {3}, 1);
  rig.prefetch(7, {4, 5}, 0, {0.25F, 0.75F});
  rig.prefetch(5, {6});
  rig.disk->open();
  rig.settle();
  CHECK(rig.disk->begun() ==
        std::vector<std::pair<int, int>>{{3, 0}, {7, 0}, {5, 6}, {7, 5}, {1, 1}, {1, 2}, {7, 4}, {5, 3}});
}

TEST_CASE("a layer that has had its turn is due last, and a later step begins with the first layer") {
  Rig rig(4, 1, {}, 4);  // layers 1, 3, 5, 7
  rig.use(5, {0});
  rig.disk->shut();
  rig.prefetch(7, {0});
  rig.disk->wait_for_reads(2);
  rig.prefetch(7, {1}, 1);
  rig.prefetch(5, {2}, 1);
  rig.prefetch(1, {3}, 1);
  rig.prefetch(5, {4});
  rig.prefetch(3, {5});
  rig.prefetch(7, {6});
  rig.prefetch(1, {7});
  rig.disk->open();
  rig.settle();
  CHECK(rig.disk->begun() ==
        std::vector<std::pair<int, int>>{{5, 0}, {7, 0}, {7, 6}, {1, 7}, {3, 5}, {5, 4}, {1, 3}, {5, 2}, {7, 1}});
}

TEST_CASE("prefetches are read in the order in which PrefetchPolicy plans them") {
  // What the store calls 1, 3, 5, 7 is 0 ... 3 to the policy, which the simulator replays.
  constexpr int kReached = 2, kLayers = 4;
  PrefetchOptions options;
  options.thresholds.assign(options.widths.size(), 0);
  PrefetchPolicy policy(kLayers, 8, options);
  policy.reached(kReached);
  Rig rig(4, 1, {}, kLayers);
  rig.use(2 * kReached + 1, {0});
  rig.disk->shut();
  rig.prefetch(3, {0}, 1);  // keeps the reader until all others are queued
  rig.disk->wait_for_reads(2);
  const std::vector<std::vector<float>> likely = {{0.9F, 0.5F}, {1.0F, 0.01F}, {}, {0.3F, 0.05F}};
  for (int layer = 0; layer < kLayers; ++layer) {
    const std::vector<float>& scores = likely[static_cast<size_t>(layer)];
    std::vector<LikelyExpert> named;
    Ids ids;
    for (size_t i = 0; i < scores.size(); ++i) ids.push_back(static_cast<int32_t>(i) + 2);
    for (size_t i = 0; i < scores.size(); ++i) named.push_back({ids[i], scores[i]});
    policy.predicted(layer, named);
    rig.prefetch(2 * layer + 1, ids, 0, scores);
  }
  std::vector<std::pair<int, int>> planned = {{5, 0}, {3, 0}};
  for (const PrefetchRead& read : policy.plan([](int, int) { return true; })) {
    planned.emplace_back(2 * read.layer + 1, read.expert);
  }
  CHECK(planned.size() == 8);
  rig.disk->open();
  rig.settle();
  CHECK(rig.disk->begun() == planned);
}

TEST_CASE("a newer step drops what is queued, not what it has queued itself") {
  Rig rig(4, 1);
  rig.disk->shut();
  rig.prefetch(1, {7});
  rig.disk->wait_for_reads(1);
  rig.prefetch(1, {0, 1});
  rig.prefetch(3, {2}, 1);
  rig.store->cancel(1);
  CHECK(rig.store->step() == 1);
  CHECK(rig.prefetch(1, {4}, 0) == 0);
  rig.store->cancel(0);
  CHECK(rig.store->step() == 1);
  rig.disk->open();
  rig.settle();
  CHECK(rig.disk->begun() == std::vector<std::pair<int, int>>{{1, 7}, {3, 2}});
  const StoreCounters c = rig.store->counters();
  CHECK(c.cancelled == 2);
  check_identities(c);
}

TEST_CASE("a prefetch evicts neither what is leased nor what is predicted") {
  StoreOptions options;
  options.prefetch_bytes = 100 * PackedExperts::kBytes;
  Rig rig(3, 2, options);
  rig.use(1, {0, 1, 2});
  const ExpertLease lease = rig.acquire(1, {2});
  rig.prefetch(1, {1});        // resident: protected
  rig.prefetch(1, {5, 6, 7});  // room for one of them, in place of 0
  rig.settle(2);
  std::this_thread::sleep_for(milliseconds(20));
  CHECK(rig.resident(1) == Ids{1, 2, 5});
  CHECK(rig.store->counters().queued == 2);
  check_identities(rig.store->counters());
}

TEST_CASE("a prefetch evicts what is predicted where it is ten times as likely") {
  Rig rig(2);
  rig.use(1, {0, 1});
  rig.prefetch(1, {0, 1}, 0, {0.09F, 0.11F});
  rig.prefetch(1, {2, 3}, 0, {0.8F, 1.0F});
  rig.settle(1);
  std::this_thread::sleep_for(milliseconds(20));
  CHECK(rig.resident(1) == Ids{1, 3});
}

TEST_CASE("prefetches stay within their budget until what they brought is used or passed by") {
  StoreOptions options;
  options.prefetch_bytes = 2 * PackedExperts::kBytes;
  Rig rig(6, 3, options);
  rig.prefetch(1, {0, 1, 2});
  rig.settle(1);
  std::this_thread::sleep_for(milliseconds(20));
  CHECK(rig.store->counters().prefetched == 2);
  rig.prefetch(3, {4, 5});
  rig.use(1, {7});  // the turn of layer 1: what is queued for it is dropped, and its budget is free
  rig.settle();
  CHECK(rig.resident(3) == Ids{4, 5});
  check_identities(rig.store->counters());
}

TEST_CASE("one reader of several is kept for demand") {
  Rig rig(4, 3);
  rig.disk->shut();
  rig.prefetch(1, {0, 1, 2});
  rig.disk->wait_for_reads(2);
  ExpertLease lease = rig.store->request(3, Ids{5});
  rig.disk->wait_for_reads(3);
  CHECK(rig.disk->begun().back() == std::pair(3, 5));
  rig.disk->open();
  CHECK(lease.wait());
}
