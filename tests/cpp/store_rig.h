// A store over a packed directory, whose disk the test commands.
#pragma once

#include <doctest/doctest.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "mlx_od_moe/expert_store.h"
#include "packed_experts.h"

namespace mlx_od_moe::tests {

using Ids = std::vector<int32_t>;

// A store over two layers of eight experts, 1 and 3, whose disk the test commands.
struct Rig {
  explicit Rig(int slots = 4, int readers = 2, StoreOptions options = {}, int layers = 2) : packed(layers) {
    file = packed.open();
    disk = std::make_shared<TestDisk>(file);
    options.capacity_bytes = static_cast<uint64_t>(slots * layers) * PackedExperts::kBytes;
    options.readers = readers;
    options.reader.preadv = [d = disk](int fd, const iovec* parts, int count, off_t offset) {
      return d->read(fd, parts, count, offset);
    };
    store = std::make_unique<ExpertStore>(file, options);
  }

  // Acquires, compares every byte, and keeps the lease.
  ExpertLease acquire(int layer, const Ids& ids) {
    Ids slots(ids.size(), -1);
    ExpertLease lease = store->acquire(layer, ids, slots);
    for (size_t i = 0; i < ids.size(); ++i) CHECK(PackedExperts::holds(*store, layer, ids[i], slots[i]));
    return lease;
  }
  void use(int layer, const Ids& ids) { acquire(layer, ids).release(); }
  int prefetch(int layer, const Ids& ids, uint64_t step = 0, const std::vector<float>& scores = {}) {
    return store->prefetch(layer, ids, scores, step);
  }
  // Until no prefetch is in flight, and so many of all that were accepted are still queued.
  void settle(uint64_t queued = 0) {
    for (;;) {
      const StoreCounters c = store->counters();
      if (c.queued == queued && c.prefetch_bytes == c.prefetched * PackedExperts::kBytes) return;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  Ids resident(int layer) const {
    const std::vector<int> found = store->resident(layer);
    return {found.begin(), found.end()};
  }

  PackedExperts packed;
  std::shared_ptr<const ExpertFile> file;
  std::shared_ptr<TestDisk> disk;
  std::unique_ptr<ExpertStore> store;
};

inline void check_identities(const StoreCounters& c) {
  CHECK(c.lookups == c.hits + c.late + c.misses);
  CHECK(c.prefetched == c.useful + c.late + c.wasted + c.pending);
  CHECK(c.accepted == c.prefetched + c.overtaken + c.cancelled + c.queued);
}

}  // namespace mlx_od_moe::tests
