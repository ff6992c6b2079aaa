// Hidden state in, predictions out, on a thread of its own.
//
// What a forward pass does per MoE layer: predict_async, which returns at once, and for the layers ahead
// get_predictions, or a consumer of `queue`, or the callback. One forward pass of the model is a step;
// predictions of any other step are never handed out. Where predictors have a context (sequence_context.h),
// each state is also observed for later tokens, once its own prediction is out; one that was dropped leaves
// a gap there. A batch's tokens have each a context of their own.
//
// Threads    predict_async: one thread at a time. All else: any thread. The runner owns one thread (and
//            its predictors' helpers), which alone waits for hidden states, predicts, and calls back. A
//            child process after fork() has no such thread: there predict_async and get_predictions throw.
// Ownership  Bytes of a Query are copied before predict_async returns. PendingBytes are destroyed on the
//            runner's thread once read. The queue is shared; one that the runner made closes with it.
// Ordering   Slots go to the thread and back through Ring's release -> acquire pairs. awaited_ (release
//            -> acquire): a layer that no submission is under way for has its last prediction in the
//            table. step_ (release -> acquire) follows begin_step of the queue.
// Errors     std::invalid_argument, "[ShadowRunner] rule, value", at the call. What fails later, a hidden
//            state that is not finite or a callback that throws, is thrown by a later call, one at a
//            time and in order; that call does nothing else.
// Units      Layers by the model's index; deadlines by std::chrono::steady_clock; latencies in ns, from
//            "the hidden state is there" to "all its records are in the queue".
// Costs      predict_async copies one token's state (16 KB of float32: about 1 us) and wakes the thread
//            if it sleeps. A batch reads the weights once per 64 tokens, and each token's own context. The thread spins
//            for Parking::kSpin after each prediction, then sleeps.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <thread>
#include <vector>

#include "mlx_od_moe/export.h"
#include "mlx_od_moe/parking.h"
#include "mlx_od_moe/prediction_queue.h"
#include "mlx_od_moe/prediction_table.h"
#include "mlx_od_moe/predictor.h"

namespace mlx_od_moe {

// One MoE layer's predictor and the layers that it speaks of, by distance; further distances than
// there are targets are not predicted.
struct LayerPredictor {
  int layer = 0;
  Predictor predictor;
  std::vector<int> targets;
};

struct RunnerOptions {
  int k = 0;         // experts predicted per layer, 1 ... 32; 0: the predictor's top_k
  int capacity = 8;  // hidden states that may wait; one more, and the oldest of them is dropped
};

// A hidden state that is computed elsewhere, or too large to copy.
class PendingBytes {
 public:
  virtual ~PendingBytes() = default;
  // The runner's thread: waits for the bytes, and returns them. They last as long as this object.
  virtual const void* wait() = 0;
};

// All counts since construction. submitted == predicted + observed + dropped + expired + failed + waiting.
struct RunnerStatistics {
  uint64_t submitted = 0;
  uint64_t predicted = 0;
  uint64_t observed = 0;  // at layers without a predictor: only for the context of later tokens
  uint64_t dropped = 0;   // for want of room, or left at close()
  uint64_t expired = 0;   // their step was over before they were predicted
  uint64_t failed = 0;    // see Errors
  uint64_t waiting = 0;
  uint64_t errors = 0;         // of predictions and callbacks; the first 100 that wait are thrown
  int64_t latency_p50_ns = 0;  // within 1/8
  int64_t latency_p99_ns = 0;
};

class MLX_OD_MOE_API ShadowRunner {
 public:
  using Clock = Parking::Clock;
  using OnPrediction = std::function<void(const PredictionRecord&)>;

  // `moe_layers`: all that exist, rising; those without a predictor are accepted and predict nothing.
  // Without a queue it makes one. `on_prediction` is called for every record, after it is in the queue.
  ShadowRunner(std::vector<LayerPredictor> predictors, std::vector<int> moe_layers, const RunnerOptions& options = {},
               std::shared_ptr<PredictionQueue> queue = nullptr, OnPrediction on_prediction = nullptr);
  ~ShadowRunner();
  ShadowRunner(const ShadowRunner&) = delete;
  ShadowRunner& operator=(const ShadowRunner&) = delete;

  // Returns the step: `step`, or without one the current step, or the next where this layer does not
  // come after the last one submitted. Steps never go back. `bytes` takes the place of query.hidden.
  // Where predictors have a context, the tokens are the next ones of `sequence`: a forward pass has as many
  // at each of its layers, which rise. With several sequences in turns, give the step.
  uint64_t predict_async(int layer, const Query& query, std::unique_ptr<PendingBytes> bytes = nullptr,
                         std::optional<uint64_t> step = std::nullopt, int sequence = 0);
  // The same for a batch: token i is the next one of sequences[i], all of them different. Each is predicted for
  // with its own context, and observed there; the prediction is one, the union of what they want. A sequence
  // may be in a batch at one pass and alone at the next. One whose row fails gets a gap, the others do not.
  uint64_t predict_async(int layer, const Query& query, std::unique_ptr<PendingBytes> bytes,
                         std::optional<uint64_t> step, std::span<const int> sequences);

  // What became of a sequence's prompt cache, for all that is handed in after; like predict_async one thread
  // at a time. Without contexts they do nothing. reset frees the sequence's memory, trim forgets its last
  // `tokens` tokens (see SequenceContext::trim), fork makes `to` a copy of it.
  void reset(int sequence = 0);
  void trim(int sequence, int64_t tokens);
  void fork(int sequence, int to);

  // The layer's freshest experts of the current step, best first; empty where there are none. With a
  // deadline it waits until no submission for the layer is under way; `*settled` tells whether.
  std::vector<ScoredExpert> get_predictions(int layer, Clock::time_point deadline = Clock::time_point::min(),
                                            bool* settled = nullptr) const;

  // The layer's predictor, null where it has none. Throws std::invalid_argument for no MoE layer.
  const Predictor* predictor(int layer) const;
  int hidden_size(int layer) const;  // of the layer's states; 0 where they are not read
  const std::vector<int>& moe_layers() const;
  const std::shared_ptr<PredictionQueue>& queue() const;
  uint64_t step() const;
  RunnerStatistics statistics() const;

  // Ends the thread; what waits is dropped. Called on that thread, by a callback, it only asks for that.
  void close();
  bool closed() const;
  bool on_its_thread() const;  // as a callback is
  // Throws the oldest error that no call has thrown yet, if any.
  void check() const;

 private:
  class Worker;
  uint64_t hand_in(int layer, const Query& query, std::unique_ptr<PendingBytes> bytes, std::optional<uint64_t> step,
                   std::span<const int> sequences, int tokens_of_each);

  const bool own_queue_;
  std::shared_ptr<Worker> worker_;  // the thread's own reference outlives this in a forked child
  std::mutex closing_;
  std::unique_ptr<std::thread> thread_;
};

}  // namespace mlx_od_moe
