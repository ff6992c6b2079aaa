// What a forward pass does, told to those who predict: its token, and at each MoE layer the state and the choice.
//
// It is told on the thread that computes, in the order of the computation, and delays it by microseconds.
//
// Threads    Any thread may call any method; passes are told one after the other.
// Ownership  Shares all that it is given until close(): what outlives its user, such as a graph that is still to
//            be computed, then holds nothing that must end on another thread.
// Errors     Those of Prefetcher::reached. Where predicting fails, it stops, and `take_error` says why.
// Units      Layers by the model's index.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "mlx_od_moe/expert_store.h"
#include "mlx_od_moe/export.h"
#include "mlx_od_moe/prediction_queue.h"
#include "mlx_od_moe/prefetcher.h"
#include "mlx_od_moe/shadow_runner.h"
#include "mlx_od_moe/token_experts.h"

namespace mlx_od_moe {

// Predicts from the last layer's states what the next token's first layers will choose, while the disk has nothing
// else to read. Its runner's layers are 0, the last of the model's, and 1, 2 ...: the model's first.
struct NextToken {
  std::shared_ptr<ShadowRunner> runner;  // null: nobody does
  int layer = -1;                        // the model's last
};

class MLX_OD_MOE_API PassObserver {
 public:
  struct Parts {
    std::shared_ptr<ExpertStore> store;
    std::shared_ptr<PredictionQueue> queue;  // the prefetcher's
    std::shared_ptr<Prefetcher> prefetcher;
    std::shared_ptr<ShadowRunner> runner;  // null: nobody predicts by states
    std::vector<int> watched;              // layers whose states the runner is given
    std::optional<TokenExperts> tokens;
    NextToken next;
    // For layers whose predictors take the token before's experts: the layers that they speak of.
    std::map<int, std::vector<int>> previous_at;
  };
  explicit PassObserver(Parts parts) : parts_(std::move(parts)) {}

  // A pass begins, with one token of each sequence: what is queued for earlier ones is dropped, and what
  // the first layers will probably choose is prefetched.
  void begin(std::span<const int32_t> tokens, uint64_t step);

  // A layer has chosen `ids`. `state`: its input, of one token of that sequence, which is predicted from; null:
  // it is only counted, and what the next pass is told is not what follows.
  void observe(int layer, std::span<const int32_t> ids, uint64_t step, const Query* state = nullptr, int sequence = 0);
  // A layer was left out, or its pass failed.
  void miss();
  // Whether something was missed since the last call.
  bool take_missed();
  // Why predicting stopped, once.
  std::optional<std::string> take_error();

  // The experts [rows, n] that the layer has chosen for the last token of each sequence; none: not known.
  void remember(int layer, std::span<const int32_t> ids, int rows);
  // Of the layers that the layer's predictor speaks of [rows, layers, n]; none where it is not known of all.
  std::vector<int32_t> previous(int layer, int rows) const;

  // Lets go of everything. What is told later is ignored.
  void close();

 private:
  struct Chosen {
    std::vector<int32_t> ids;
    int rows = 0;
  };

  void stop(std::string error);
  void predict(int layer, uint64_t step, const Query& state, int sequence);
  void predict_next(uint64_t step, const Query& state);
  std::vector<int32_t> known_previous(int layer, int rows) const;

  mutable std::mutex mutex_;
  Parts parts_;
  std::map<int, Chosen> last_;
  bool missed_ = false, predicts_ = true;
  std::optional<std::string> error_;
};

}  // namespace mlx_od_moe
