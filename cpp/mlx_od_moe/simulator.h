// Replays recorded routing through per-layer caches and one disk: what a machine would have waited for.
//
// Time is a clock that layers and the disk share. A layer's k experts of one token are one access set, as in
// decoding. When the layer has chosen, those not resident are read at once, behind a read that is already
// under way, and the layer stalls until the last is there. Then it computes for `layer_time`, and meanwhile
// the disk reads what PrefetchPolicy plans, one expert after the other: each takes `read_time` of the disk
// and is there `latency` after that. A read that has begun is never broken off.
//
// Between a token's last layer and the next token's first lies `token_time` (the output projection and
// sampling) on top. The next token is known a share `first_attention` of a layer's time before its first
// layer has chosen, and only from then on can predictions made from it (source 0) be used.
//
// Threads    None.
// Errors     std::invalid_argument, "[simulate] name, rule, value".
// Costs      Memory for Belady's future: 4 bytes per access. Time: see docs/planning.md.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "mlx_od_moe/export.h"
#include "mlx_od_moe/prefetch_policy.h"

namespace mlx_od_moe {

// What a trace says. Ids below 0 are no expert.
struct RecordedRoutes {
  std::span<const int16_t> experts;  // [tokens, layers, top_k]
  int64_t tokens = 0;
  int layers = 0, top_k = 0, num_experts = 0;
};

// What predictors say of it. Source 0 is the token itself, source s the state before layer s - 1; its
// distance d speaks of layer s + d - 1 (distances from 1). Likeliest first.
struct RecordedPredictions {
  std::span<const int16_t> experts;      // [tokens, layers + 1, lookahead, width]
  std::span<const float> probabilities;  // the same
  int lookahead = 0, width = 0;
};

enum class Prefetch {
  kNone,
  kPredicted,
  kOracle,           // the true routes of the token's next layers
  kOracleNextToken,  // of the next token's first layers too, as if it were known already
};

struct SimulatorOptions {
  std::vector<int> capacity;   // experts that each layer has room for
  std::string policy = "lru";  // one of eviction_policies(), or "belady"
  Prefetch prefetch = Prefetch::kNone;
  PrefetchOptions prefetching;
  double layer_time = 1, token_time = 0, first_attention = .5;  // any unit, the same for all times
  double read_time = 0, latency = 0;
};

// lookups = hits + late + misses; prefetched = useful + late + wasted + pending.
struct SimulatorCounts {
  int64_t lookups = 0;
  int64_t hits = 0;        // resident when the layer chose them
  int64_t late = 0;        // a prefetch was under way
  int64_t misses = 0;      // read on demand
  int64_t prefetched = 0;  // reads begun for predictions
  int64_t useful = 0;      // in time, and then used
  int64_t wasted = 0;      // evicted unused
  int64_t pending = 0;     // unused when the trace ended
  int64_t named = 0;       // of useful + late + misses, those that the last prediction named
  double stall = 0;        // time waited for reads
  double time = 0;         // stall and computing
};

struct SimulatorResult {
  SimulatorCounts total;
  std::vector<SimulatorCounts> layers;
};

MLX_OD_MOE_API SimulatorResult simulate(const RecordedRoutes& routes, const RecordedPredictions& predictions,
                                        const SimulatorOptions& options);

}  // namespace mlx_od_moe
