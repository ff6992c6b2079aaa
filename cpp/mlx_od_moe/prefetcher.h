// From predictions to prefetches, for as long as they pay.
//
// A prediction of a layer is judged when that layer has chosen: of the experts that it named and that were
// not resident then, how many were chosen (useful) and how many not (wasted). Per target layer and
// distance, where too much is wasted for what is useful, predictions cause no more reads, but are judged
// on; where they have become better, they cause reads again. So the judgement needs no trial reads.
//
// Threads    Any thread may call any method.
// Ownership  Shares the store and the queue.
// Errors     std::invalid_argument, "[Prefetcher] rule, value".
// Units      Layers by the model's index; shares 0 ... 1.
// Costs      A record: about what ExpertStore::prefetch and ::resident take. `reached`: linear in the ids.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "mlx_od_moe/expert_store.h"
#include "mlx_od_moe/export.h"
#include "mlx_od_moe/prediction_queue.h"
#include "mlx_od_moe/prefetch_policy.h"

namespace mlx_od_moe {

struct PrefetcherOptions {
  PrefetchOptions policy;
  // Least share of useful ones among those named and not resident: below, predictions cause no reads;
  // they do again from `pays_again` on. Four wasted reads for a useful one cost more than a wait.
  float pays = .2f;
  float pays_again = .25f;
  // The least probability of what the next token's first layers choose that is worth a read.
  float next_token_threshold = .3f;
  int evidence = 64;    // named experts on which a judgement rests, at least
  float memory = .98f;  // what each use of the layer leaves of the evidence
};

// How the predictions of a layer from so many layers before have done.
struct PredictionRecall {
  int layer = 0;
  int distance = 0;          // 0: from the last layer, at the token before
  uint64_t predictions = 0;  // that were judged
  uint64_t chosen = 0;       // experts that the layer chose, summed over these
  uint64_t named = 0;        // of these, named among the first as many as it chose: recall@k's numerator
  uint64_t useful = 0;       // named while not resident, and chosen
  uint64_t wasted = 0;       // named while not resident, and not chosen
  bool on = true;
};

// A switch that was turned.
struct PrefetchChange {
  int layer;
  int distance;
  bool on;
  float useful_share;
};

class MLX_OD_MOE_API Prefetcher {
 public:
  Prefetcher(std::shared_ptr<ExpertStore> store, std::shared_ptr<PredictionQueue> queue, PrefetcherOptions options);

  // Takes all records that wait in the queue, and prefetches.
  void drain();
  // What a layer will choose for the next token, as was predicted in record.step. Read in that step, when nothing
  // else is to be read: once the next token is known, it knows better.
  void take_next(const PredictionRecord& record);
  // A layer has chosen these experts in that step; an id may come several times.
  void reached(int layer, std::span<const int32_t> ids, uint64_t step);

  std::vector<PredictionRecall> recalls() const;
  // Switches turned since the last call.
  std::vector<PrefetchChange> take_changes();
  // How often each expert of the layer was chosen: once per call of `reached`.
  std::vector<uint64_t> uses(int layer) const;

 private:
  // What was last predicted of a layer from one distance.
  struct Named {
    uint64_t step = 0;  // in which the layer chooses
    bool judged = true;
    std::vector<int16_t> experts;  // likeliest first
    std::vector<uint8_t> absent;   // whether they were not resident then
  };
  struct Distance {
    Named named;
    PredictionRecall recall;
    double useful = 0, wasted = 0;  // the evidence
  };
  struct Layer {
    std::vector<Distance> distances;  // 1 ... lookahead, and the next token's
    std::vector<uint64_t> uses;       // by expert
    std::vector<uint64_t> chosen;     // by expert: the call of `reached` that chose it last
  };

  void take(const PredictionRecord& record);
  void take(const PredictionRecord& record, size_t distance, size_t width, float threshold, uint64_t due);
  static void check(const Layer& layer, std::span<const int32_t> ids);
  // Whether to prefetch.
  bool keep(Distance& distance, const PredictionRecord& record, size_t count, uint64_t due);
  void judge(Layer& layer, Distance& distance, size_t chosen);
  void turn(Distance& distance);
  size_t index(int layer) const;

  const std::shared_ptr<ExpertStore> store_;
  const std::shared_ptr<PredictionQueue> queue_;
  const PrefetcherOptions options_;
  mutable std::mutex mutex_;
  std::vector<Layer> layers_;
  std::vector<PrefetchChange> changes_;
  uint64_t calls_ = 0;
};

}  // namespace mlx_od_moe
