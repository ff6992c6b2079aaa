#include "mlx_od_moe/simulator.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>

#include "mlx_od_moe/eviction.h"

namespace mlx_od_moe {

namespace {

void require(bool holds, const std::string& rule) {
  if (!holds) throw std::invalid_argument("[simulate] " + rule);
}

// Evicts what is next used last of all (Belady, "A study of replacement algorithms for a virtual-storage
// computer", 1966): no policy that reads only on demand waits for fewer experts.
class Belady final : public EvictionPolicy {
 public:
  Belady(const RecordedRoutes& routes, int layer) : uses_(size_t(routes.num_experts)), next_(uses_.size(), 0) {
    for (int64_t token = 0; token < routes.tokens; ++token) {
      auto set = routes.experts.subspan(size_t((token * routes.layers + layer) * routes.top_k), size_t(routes.top_k));
      for (int16_t expert : set) {
        if (expert >= 0) uses_[size_t(expert)].push_back(int32_t(token));
      }
    }
  }

  void accessed(int) override {}
  void inserted(int expert, bool) override { resident_.push_back(expert); }
  void evicted(int expert) override { std::erase(resident_, expert); }
  void predicted(int, float) override {}
  void next_step() override { ++token_; }
  int victim(const std::function<bool(int)>& evictable) override {
    int best = -1;
    int64_t latest = -1;
    for (int expert : resident_) {
      int64_t use = next_use(expert);
      if (use > latest && evictable(expert)) {
        best = expert;
        latest = use;
      }
    }
    return best;
  }

 private:
  int64_t next_use(int expert) {
    const std::vector<int32_t>& uses = uses_[size_t(expert)];
    size_t& next = next_[size_t(expert)];
    while (next < uses.size() && uses[next] < token_) ++next;
    return next < uses.size() ? uses[next] : std::numeric_limits<int64_t>::max();
  }

  std::vector<std::vector<int32_t>> uses_;  // tokens, per expert
  std::vector<size_t> next_;
  std::vector<int> resident_;
  int32_t token_ = 0;
};

class Replay {
 public:
  Replay(const RecordedRoutes& routes, const RecordedPredictions& predictions, const SimulatorOptions& options)
      : routes_(routes),
        predictions_(predictions),
        options_(options),
        prefetching_(routes.layers, routes.num_experts, options.prefetching),
        free_(options.capacity),
        counts_(size_t(routes.layers)),
        experts_(size_t(routes.layers) * size_t(routes.num_experts)) {
    for (int layer = 0; layer < routes.layers; ++layer) {
      if (options.policy == "belady") {
        eviction_.push_back(std::make_unique<Belady>(routes, layer));
      } else {
        eviction_.push_back(make_eviction_policy(options.policy, routes.num_experts, options.capacity[size_t(layer)]));
      }
    }
  }

  SimulatorResult run() {
    for (int64_t token = 0; token < routes_.tokens; ++token) {
      if (token == 0) learn(token, 0);
      for (int layer = 0; layer < routes_.layers; ++layer) {
        demand(token, layer);
        learn(token, layer + 1);
        if (layer + 1 < routes_.layers) {
          compute(options_.layer_time);
        } else {
          double known = options_.layer_time * options_.first_attention;
          compute(options_.layer_time + options_.token_time - known);
          if (token + 1 < routes_.tokens) learn(token + 1, 0);
          compute(known);
        }
      }
    }
    return result();
  }

 private:
  struct State {
    bool held = false;    // has a slot
    bool unused = false;  // came by prefetch, and was not used since
    int64_t wanted = -1;  // the last access set that it was in
    double ready = 0;     // when its read ends
  };

  State& state(int layer, int expert) { return experts_[size_t(layer) * size_t(routes_.num_experts) + size_t(expert)]; }

  std::span<const int16_t> chosen(int64_t token, int layer) const {
    return routes_.experts.subspan(size_t((token * routes_.layers + layer) * routes_.top_k), size_t(routes_.top_k));
  }

  // The predictions that a source makes about a token.
  void learn(int64_t token, int source) {
    if (options_.prefetch == Prefetch::kNone) return;
    int lookahead = options_.prefetch == Prefetch::kPredicted ? predictions_.lookahead : prefetching_.lookahead();
    for (int distance = 1; distance <= lookahead; ++distance) {
      int layer = source + distance - 1;
      likely_.clear();
      if (options_.prefetch == Prefetch::kPredicted) {
        if (layer >= routes_.layers) return;
        read_prediction(token, source, distance);
        if (likely_.empty()) continue;
      } else {
        int64_t of = token + layer / routes_.layers;
        if (of > token && (options_.prefetch == Prefetch::kOracle || of == routes_.tokens)) return;
        layer %= routes_.layers;
        for (int16_t expert : chosen(of, layer)) {
          if (expert >= 0) likely_.push_back({expert, 1.f});
        }
      }
      prefetching_.predicted(layer, likely_);
      if (options_.policy != "score") continue;  // no other heeds them
      for (const LikelyExpert& e : likely_) eviction_[size_t(layer)]->predicted(e.expert, e.probability);
    }
  }

  void read_prediction(int64_t token, int source, int distance) {
    size_t width = size_t(predictions_.width);
    size_t row = size_t((token * (routes_.layers + 1) + source) * predictions_.lookahead + distance - 1);
    for (size_t i = row * width; i < (row + 1) * width && predictions_.experts[i] >= 0; ++i) {
      likely_.push_back({predictions_.experts[i], predictions_.probabilities[i]});
    }
  }

  // The layer has chosen: reads what is missing, and waits.
  void demand(int64_t token, int layer) {
    SimulatorCounts& counts = counts_[size_t(layer)];
    EvictionPolicy& eviction = *eviction_[size_t(layer)];
    int64_t set = token * routes_.layers + layer;
    double ready = now_;
    missing_.clear();
    for (int16_t expert : chosen(token, layer)) {
      if (expert < 0) continue;
      State& s = state(layer, expert);
      s.wanted = set;
      ++counts.lookups;
      if (!s.held || s.unused) counts.named += prefetching_.names(layer, expert);
      eviction.accessed(expert);
      if (!s.held) {
        ++counts.misses;
        missing_.push_back(expert);
        continue;
      }
      bool late = s.ready > now_;
      ++(late ? counts.late : counts.hits);
      if (s.unused && !late) ++counts.useful;
      s.unused = false;
      ready = std::max(ready, s.ready);
    }
    auto evictable = [&](int expert) {
      const State& s = state(layer, expert);
      return s.wanted != set && s.ready <= now_;
    };
    for (int expert : missing_) {
      bool room = make_room(layer, evictable);
      // All else is being read for later: such a read has lost its slot.
      if (!room) room = make_room(layer, [&](int e) { return state(layer, e).wanted != set; });
      read(layer, expert, false);
      ready = std::max(ready, state(layer, expert).ready);
    }
    counts.stall += ready - now_;
    now_ = ready;
    eviction.next_step();
    prefetching_.reached(layer);
  }

  bool make_room(int layer, const std::function<bool(int)>& evictable) {
    int& free = free_[size_t(layer)];
    if (free > 0) return --free, true;
    int victim = eviction_[size_t(layer)]->victim(evictable);
    if (victim < 0) return false;
    eviction_[size_t(layer)]->evicted(victim);
    State& s = state(layer, victim);
    counts_[size_t(layer)].wasted += s.unused;
    s.held = s.unused = false;
    return true;
  }

  void read(int layer, int expert, bool prefetch) {
    State& s = state(layer, expert);
    disk_free_ = std::max(disk_free_, now_) + options_.read_time;
    s.held = true;
    s.unused = prefetch;
    s.ready = disk_free_ + options_.latency;
    eviction_[size_t(layer)]->inserted(expert, prefetch);
  }

  // The model computes; the disk reads ahead as long as it can begin.
  void compute(double duration) {
    double end = now_ + duration;
    if (options_.prefetch != Prefetch::kNone) read_ahead(end);
    now_ = end;
  }

  void read_ahead(double end) {
    if (disk_free_ >= end) return;
    auto plan = prefetching_.plan([this](int layer, int expert) { return !state(layer, expert).held; });
    for (const PrefetchRead& planned : plan) {
      if (disk_free_ >= end) return;
      int layer = planned.layer;
      bool room = make_room(layer, [&](int expert) {
        return state(layer, expert).ready <= std::max(now_, disk_free_) && prefetching_.may_displace(planned, expert);
      });
      if (!room) continue;
      read(layer, planned.expert, true);
      ++counts_[size_t(layer)].prefetched;
    }
  }

  SimulatorResult result() {
    SimulatorResult out{{}, counts_};
    for (int layer = 0; layer < routes_.layers; ++layer) {
      SimulatorCounts& counts = out.layers[size_t(layer)];
      for (int expert = 0; expert < routes_.num_experts; ++expert) counts.pending += state(layer, expert).unused;
      counts.time = double(routes_.tokens) * options_.layer_time + counts.stall;
      for (auto field : {&SimulatorCounts::lookups, &SimulatorCounts::hits, &SimulatorCounts::late,
                         &SimulatorCounts::misses, &SimulatorCounts::prefetched, &SimulatorCounts::useful,
                         &SimulatorCounts::wasted, &SimulatorCounts::pending, &SimulatorCounts::named}) {
        out.total.*field += counts.*field;
      }
      out.total.stall += counts.stall;
    }
    out.total.time = now_;
    return out;
  }

  const RecordedRoutes& routes_;
  const RecordedPredictions& predictions_;
  const SimulatorOptions& options_;
  PrefetchPolicy prefetching_;
  std::vector<std::unique_ptr<EvictionPolicy>> eviction_;
  std::vector<int> free_;
  std::vector<SimulatorCounts> counts_;
  std::vector<State> experts_;
  std::vector<LikelyExpert> likely_;
  std::vector<int> missing_;
  double now_ = 0, disk_free_ = 0;
};

void check(const RecordedRoutes& routes) {
  require(routes.tokens >= 0 && routes.layers > 0 && routes.top_k > 0 && routes.num_experts > 0 &&
              routes.experts.size() == size_t(routes.tokens) * size_t(routes.layers) * size_t(routes.top_k),
          "experts: they are [tokens, layers, top_k], none of them empty");
  std::vector<int64_t> seen(size_t(routes.num_experts), -1);
  for (size_t i = 0; i < routes.experts.size(); ++i) {
    int expert = routes.experts[i];
    if (expert < 0) continue;
    int64_t set = int64_t(i) / routes.top_k;
    bool exists = expert < routes.num_experts;
    if (!exists || seen[size_t(expert)] == set) {
      require(false, "experts: token " + std::to_string(set / routes.layers) + ", layer " +
                         std::to_string(set % routes.layers) + " chose expert " + std::to_string(expert) +
                         (exists ? " twice" : " of " + std::to_string(routes.num_experts)));
    }
    seen[size_t(expert)] = set;
  }
}

void check(const RecordedPredictions& predictions, const RecordedRoutes& routes) {
  size_t size =
      size_t(routes.tokens) * size_t(routes.layers + 1) * size_t(predictions.lookahead) * size_t(predictions.width);
  require(predictions.lookahead > 0 && predictions.width > 0 && predictions.experts.size() == size &&
              predictions.probabilities.size() == size,
          "predictions: they are [tokens, layers + 1, lookahead, width] of the same tokens and layers");
}

void check(const SimulatorOptions& options, const RecordedRoutes& routes) {
  require(int(options.capacity.size()) == routes.layers, "capacity: one number for each of " +
                                                             std::to_string(routes.layers) + " layers is needed, got " +
                                                             std::to_string(options.capacity.size()));
  for (int capacity : options.capacity) {
    require(capacity >= routes.top_k && capacity <= routes.num_experts,
            "capacity: a layer has room for one token's " + std::to_string(routes.top_k) + " to all of its " +
                std::to_string(routes.num_experts) + " experts, got " + std::to_string(capacity));
  }
  for (double time : {options.layer_time, options.token_time, options.read_time, options.latency}) {
    require(time >= 0 && std::isfinite(time), "times: none is negative or infinite, got " + std::to_string(time));
  }
  require(options.first_attention >= 0 && options.first_attention <= 1,
          "first_attention: it is 0 ... 1, got " + std::to_string(options.first_attention));
}

}  // namespace

SimulatorResult simulate(const RecordedRoutes& routes, const RecordedPredictions& predictions,
                         const SimulatorOptions& options) {
  check(routes);
  check(options, routes);
  if (options.prefetch == Prefetch::kPredicted) check(predictions, routes);
  return Replay(routes, predictions, options).run();
}

}  // namespace mlx_od_moe
