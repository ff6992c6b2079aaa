// The contexts of a runner's sequences, and where each sequence's next tokens stand.
//
// The submitting thread says which tokens it hands in and what became of the prompt caches; the predicting
// thread, some states behind, comes to each change when it comes to the next state.
//
// Threads    `place`, `reset`, `trim`, `fork`: the submitting thread. `context`: the predicting thread.
// Ownership  Holds the contexts; they share the predictors' weights.
// Ordering   changes_ is guarded by mutex_; changed_ (release -> acquire) only tells that there are any.
// Errors     std::invalid_argument, "[ShadowRunner] rule, value"; std::bad_alloc.
// Costs      Per sequence what SequenceContext says, until `reset`. A fork copies it. `context` takes a lock
//            after a change only.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "mlx_od_moe/sequence_context.h"

namespace mlx_od_moe {

// Where tokens that are handed in belong.
struct SequencePlace {
  int sequence = 0;
  int64_t position = 0;  // of the first
  uint64_t ticket = 0;   // rises from call to call; that of all sequences of one call
};

// Throws unless these are so many different sequences, one for each token of a batch.
void check_batch(std::span<const int> sequences, int tokens);

class SequenceTable {
 public:
  explicit SequenceTable(const std::map<int, Predictor>& predictors) : none_(predictors) {}

  const SequenceContext& none() const { return none_; }  // that of a sequence without tokens

  // So many tokens of each of these sequences, all different, at a layer. A sequence's forward pass is over
  // where `layer` does not come after its last one, or where a step is given and is another. What throws
  // changes none of them. The places last until the next call.
  std::span<const SequencePlace> place(std::span<const int> sequences, int layer, int tokens, uint64_t step,
                                       bool given);
  void reset(int sequence) { trim_to(sequence, 0); }
  void trim(int sequence, int64_t tokens);
  void fork(int sequence, int to);

  // Comes to all changes before the place first. The context stays where it is, and as it is but for what is
  // observed, until a call comes to a change of this sequence: between places of one ticket none does.
  SequenceContext& context(const SequencePlace& place);

 private:
  // The forward pass that a sequence is in.
  struct Pass {
    int64_t position = 0;
    int tokens = 0;
    std::optional<int> layer;  // the last one handed in
    uint64_t step = 0;
  };
  struct Change {
    uint64_t ticket;  // before what has this one
    int sequence;
    std::optional<int> to;  // a fork
    int64_t length;         // else what is kept
  };

  void trim_to(int sequence, int64_t length);
  void note(const Change& change);
  void apply(const Change& change);

  const SequenceContext none_;

  // The submitting thread's.
  std::map<int, Pass> passes_;
  uint64_t next_ticket_ = 0;
  std::vector<Pass*> entered_;  // by the last call to `place`
  std::vector<SequencePlace> places_;

  std::mutex mutex_;
  std::vector<Change> changes_;
  std::atomic<bool> changed_{false};

  // The predicting thread's.
  std::map<int, SequenceContext> contexts_;  // whose references outlast what becomes of others
};

}  // namespace mlx_od_moe
