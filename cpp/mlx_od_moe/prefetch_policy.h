// Which experts to read ahead of their use, in which order, and what they may push out.
//
// Disk time is what prefetch spends: a layer waits for its missing experts, so these are read first, by
// whoever owns the disk, and only what is left goes to predictions. The policy holds the newest prediction
// of every layer ahead and answers two questions: what to read next (`plan`), and whether an expert may
// make room for such a read (`may_displace`). A plan is no queue: it is asked for again when a layer is
// reached or a prediction comes, so what a fresher prediction no longer names is cancelled by not being
// there. Reads are handed to the disk one at a time, when it is free; what is not begun costs nothing.
//
// The order: by probability x discount^(distance - 1), where the distance is the read's deadline: its layer's
// turn, counted in layers from the one reached last. A nearer layer has less time left, and a farther one will
// be predicted again, better, before it is reached. No clock is asked: a read that comes late still shortens
// the wait, and leaving it out made layers wait longer. What may be evicted: only what its own
// prediction thinks far less likely (`margin`), since a read for nothing costs twice, disk and place.
// The defaults are measured: docs/planning.md.
//
// Used by the simulator and at run time, so that what was measured is what runs.
//
// Threads    None of its own: the caller serialises the calls.
// Errors     std::invalid_argument, "[PrefetchPolicy] name, rule, value".
// Costs      `plan` sorts what it returns; all else is linear in the experts of one prediction.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "mlx_od_moe/export.h"

namespace mlx_od_moe {

struct PrefetchOptions {
  // The experts of one prediction that are considered, for each distance; its length is the lookahead.
  std::vector<int> widths{16, 16, 16, 16};
  // The least probability that is worth a read, for each distance.
  std::vector<float> thresholds{.1f, .1f, .1f, .1f};
  float discount = .3f;
  // An expert that is predicted with q makes room for one that is predicted with p if q < margin x p.
  float margin = .1f;
};

// An expert, and the probability that its layer will choose it.
struct LikelyExpert {
  int expert;
  float probability;
};

struct PrefetchRead {
  int layer;
  int expert;
  int distance;
  float probability;
  float priority;
};

// Calls f(layer, distance, what that makes of a probability) for the layers by their deadlines, from the one
// after `reached`, up to so many ahead. The layer reached last is due last, a whole pass ahead.
template <class F>
void by_deadline(int reached, int num_layers, int lookahead, const PrefetchOptions& options, F f) {
  float discount = 1;
  for (int distance = 1; distance <= lookahead; ++distance, discount *= options.discount) {
    f((reached + distance) % num_layers, distance, discount);
  }
}

class MLX_OD_MOE_API PrefetchPolicy {
 public:
  PrefetchPolicy(int num_layers, int num_experts, PrefetchOptions options);

  // A prediction of `layer`, likeliest first, in place of what was known of it. It holds until the layer
  // is reached.
  void predicted(int layer, std::span<const LikelyExpert> experts);
  // The layer has chosen its experts: its prediction has served, and the next layers are one nearer.
  void reached(int layer);

  // What to read, best first: the predicted experts of layers 1 ... lookahead ahead of the one reached
  // last that are `absent` (neither resident nor being read). Valid until the next call of `plan`.
  std::span<const PrefetchRead> plan(const std::function<bool(int layer, int expert)>& absent);

  // Whether a resident expert of the read's layer may be evicted for it.
  bool may_displace(const PrefetchRead& read, int expert) const {
    return probability(read.layer, expert) < options_.margin * read.probability;
  }
  // As last predicted; 0 for what was not.
  float probability(int layer, int expert) const { return probability_[index(layer, expert)]; }
  // Whether the layer's prediction would have had the expert read, had there been time.
  bool names(int layer, int expert) const {
    return probability(layer, expert) > 0 && probability(layer, expert) >= options_.thresholds[0];
  }
  int lookahead() const { return int(options_.widths.size()); }

 private:
  size_t index(int layer, int expert) const { return size_t(layer) * size_t(num_experts_) + size_t(expert); }
  void forget(int layer);

  PrefetchOptions options_;
  int num_layers_, num_experts_, reached_;
  std::vector<float> probability_;                    // [layers, experts]
  std::vector<std::vector<LikelyExpert>> predicted_;  // of each layer
  std::vector<PrefetchRead> plan_;
};

}  // namespace mlx_od_moe
