// Counts durations in bins of rising width, to tell quantiles of all that ever were within 1/8.
//
// Threads    Any thread may call any method; counts are approximate while others add.
// Ordering   None: counters are relaxed.
// Units      Nanoseconds.
// Costs      4 KB; adding is one atomic operation.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace mlx_od_moe {

class LatencyHistogram {
 public:
  void add(int64_t ns) {
    bins_[bin_of(static_cast<uint64_t>(std::max<int64_t>(ns, 0)))].fetch_add(1, std::memory_order_relaxed);
  }

  uint64_t count() const {
    uint64_t n = 0;
    for (const auto& bin : bins_) n += bin.load(std::memory_order_relaxed);
    return n;
  }

  // The duration that this share of all stays below or at: the upper end of its bin. 0 where there are none.
  int64_t quantile(double share) const {
    const uint64_t total = count();
    const auto rank = static_cast<uint64_t>(share * static_cast<double>(total));
    uint64_t below = 0;
    for (size_t i = 0; i < kBins; ++i) {
      below += bins_[i].load(std::memory_order_relaxed);
      if (below > rank || (total > 0 && below == total)) return upper_end(i);
    }
    return 0;
  }

 private:
  static constexpr int kBits = 3;  // 8 bins per power of two
  static constexpr size_t kBins = 62 << kBits;

  static size_t bin_of(uint64_t ns) {
    if (ns < (1U << kBits)) return static_cast<size_t>(ns);
    const int shift = static_cast<int>(std::bit_width(ns)) - 1 - kBits;
    return std::min<size_t>((static_cast<size_t>(shift) << kBits) + static_cast<size_t>(ns >> shift), kBins - 1);
  }

  static int64_t upper_end(size_t bin) {
    if (bin < (2U << kBits)) return static_cast<int64_t>(bin);
    const size_t shift = (bin >> kBits) - 1;
    const uint64_t first = (bin & ((1U << kBits) - 1)) + (1U << kBits);
    return static_cast<int64_t>(((first + 1) << shift) - 1);
  }

  std::array<std::atomic<uint64_t>, kBins> bins_{};
};

}  // namespace mlx_od_moe
