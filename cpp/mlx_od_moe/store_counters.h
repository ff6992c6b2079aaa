// What ExpertStore counts, for each layer and in all, since construction.
//
// A lookup is one distinct expert of one acquire. It is a hit (resident), late (a prefetch that no lookup
// had used is in flight, and is joined) or a miss. A prefetch is a read that a prediction started. It is
// useful (resident before a lookup), late, wasted (evicted unused, or failed), or still pending. A
// prediction that is accepted waits in a queue before it is started: there a lookup may overtake it (a
// miss), and a newer step or a lookup of its layer may cancel it.
//
//   lookups    == hits + late + misses
//   prefetched == useful + late + wasted + pending
//   accepted   == prefetched + overtaken + cancelled + queued
//
// Threads    Values.
// Units      Experts, bytes of experts (what direct reads bring beyond them is not counted), ns.
#pragma once

#include <cstdint>

namespace mlx_od_moe {

struct StoreCounters {
  uint64_t lookups = 0;
  uint64_t hits = 0;
  uint64_t late = 0;
  uint64_t misses = 0;

  uint64_t accepted = 0;
  uint64_t overtaken = 0;
  uint64_t cancelled = 0;
  uint64_t queued = 0;

  uint64_t prefetched = 0;
  uint64_t useful = 0;
  uint64_t wasted = 0;
  uint64_t pending = 0;

  // Of reads that succeeded, by cause; prefetch_bytes == useful_bytes + wasted_bytes + what is pending.
  uint64_t demand_bytes = 0;
  uint64_t prefetch_bytes = 0;
  uint64_t useful_bytes = 0;
  uint64_t wasted_bytes = 0;

  uint64_t evicted = 0;
  uint64_t failed_demands = 0;     // reads, those of late prefetches included
  uint64_t failed_prefetches = 0;  // that nobody waited for
  uint64_t stalls = 0;             // waits of an acquire, and their time: summed over threads
  uint64_t stall_ns = 0;

  // Of the lookups that prefetch alone could have helped, the share for which it had brought the expert,
  // or had it in flight. 0 where there were none.
  double non_resident_recall() const {
    const uint64_t helped = useful + late;
    return helped + misses == 0 ? 0.0 : static_cast<double>(helped) / static_cast<double>(helped + misses);
  }

  StoreCounters& operator+=(const StoreCounters& other);
};

// For whoever goes through all of them.
struct StoreCounter {
  const char* name;
  uint64_t StoreCounters::* value;
};

inline constexpr StoreCounter kStoreCounters[] = {
    {"lookups", &StoreCounters::lookups},
    {"hits", &StoreCounters::hits},
    {"late", &StoreCounters::late},
    {"misses", &StoreCounters::misses},
    {"accepted", &StoreCounters::accepted},
    {"overtaken", &StoreCounters::overtaken},
    {"cancelled", &StoreCounters::cancelled},
    {"queued", &StoreCounters::queued},
    {"prefetched", &StoreCounters::prefetched},
    {"useful", &StoreCounters::useful},
    {"wasted", &StoreCounters::wasted},
    {"pending", &StoreCounters::pending},
    {"demand_bytes", &StoreCounters::demand_bytes},
    {"prefetch_bytes", &StoreCounters::prefetch_bytes},
    {"useful_bytes", &StoreCounters::useful_bytes},
    {"wasted_bytes", &StoreCounters::wasted_bytes},
    {"evicted", &StoreCounters::evicted},
    {"failed_demands", &StoreCounters::failed_demands},
    {"failed_prefetches", &StoreCounters::failed_prefetches},
    {"stalls", &StoreCounters::stalls},
    {"stall_ns", &StoreCounters::stall_ns},
};

inline StoreCounters& StoreCounters::operator+=(const StoreCounters& other) {
  for (const StoreCounter& counter : kStoreCounters) this->*counter.value += other.*counter.value;
  return *this;
}
static_assert(sizeof(StoreCounters) == sizeof(kStoreCounters) / sizeof(StoreCounter) * sizeof(uint64_t));

}  // namespace mlx_od_moe
