// The freshest prediction for each layer: one writer, readers that never hold it up.
//
// An entry is a sequence lock: its version is odd while the writer is at it, and a reader that finds
// the version changed reads again.
//
// Threads    `write`: one thread. `read`: any thread, at any time.
// Ownership  Values are copied in and out.
// Ordering   Every word is stored with release after the odd version, and loaded with acquire before the
//            version is checked: a reader that has seen a word of a later write sees its odd version too.
// Errors     None. Layers and counts must be in range.
// Costs      8 bytes per layer and expert. A reader repeats while a write of its own layer goes on
//            (about a nanosecond per expert); that a write stalls half-way delays the layer's readers.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "mlx_od_moe/parking.h"

namespace mlx_od_moe {

struct ScoredExpert {
  int32_t id = 0;
  float score = 0;
};

class PredictionTable {
 public:
  PredictionTable(size_t layers, size_t experts) : experts_(experts), entries_(layers) {
    for (Entry& entry : entries_) entry.words = std::make_unique<std::atomic<uint64_t>[]>(experts);
  }

  // The writer: at most as many as there are experts, best first.
  void write(size_t layer, uint64_t step, std::span<const ScoredExpert> experts) {
    Entry& entry = entries_[layer];
    const uint64_t version = entry.version.load(std::memory_order_relaxed);
    entry.version.store(version + 1, std::memory_order_relaxed);
    entry.step.store(step, std::memory_order_release);
    entry.count.store(experts.size(), std::memory_order_release);
    for (size_t i = 0; i < experts.size(); ++i) {
      entry.words[i].store(std::bit_cast<uint64_t>(experts[i]), std::memory_order_release);
    }
    entry.version.store(version + 2, std::memory_order_release);
  }

  // Appends the layer's experts, where its last prediction was made in this step. Else false.
  bool read(size_t layer, uint64_t step, std::vector<ScoredExpert>& out) const {
    const Entry& entry = entries_[layer];
    const size_t start = out.size();
    for (;;) {
      const uint64_t version = entry.version.load(std::memory_order_acquire);
      const bool current = version != 0 && entry.step.load(std::memory_order_acquire) == step;
      const size_t count = current ? std::min(entry.count.load(std::memory_order_acquire), experts_) : 0;
      for (size_t i = 0; i < count; ++i) {
        out.push_back(std::bit_cast<ScoredExpert>(entry.words[i].load(std::memory_order_acquire)));
      }
      if (version % 2 == 0 && entry.version.load(std::memory_order_relaxed) == version) return current;
      out.resize(start);
      pause_cpu();
    }
  }

 private:
  struct Entry {
    std::atomic<uint64_t> version{0};
    std::atomic<uint64_t> step{0};
    std::atomic<size_t> count{0};
    std::unique_ptr<std::atomic<uint64_t>[]> words;
  };

  size_t experts_;
  std::vector<Entry> entries_;
};

}  // namespace mlx_od_moe
