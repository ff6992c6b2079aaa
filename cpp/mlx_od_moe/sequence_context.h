// What the tokens of one sequence left for the predictions of later ones.
//
// When a token has passed a MoE layer, `observe` keeps its key, value and state there (see ContextMemory).
// As soon as it has passed all targets of a layer, that layer's previous_state product is computed and kept.
// Where queries are early, the next layer's attention is computed and kept as well, with what this token's state
// asks. All this is off the critical path: a prediction, Predictor::logits with Query::sequence, only adds
// these vectors; it attends itself where its own state asks. Tokens are counted from 0 in the order in which
// they are observed:
//   * an empty context, as at a sequence's first token, adds nothing;
//   * the tokens of one call, as in prefill, see those before the call, at their true distance; what its own
//     tokens leave at later layers is not known when they are predicted for. Of a call with more than
//     kMaxTokens tokens early queries are left out;
//   * a token that was not observed at a layer leaves a gap there, which nobody sees.
//
// Threads    One at a time; several may read at once (Predictor::logits does no more).
// Ownership  Shares the predictors' weights. A copy is independent of the original: that is a fork.
// Errors     std::invalid_argument, "[SequenceContext] rule, value".
// Units      Layers by the model's index; positions and lengths in tokens.
// Costs      Per target layer about (window + 16) * (2 * key_size * b + 8) + 17 * state_size * 4 bytes, key_size
//            and window + 16 rounded up to 64, b = 4 where the predictors' format is f32, else 2 (exactly:
//            ContextMemory::most_bytes); per predictor predictor_size * 4 bytes; and as many for each token of
//            the last call, where queries are early.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

#include "mlx_od_moe/export.h"
#include "mlx_od_moe/predictor.h"

namespace mlx_od_moe {

struct AttentionScratch;

class MLX_OD_MOE_API SequenceContext {
 public:
  // For a bundle's predictors, by layer. None of them has a context: it remembers nothing.
  explicit SequenceContext(const std::map<int, Predictor>& predictors);
  SequenceContext(const SequenceContext& other);
  SequenceContext(SequenceContext&& other) noexcept;
  SequenceContext& operator=(const SequenceContext& other);
  SequenceContext& operator=(SequenceContext&& other) noexcept;
  ~SequenceContext();

  // Tokens have passed the layer: states.hidden [tokens, hidden_size]. `states.position` is that of the first
  // (-1: after the last one observed there), not before length(layer). Ignored where no predictor looks at
  // the layer. States that are not finite are refused, and leave a gap.
  void observe(int layer, const Query& states);
  // Of a batch's tokens this sequence's, the `row`th, has passed the layer; `position` is its own.
  void observe_row(int layer, const Query& states, int row, int64_t position);

  void reset() { trim_to(0); }
  // Forgets the last `tokens` tokens, as a prompt cache that is trimmed does. Up to 16 tokens
  // (ContextMemory::kSpare) nothing else is lost. Beyond, the tokens that the rings had dropped for them are missing:
  // attention sees the rest of its window, and without a previous token's state nothing is added for it.
  void trim(int64_t tokens);
  void trim_to(int64_t length);

  int64_t length() const;           // tokens that have passed the layer that most have passed
  int64_t length(int layer) const;  // tokens that have passed this one; 0 where it is not remembered
  // Whether tokens leave anything there.
  bool remembers(int layer) const { return layers_.contains(layer) || asking_.contains(layer); }
  bool empty() const;       // no predictor has a context
  int hidden_size() const;  // 0 where it is empty
  size_t bytes() const;     // held now

  // What the forward asks for. A source is a predictor; throws where it is not one of these.
  size_t source_of(const PackedPredictor& predictor) const;
  int64_t position(size_t source) const;  // of the next token
  // Whether attention is left to the forward, and there is anything to see.
  bool attends(size_t source, int64_t position) const;
  // The kept vector [predictor_size] for the token at `position`; null where there is none.
  const float* previous_state(size_t source, int64_t position) const;
  // Likewise, of an early query.
  const float* attended(size_t source, int64_t position) const;
  // All heads: query [lookahead * key_size] to out, likewise.
  void attend(size_t source, int64_t position, const float* query, AttentionScratch& scratch, float* out) const;

 private:
  struct Memory;
  struct Source;
  // What attention found for the tokens of the last call, before their states reach the source's own layer.
  struct Attended {
    size_t source = 0;
    int64_t position = 0;        // of the first
    int tokens = 0;              // 0: nothing was found
    std::vector<float> vectors;  // [tokens, predictor_size]
  };

  void add(const Predictor& predictor);
  void observe(int layer, const Query& states, int begin, int tokens, int64_t given);
  void remember(Memory& memory, const Query& states, int begin, int tokens, int64_t position);
  void encode(Memory& memory, const Query& states, int first, int tokens, int64_t position);
  void ask(size_t source, const Query& states, int first, int tokens, int64_t position);
  bool sees(size_t source, int64_t position) const;
  void refresh(Source& source, int64_t position);

  std::vector<Predictor> predictors_;  // keep the weights
  ContextConfig config_;
  std::vector<Memory> memories_;
  std::map<int, size_t> layers_;  // to memories
  std::map<int, size_t> asking_;  // to the sources that a layer's states ask for, before their own do
  std::vector<Source> sources_;
  Attended attended_;
};

}  // namespace mlx_od_moe
