#include "mlx_od_moe/expert_store.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "mlx_od_moe/eviction.h"
#include "store_rig.h"

using namespace mlx_od_moe;
using namespace mlx_od_moe::tests;
using std::chrono::milliseconds;

TEST_CASE("acquired experts lie in slots of their own, byte for byte") {
  Rig rig;
  Ids ids = {7, 2, 7, 0, 2, 2}, slots(ids.size());
  const ExpertLease lease = rig.store->acquire(3, ids, slots);
  for (size_t i = 0; i < ids.size(); ++i) {
    CHECK(PackedExperts::holds(*rig.store, 3, ids[i], slots[i]));
    for (size_t j = 0; j < i; ++j) CHECK((slots[i] == slots[j]) == (ids[i] == ids[j]));
  }
  CHECK(rig.resident(3) == Ids{0, 2, 7});
  CHECK(rig.resident(1).empty());
  const StoreCounters c = rig.store->counters();
  CHECK(c.lookups == 3);
  CHECK(c.misses == 3);
  CHECK(c.demand_bytes == 3 * PackedExperts::kBytes);
  CHECK(rig.store->counters(1).lookups == 0);
  check_identities(c);
}

TEST_CASE("what one call misses is read in the order of the file") {
  Rig rig(4, 1);
  CHECK(rig.store->request(1, Ids{6, 1, 4, 0}).wait());  // acquire would read beside the one reader
  CHECK(rig.disk->begun() == std::vector<std::pair<int, int>>{{1, 0}, {1, 1}, {1, 4}, {1, 6}});
}

TEST_CASE("resident experts are hits, and the least recently used makes room") {
  Rig rig(3);
  rig.use(1, {0, 1, 2});
  rig.use(1, {0});
  rig.use(1, {5});
  CHECK(rig.resident(1) == Ids{0, 2, 5});
  rig.use(1, {0, 2, 5});
  const StoreCounters c = rig.store->counters();
  CHECK(c.lookups == 8);
  CHECK(c.hits == 4);
  CHECK(c.evicted == 1);
  check_identities(c);
}

TEST_CASE("every policy serves the right bytes") {
  for (const std::string& policy : eviction_policies()) {
    StoreOptions options;
    options.policy = policy;
    Rig rig(3, 2, options);
    uint32_t x = 1;
    for (int i = 0; i < 300; ++i) {
      x = x * 1664525 + 1013904223;
      const auto a = static_cast<int32_t>((x >> 8) % 8), b = static_cast<int32_t>((x >> 16) % 8);
      rig.prefetch(1, {static_cast<int32_t>((x >> 20) % 8)}, 0, {0.5F});
      rig.use(1, {a, b});
    }
    check_identities(rig.store->counters());
  }
}

TEST_CASE("a lease forbids eviction, and who finds no slot waits for a release") {
  Rig rig(2);
  ExpertLease first = rig.acquire(1, {0, 1});
  ExpertLease second = rig.store->request(1, Ids{1, 2});
  CHECK_FALSE(second.wait(Parking::Clock::now() + milliseconds(20)));
  CHECK(rig.resident(1) == Ids{0, 1});
  first.release();
  CHECK(second.wait());
  CHECK(PackedExperts::holds(*rig.store, 1, 1, second.slot(1)));
  CHECK(PackedExperts::holds(*rig.store, 1, 2, second.slot(2)));
  // Leases of several calls add up.
  {
    const ExpertLease third = rig.acquire(1, {1});
    second.release();
    const ExpertLease other = rig.acquire(1, {5});
    CHECK(rig.resident(1) == Ids{1, 5});
  }
  check_identities(rig.store->counters());
}

TEST_CASE("who acquires reads, too") {
  Rig rig(4, 1);
  rig.disk->shut();
  rig.prefetch(1, {7});
  rig.disk->wait_for_reads(1);  // the only reader's
  std::thread user([&] { rig.use(1, {0, 2}); });
  rig.disk->wait_for_reads(2);
  CHECK(rig.disk->begun()[1] == std::pair(1, 0));
  rig.disk->open();
  user.join();
  CHECK(rig.store->counters().misses == 2);
}

TEST_CASE("who waits for many slots is not passed by who wants few") {
  Rig rig(3);
  ExpertLease first = rig.acquire(1, {0});
  ExpertLease many = rig.store->request(1, Ids{1, 2, 3});
  ExpertLease few = rig.store->request(1, Ids{4});
  rig.use(1, {0});  // needs no slot
  CHECK_FALSE(few.wait(Parking::Clock::now() + milliseconds(20)));
  first.release();
  CHECK(many.wait());
  CHECK_FALSE(few.ready());
  many.release();
  CHECK(few.wait());
}

TEST_CASE("a request that is given up frees what waits behind it") {
  Rig rig(2);
  ExpertLease first = rig.acquire(1, {0, 1});
  ExpertLease second = rig.store->request(1, Ids{2, 3});
  ExpertLease third = rig.store->request(1, Ids{4});
  second.release();
  first.release();
  CHECK(third.wait());
  CHECK(PackedExperts::holds(*rig.store, 1, 4, third.slot(4)));
}

TEST_CASE("pools are the caller's where he lends them") {
  PackedExperts packed;
  std::vector<std::vector<std::vector<std::byte>>> memory(2);
  Pools pools(2);
  for (size_t i = 0; i < 2; ++i) {
    for (size_t bytes : PackedExperts::kParts) memory[i].emplace_back(3 * bytes);
    for (auto& part : memory[i]) pools[i].push_back(part.data());
  }
  StoreOptions options;
  options.slots = {3, 2};
  ExpertStore store(packed.open(), options, pools);
  CHECK(store.capacity_bytes() == 5 * PackedExperts::kBytes);
  Ids ids = {6, 1}, slots(2);
  const ExpertLease lease = store.acquire(3, ids, slots);
  const std::vector<std::byte> expected = PackedExperts::content(3, 6);
  const auto first = memory[1][0].begin() + slots[0] * 1000;
  CHECK(std::equal(first, first + 1000, expected.begin()));
}

TEST_CASE("pools of its own are page-aligned, and every slot of every part has its own bytes") {
  Rig rig(4);
  for (size_t part = 0; part < 3; ++part) {
    CHECK(reinterpret_cast<uintptr_t>(rig.store->address(1, part, 0)) % 4096 == 0);
    CHECK(rig.store->address(1, part, 1) - rig.store->address(1, part, 0) ==
          static_cast<std::ptrdiff_t>(PackedExperts::kParts[part]));
  }
}

TEST_CASE("capacity is divided evenly, and no layer has more slots than experts") {
  PackedExperts packed(3, 5);
  const auto file = packed.open();
  const uint64_t bytes = PackedExperts::kBytes;
  CHECK(partition_slots(file->layout(), 7 * bytes, 2) == std::vector<int>{2, 2, 2});
  CHECK(partition_slots(file->layout(), 9 * bytes - 1) == std::vector<int>{2, 2, 2});
  CHECK(partition_slots(file->layout(), 9 * bytes) == std::vector<int>{3, 3, 3});
  CHECK(partition_slots(file->layout(), 1000 * bytes, 5) == std::vector<int>{5, 5, 5});
  CHECK_THROWS_WITH_AS(partition_slots(file->layout(), 6 * bytes - 1, 2),
                       "[ExpertStore] capacity must be at least 36576 bytes, 2 of the experts of each layer; got 36575",
                       std::invalid_argument);
}

TEST_CASE("a disk model delays reads by bandwidth and latency") {
  StoreOptions options;
  options.reader.disk = DiskModel{PackedExperts::kBytes * 100.0, milliseconds(5)};  // 10 ms an expert
  Rig rig(4, 2, options);
  const auto start = std::chrono::steady_clock::now();
  rig.use(1, {0, 1, 2});
  CHECK(std::chrono::steady_clock::now() - start >= milliseconds(35));
}

TEST_CASE("direct reads bring the same bytes") {
  StoreOptions options;
  options.reader.direct_io = true;
  options.reader.verify = true;
  std::unique_ptr<Rig> rig;
  try {
    rig = std::make_unique<Rig>(4, 2, options);
  } catch (const std::system_error& error) {
    MESSAGE("this file system has no direct reads: " << error.what());
    return;
  }
  rig->use(1, {0, 3, 6, 7});
  rig->disk->limit(4096);  // short reads go on
  rig->use(3, {1, 2, 7});
}

TEST_CASE("wrong use is told clearly") {
  Rig rig(3);
  CHECK_THROWS_WITH_AS(rig.use(2, {0}), "[ExpertStore] layer 2 has no experts in this file", std::invalid_argument);
  CHECK_THROWS_WITH_AS(rig.use(1, {8}), "[ExpertStore] layer 1: expert ids must be 0 ... 7, got 8",
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(rig.prefetch(1, {-1}), "[ExpertStore] layer 1: expert ids must be 0 ... 7, got -1",
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(
      rig.use(1, {0, 1, 2, 3}),
      "[ExpertStore] layer 1 has 3 slots, but one call asks for 4 experts: they take 24384 bytes of this layer",
      std::invalid_argument);
  CHECK_THROWS_WITH_AS(rig.prefetch(1, {0}, 0, {1, 2}), "[ExpertStore] scores must be as many as ids (1), got 2",
                       std::invalid_argument);
  StoreOptions options;
  CHECK_THROWS_WITH_AS(Rig(3, 0, options), "[ExpertStore] readers must be 1 ... 64, got 0", std::invalid_argument);
  options.policy = "random";
  CHECK_THROWS_AS(Rig(3, 1, options), std::invalid_argument);
  options = {};
  options.slots = {3};
  CHECK_THROWS_WITH_AS(Rig(3, 1, options), "[ExpertStore] slots must be given for each of 2 layers, got 1",
                       std::invalid_argument);
  options.slots = {3, 9};
  CHECK_THROWS_WITH_AS(Rig(3, 1, options), "[ExpertStore] layer 3: slots must be 1 ... 8, got 9",
                       std::invalid_argument);
  rig.use(1, {0});  // and nothing has changed
  check_identities(rig.store->counters());
}
