// A predictor as it comes from Python or from a file: its configuration and where its tensors lie.
//
// Ownership  Nothing is owned: tensors must stay valid while a Predictor is made from them, no longer.
// Units      Shapes as [rows, columns]; vectors have one row. Rows are contiguous.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "mlx_od_moe/export.h"

namespace mlx_od_moe {

enum class DType { float32, float16, bfloat16, uint32 };

struct Tensor {
  const void* data = nullptr;
  DType dtype = DType::float32;
  size_t rows = 0;
  size_t columns = 0;

  explicit operator bool() const { return data != nullptr; }
};

// A matrix [rows, columns], dense, or in MLX's affine format: `weight` holds uint32 words of
// 32 / bits values, lowest bits first; scales and biases have one entry per `group_size` columns.
struct Linear {
  Tensor weight;
  Tensor scales;
  Tensor biases;
  int bits = 0;  // 0: dense
  int group_size = 0;
  Tensor bias;  // optional, [rows]

  explicit operator bool() const { return static_cast<bool>(weight); }
  size_t rows() const { return weight.rows; }
  size_t columns() const { return bits == 0 ? weight.columns : weight.columns * 32 / static_cast<size_t>(bits); }
};

enum class Activation { silu, relu };
enum class Term { mlp, mlp_gate, gate };  // what a distance's logits are made of
enum class Scoring { softmax, sigmoid };

// By the names that Python's ExpertPredictor uses; each throws std::invalid_argument listing them.
MLX_OD_MOE_API Activation parse_activation(const std::string& name);
MLX_OD_MOE_API Term parse_term(const std::string& name);
MLX_OD_MOE_API Scoring parse_scoring(const std::string& name);

// The same options as Python's RouterConfig.
struct Router {
  Linear linear;
  Tensor correction;  // optional, [num_experts]
  Scoring scoring = Scoring::softmax;
  int n_group = 1;
  int topk_group = 1;
};

// The same options as Python's ContextConfig; all 0: no context.
struct MLX_OD_MOE_API ContextConfig {
  int window = 0;           // earlier tokens that attention sees
  int key_size = 0;         // width of a token's key and of its value
  int state_size = 0;       // width of the previous token's encoded state
  bool early_query = true;  // attention's query is of the state at the MoE layer before, where there is one

  bool operator==(const ContextConfig&) const = default;
  explicit operator bool() const { return window > 0 || state_size > 0; }
  int memory_size() const { return 2 * key_size + state_size; }  // numbers that a token leaves at a layer
  void check() const;                                            // throws std::invalid_argument
};

// The same options as Python's PredictorConfig.
struct MLX_OD_MOE_API PredictorConfig {
  int hidden_size = 4096;
  int predictor_size = 1024;
  int trunk_rank = 0;  // 0: the trunk is one matrix
  int num_experts = 384;
  int lookahead = 4;
  int top_k = 8;
  Activation activation = Activation::relu;
  bool layer_norm = false;
  std::vector<Term> terms;  // one per distance; empty: all mlp
  bool previous_experts = false;
  ContextConfig context;

  bool has_mlp() const;
  bool has_projection() const { return has_mlp() && trunk_rank > 0; }
  int trunk_inputs() const { return trunk_rank > 0 ? trunk_rank : hidden_size; }
  bool has_context() const { return has_mlp() && context; }
  bool has_gate() const;
  void check() const;  // throws std::invalid_argument
};

// What a token leaves at one MoE layer: encode [2 * key_size + state_size, hidden_size] times its state.
struct TokenMemory {
  int layer = 0;
  Linear encode;
};

// How a predictor reads the memories of its targets.
struct ContextWeights {
  Linear query;           // [lookahead * key_size, hidden_size]
  Linear attended;        // [predictor_size, lookahead * key_size]
  Linear previous_state;  // [predictor_size, lookahead * state_size]
  Tensor position_bias;   // [lookahead, window + 1]
  // Per distance, shared between predictors. None: its caller brings the context's vectors.
  std::vector<const TokenMemory*> memories;
  std::optional<int> query_layer;  // whose states the query is of; none: the predictor's own
};

struct PredictorWeights {
  PredictorConfig config;
  Linear projection;  // [trunk_rank, hidden_size], where there is a rank; may be shared between predictors
  Linear trunk;       // [predictor_size, trunk_rank or hidden_size]
  Linear heads;
  Tensor norm_weight;
  Tensor norm_bias;
  Linear previous;
  Tensor gate_scale;
  Tensor gate_input_scale;
  Tensor calibration;                  // optional, [lookahead, 2]: see calibration.h
  std::vector<const Router*> routers;  // per distance, or none; may be shared between predictors
  ContextWeights context;
};

// Tensors by name. A matrix is quantised where `NAME.scales` is there; then as `quantization` says.
using Tensors = std::map<std::string, Tensor>;
struct Quantization {
  int bits = 0;
  int group_size = 0;
};

// What of `tensors` belongs to the predictor or the router whose names begin with `prefix`.
MLX_OD_MOE_API PredictorWeights find_predictor(const Tensors& tensors, const std::string& prefix,
                                               const PredictorConfig& config, const Quantization& quantization);
// The projection that a bundle's predictors share; none where they don't.
MLX_OD_MOE_API Linear find_projection(const Tensors& tensors, const Quantization& quantization);
MLX_OD_MOE_API Router find_router(const Tensors& tensors, const std::string& prefix, const Quantization& quantization);
MLX_OD_MOE_API TokenMemory find_memory(const Tensors& tensors, int layer, const Quantization& quantization);

}  // namespace mlx_od_moe
