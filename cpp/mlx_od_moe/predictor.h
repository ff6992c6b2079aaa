// The shadow model's forward: hidden state in, expert ids out, in one pass on CPU threads.
//
// Per distance d = 1 ... lookahead, as Python's ExpertPredictor defines it:
//   logits[d] = heads[d](act(norm(trunk(p(x)) + previous(e) + context))) + gate_scale[d] * router[d](x * s[d])
// with each part present where the configuration asks for it; p is the projection to the trunk's rank; context is what
// a SequenceContext gives for earlier tokens, or the caller's own vector. `logits` are calibrated where the predictor
// has a calibration (calibration.h), which changes no ranking. Then the k best ids of each distance, best
// first; of equal scores the lower id first.
//
// Threads    Immutable once made: any number of threads may call `logits` and `predict` at once. A call
//            uses its own thread and at most threads - 1 helpers, which all copies of a Predictor (and
//            all predictors packed together) share; a helper that is busy is done without. Results do
//            not depend on the number of threads.
// Ownership  Weights are copied at construction. A Predictor is a handle: copies share the weights.
// Errors     std::invalid_argument, "[NativePredictor] rule, value": for wrong shapes and formats, and
//            for a hidden state that is not finite (NaN or infinite), before anything is written.
// Units      Shapes as [tokens, lookahead, ...], rows contiguous; tokens >= 0.
// Costs      A forward reads all weights once per 64 tokens, and takes about as long as that. It
//            allocates nothing, once a thread has made a call of that size.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "mlx_od_moe/export.h"
#include "mlx_od_moe/weights.h"

namespace mlx_od_moe {

class SequenceContext;
struct PackedPredictor;

enum class Format { f32, f16, bf16, int8, int4 };

// "f32" ... "int4"; throws std::invalid_argument naming the formats.
MLX_OD_MOE_API Format parse_format(const std::string& name);
MLX_OD_MOE_API const char* format_name(Format format);

struct PredictorOptions {
  Format format = Format::int4;
  int threads = 1;      // 1 ... 64
  int group_size = 64;  // of int4: 32, 64 or 128 columns share a scale
};

// Where one token of a query stands: in what sequence (null: none), and in what place of it; -1 as for a Query.
struct QueryRow {
  const SequenceContext* sequence = nullptr;
  int64_t position = -1;
};

// The input of one call.
struct Query {
  const void* hidden = nullptr;  // [tokens, hidden_size]
  DType dtype = DType::float32;  // float32, float16 or bfloat16
  int tokens = 0;
  // The previous token's experts at the target layers, [tokens, lookahead, num_previous]; -1: none.
  const int32_t* previous = nullptr;
  int num_previous = 0;
  // Added to the trunk's output, [tokens, predictor_size].
  const float* context = nullptr;
  // What the tokens before this query's left, for predictors of bundles with a context; null: nothing. It
  // must not change while the call lasts. `position`: of the first token; -1: where the nearest target's
  // memory ends, as in decoding.
  const SequenceContext* sequence = nullptr;
  int64_t position = -1;
  // In place of these two: the tokens are of several sequences, as a batch's are, [tokens]. Null: of one.
  const QueryRow* rows = nullptr;
};

class MLX_OD_MOE_API Predictor {
 public:
  explicit Predictor(const PredictorWeights& weights, const PredictorOptions& options = {});

  // Several predictors in one allocation, with one set of helper threads. Routers and projections that
  // several of them point to are packed once.
  static std::vector<Predictor> pack(const std::vector<PredictorWeights>& weights,
                                     const PredictorOptions& options = {});

  // out [tokens, lookahead, num_experts].
  void logits(const Query& query, float* out) const;
  // ids [tokens, lookahead, k], 1 <= k <= min(32, num_experts).
  void predict(const Query& query, int k, int32_t* ids) const;

  const PredictorConfig& config() const;
  const PredictorOptions& options() const;
  const char* kernel() const;              // "amx", "avx512", "avx2", "neon" or "scalar"
  std::vector<int> memory_layers() const;  // that its context reads, nearest first; none without a context
  const PackedPredictor& packed() const;
  bool shares_weights_with(const Predictor& other) const { return layer_ == other.layer_; }
  size_t weight_bytes() const;  // read by one forward
  // Of these, how many its projection has; predictors that share it find it in a cache.
  size_t projection_bytes() const;

 private:
  class Layer;
  explicit Predictor(std::shared_ptr<const Layer> layer);
  std::shared_ptr<const Layer> layer_;
};

// The kernels that this CPU runs, best first. MLX_OD_MOE_KERNEL chooses another than the first.
MLX_OD_MOE_API std::vector<std::string> available_kernels();

}  // namespace mlx_od_moe
