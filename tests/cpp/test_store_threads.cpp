// Several callers, prefetchers and cancels at once.
#include <doctest/doctest.h>

#include <atomic>
#include <random>
#include <thread>

#include "packed_experts.h"

using namespace mlx_od_moe;
using namespace mlx_od_moe::tests;

namespace {

using Ids = std::vector<int32_t>;

Ids some_ids(std::mt19937& random, size_t most) {
  Ids ids(1 + random() % most);
  for (int32_t& id : ids) id = static_cast<int32_t>(random() % 8);
  return ids;
}

}  // namespace

TEST_CASE("threads that acquire, prefetch, cancel and fail get the right bytes or an error") {
  for (const bool faults : {false, true}) {
    CAPTURE(faults);
    PackedExperts packed(3, 8);
    const auto file = packed.open();
    const auto disk = std::make_shared<TestDisk>(file);
    StoreOptions options;
    options.slots = {4, 3, 5};
    options.readers = 3;
    options.policy = faults ? "s3fifo" : "lru";
    options.reader.preadv = [&, disk](int fd, const iovec* parts, int count, off_t offset) {
      return disk->read(fd, parts, count, offset);
    };
    if (faults) {
      for (int e : {1, 4, 6}) disk->fail(3, e, EIO, 40);
    }
    ExpertStore store(file, options);
    std::atomic<int> wrong{0}, failed{0};
    std::atomic<bool> done{false};
    std::vector<std::thread> callers, others;
    for (unsigned t = 0; t < 3; ++t) {
      callers.emplace_back([&, t] {
        std::mt19937 random(t);
        for (int i = 0; i < 400; ++i) {
          const int layer = PackedExperts::layer(static_cast<int>(random() % 3));
          const Ids ids = some_ids(random, 3);
          Ids slots(ids.size());
          try {
            const ExpertLease lease = store.acquire(layer, ids, slots);
            for (size_t k = 0; k < ids.size(); ++k) wrong += !PackedExperts::holds(store, layer, ids[k], slots[k]);
          } catch (const ExpertReadError&) {
            ++failed;
          }
          if (i % 7 == 0) {  // begun and given up
            ExpertLease dropped = store.request(layer, some_ids(random, 3));
          }
        }
      });
    }
    for (unsigned t = 0; t < 2; ++t) {
      others.emplace_back([&, t] {
        std::mt19937 random(100 + t);
        for (uint64_t step = 0; !done; ++step) {
          const int layer = PackedExperts::layer(static_cast<int>(random() % 3));
          store.prefetch(layer, some_ids(random, 4), {}, step);
          if (step % 5 == 0) store.cancel(step);
          if (step % 16 == 0) store.counters();
          std::this_thread::yield();
        }
      });
    }
    for (std::thread& thread : callers) thread.join();
    done = true;
    for (std::thread& thread : others) thread.join();
    store.close();
    CHECK(wrong == 0);
    CHECK((failed > 0) == faults);
    for (int layer : store.layers()) {
      const StoreCounters c = store.counters(layer);
      CHECK(c.lookups == c.hits + c.late + c.misses);
      CHECK(c.prefetched == c.useful + c.late + c.wasted + c.pending);
      CHECK(c.accepted == c.prefetched + c.overtaken + c.cancelled + c.queued);
      CHECK(c.lookups > 0);
    }
  }
}

TEST_CASE("threads that need all slots of a layer take turns") {
  PackedExperts packed(1, 8);
  StoreOptions options;
  options.slots = {3};
  ExpertStore store(packed.open(), options);
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int32_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      const Ids ids = {t, t + 2, t + 4};
      Ids slots(3);
      for (int i = 0; i < 100; ++i) {
        const ExpertLease lease = store.acquire(1, ids, slots);
        for (size_t k = 0; k < 3; ++k) wrong += !PackedExperts::holds(store, 1, ids[k], slots[k]);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
  CHECK(store.counters().lookups == 1200);
}

TEST_CASE("threads that wait when the store is destroyed all return") {
  for (int round = 0; round < 20; ++round) {
    PackedExperts packed(1, 8);
    StoreOptions options;
    options.slots = {2};
    auto store = std::make_unique<ExpertStore>(packed.open(), options);
    std::vector<ExpertLease> leases;
    for (int32_t e = 0; e < 6; ++e) leases.push_back(store->request(1, Ids{e}));
    std::vector<std::thread> threads;
    for (ExpertLease& lease : leases) {
      threads.emplace_back([&lease] {
        try {
          lease.wait();
        } catch (const std::runtime_error&) {
        }
      });
    }
    store.reset();
    for (std::thread& thread : threads) thread.join();
  }
}

TEST_CASE("a prefetch is read whether readers of other threads watch, fall asleep or sleep") {
  PackedExperts packed(1, 8);
  StoreOptions options;
  options.slots = {4};
  options.readers = 3;
  ExpertStore store(packed.open(), options);
  std::mt19937 random(5);
  Ids slots(1);
  for (int32_t i = 0; i < 120; ++i) {
    const Ids next = {i % 8};
    // The end of a watch is where a reader could miss what it is no longer told.
    const auto rest = i % 3 == 0 ? std::chrono::microseconds(random() % 2000)
                                 : std::chrono::microseconds(Parking::kWatch) -
                                       std::chrono::microseconds(500 - static_cast<int>(random() % 2000));
    std::this_thread::sleep_for(rest);
    CHECK(store.prefetch(1, next, {}, 0) == 1);
    while (store.counters().queued > 0) std::this_thread::yield();  // for ever, where it is missed
    store.acquire(1, next, slots).release();
    CHECK(PackedExperts::holds(store, 1, next[0], slots[0]));
  }
  const StoreCounters c = store.counters();
  CHECK(c.useful + c.late == 120);
  CHECK(c.misses == 0);
}
