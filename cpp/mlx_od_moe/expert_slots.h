// The memory that experts are read into: for each layer, slots of one expert each.
//
// A layer's part has one pool: slot s lies at base + s * part bytes, so that a pool is an array
// [slots, *part shape] for whoever multiplies with it.
//
// Threads    Immutable; who writes to a slot and when is the caller's affair.
// Ownership  Owns its pools, or uses those that are lent: these must outlive it.
// Errors     std::invalid_argument, "[ExpertStore] rule, value".
// Units      Bytes.
// Costs      Own pools are page-aligned, one allocation a layer; pages that were never written take no memory.
//            Linux is asked for huge pages inside all pools: direct reads of 2 MiB into small ones had .75 of
//            the bandwidth of plain pread into one buffer, into huge ones 1.1 of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "mlx_od_moe/expert_layout.h"
#include "mlx_od_moe/export.h"

namespace mlx_od_moe {

// Slots for each layer: equally many (but no more than it has experts), as many as fit. An error that
// names the minimum where that is fewer than `top_k`, the experts that one token needs.
MLX_OD_MOE_API std::vector<int> partition_slots(const ExpertLayout& layout, uint64_t capacity_bytes, int top_k = 1);

// pools[layer][part]: where a pool lies.
using Pools = std::vector<std::vector<std::byte*>>;

class ExpertSlots {
 public:
  ExpertSlots(const ExpertLayout& layout, std::vector<int> slots, Pools lent = {});

  int slots(size_t layer) const { return slots_[layer]; }
  std::byte* address(size_t layer, size_t part, int slot) const {
    const Pool& pool = pools_[layer][part];
    return pool.base + static_cast<size_t>(slot) * pool.part_bytes;
  }
  size_t parts(size_t layer) const { return pools_[layer].size(); }
  uint64_t bytes() const { return bytes_; }

 private:
  struct Pool {
    std::byte* base = nullptr;
    size_t part_bytes = 0;
  };
  struct Free {
    void operator()(std::byte* memory) const;
  };

  std::vector<int> slots_;
  std::vector<std::vector<Pool>> pools_;
  std::vector<std::unique_ptr<std::byte, Free>> memory_;
  uint64_t bytes_ = 0;
};

}  // namespace mlx_od_moe
