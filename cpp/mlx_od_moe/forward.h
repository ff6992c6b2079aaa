// One predictor's packed weights, and the memory of one call's forward through them.
//
// Threads    PackedPredictor is immutable. A Forward belongs to the calling thread; helpers that joined
//            it read its prepared activations and write their own lane (see workers.h).
// Ownership  PackedPredictor points into an Arena that outlives it. Each thread keeps its Forwards.
// Units      Shapes as [tokens, ...]; at most kMaxTokens tokens a time.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "mlx_od_moe/calibration.h"
#include "mlx_od_moe/context_memory.h"
#include "mlx_od_moe/packed_matrix.h"
#include "mlx_od_moe/predictor.h"
#include "mlx_od_moe/sequence_context.h"
#include "mlx_od_moe/workers.h"

namespace mlx_od_moe {

constexpr int kMaxTokens = 64;      // of one pass over the weights
constexpr int kPanelsPerBlock = 4;  // what a thread claims at once: 64 rows

kernels::Type kernel_type(DType dtype);  // throws where no state is of that type

struct PackedRouter {
  PackedMatrix matrix;
  const float* bias = nullptr;        // [num_experts], or none
  const float* correction = nullptr;  // [num_experts], or none
  Scoring scoring = Scoring::softmax;
  int n_group = 1;
  int topk_group = 1;
};

struct PackedMemory {
  int layer = 0;
  PackedMatrix encode;
};

// Without memories nothing is packed.
struct PackedContext {
  PackedMatrix query;
  PackedMatrix attended;
  PackedMatrix previous_state;
  const float* position_bias = nullptr;  // [lookahead, window + 1]
  std::optional<int> query_layer;        // whose states ask, before the predictor's own layer; none: its own do
  std::vector<PackedMemory> memories;    // per distance; their matrices are shared between predictors
};

struct PackedPredictor {
  PredictorConfig config;
  Packing packing{};
  PackedMatrix projection;
  PackedMatrix trunk;
  PackedMatrix heads;
  const float* trunk_bias = nullptr;
  const float* heads_bias = nullptr;
  const float* norm_weight = nullptr;
  const float* norm_bias = nullptr;
  const void* previous = nullptr;  // transposed: [lookahead * num_experts, predictor_size]
  kernels::Type previous_type = kernels::kFloat32;
  std::vector<float> gate_scale;               // per distance
  std::vector<const float*> gate_input_scale;  // per distance [hidden_size]; null where all ones
  std::vector<PackedRouter> routers;           // per distance; unused ones are empty
  PackedContext context;
  Calibration calibration;

  bool uses_mlp(int d) const { return config.terms[static_cast<size_t>(d)] != Term::gate; }
  bool uses_gate(int d) const { return config.terms[static_cast<size_t>(d)] != Term::mlp; }
  size_t weight_bytes() const;
};

class Forward : public SharedWork {
 public:
  // This thread's, not in use by helpers any more.
  static Forward& of_this_thread();

  // Logits, not calibrated, of `tokens` <= kMaxTokens tokens from `first` on into out [tokens, lookahead, num_experts].
  // Throws std::invalid_argument where a hidden state is not finite.
  void run(const PackedPredictor& predictor, Workers* workers, const Query& query, int first, int tokens, float* out);

  // Scratch that stays valid until the next call: for `n` floats and ids.
  float* logits(size_t n);
  int32_t* candidates(size_t n);

  void run_block(int phase, int block, int lane) noexcept override;

 private:
  // A token's context, if any, and where it stands there.
  struct Place {
    const SequenceContext* sequence = nullptr;
    size_t source = 0;
    int64_t position = 0;
    bool attends = false;  // that is left to do, and some earlier token can be seen
  };
  // One matrix and its input within a phase; its results start at `column` of the phase's rows.
  struct Product {
    const PackedMatrix* matrix;
    kernels::Tokens tokens;
    int column;
    int first_block;
  };
  struct Stage {
    std::vector<Product> products;
    int blocks = 0;
    int width = 0;             // floats per token of the results
    std::vector<float> lanes;  // [lanes][tokens][width]
    Activations inputs;
  };

  void begin_stage(Stage& stage, size_t inputs, int columns, int tokens);
  static void add_product(Stage& stage, const PackedMatrix& matrix, const kernels::Tokens& tokens);
  void run_stage(int phase);
  bool projects() const { return predictor_->config.has_projection(); }
  int trunk_phase() const { return projects() ? 1 : 0; }
  int heads_phase() const { return projects() || attends_ ? 2 : 1; }
  const float* result(int phase, size_t product, int token) const;

  void load_hidden(const Query& query, int first, int tokens);
  Place place(const SequenceContext* sequence, int64_t position, int first) const;
  void find_contexts(const Query& query, int first, int tokens);
  void open_first_stage(int tokens);
  void open_second_stage(int tokens);
  void attend(int tokens, int columns);
  void finish_trunk(const Query& query, int first, int tokens);
  void add_previous(const Query& query, int token, float* z) const;
  void finish_scores(const float* router_logits, int d, float* scores) const;
  void combine(int tokens, float* out);

  const PackedPredictor* predictor_ = nullptr;
  int tokens_ = 0;
  int lanes_ = 1;
  Place places_[kMaxTokens];
  bool attends_ = false;  // some of these tokens do
  Stage stages_[kPhases];
  std::vector<float> hidden_, scaled_, projected_, read_, inner_, scores_, logits_;
  std::vector<int32_t> candidates_;
  AttentionScratch attention_;
};

}  // namespace mlx_od_moe
