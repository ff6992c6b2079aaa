#include "mlx_od_moe/weights.h"

#include <algorithm>
#include <stdexcept>

namespace mlx_od_moe {
namespace {

[[noreturn]] void refuse(const char* what, const char* names, const std::string& name) {
  throw std::invalid_argument("[PredictorConfig] " + std::string(what) + " is one of " + names + ", not '" + name +
                              "'");
}

void check_range(const char* place, const char* name, int value, int lowest, int highest) {
  if (value < lowest || value > highest) {
    throw std::invalid_argument("[" + std::string(place) + "] " + name + " must be " + std::to_string(lowest) +
                                " ... " + std::to_string(highest) + ", got " + std::to_string(value));
  }
}

Tensor find(const Tensors& tensors, const std::string& name) {
  const auto found = tensors.find(name);
  return found == tensors.end() ? Tensor{} : found->second;
}

Linear find_linear(const Tensors& tensors, const std::string& name, const Quantization& quantization) {
  Linear linear;
  linear.weight = find(tensors, name + ".weight");
  linear.bias = find(tensors, name + ".bias");
  linear.scales = find(tensors, name + ".scales");
  linear.biases = find(tensors, name + ".biases");
  if (linear.scales) {
    linear.bits = quantization.bits;
    linear.group_size = quantization.group_size;
  }
  return linear;
}

}  // namespace

Activation parse_activation(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "relu") return Activation::relu;
  refuse("activation", "silu, relu", name);
}

Term parse_term(const std::string& name) {
  if (name == "mlp") return Term::mlp;
  if (name == "mlp+gate") return Term::mlp_gate;
  if (name == "gate") return Term::gate;
  refuse("a term", "mlp, mlp+gate, gate", name);
}

Scoring parse_scoring(const std::string& name) {
  if (name == "softmax") return Scoring::softmax;
  if (name == "sigmoid") return Scoring::sigmoid;
  refuse("a router's scoring", "softmax, sigmoid", name);
}

PredictorWeights find_predictor(const Tensors& tensors, const std::string& prefix, const PredictorConfig& config,
                                const Quantization& quantization) {
  PredictorWeights weights;
  weights.config = config;
  weights.projection = find_linear(tensors, prefix + "projection.linear", quantization);
  weights.trunk = find_linear(tensors, prefix + "trunk", quantization);
  weights.heads = find_linear(tensors, prefix + "heads", quantization);
  weights.norm_weight = find(tensors, prefix + "norm.weight");
  weights.norm_bias = find(tensors, prefix + "norm.bias");
  weights.previous = find_linear(tensors, prefix + "previous", quantization);
  weights.gate_scale = find(tensors, prefix + "gate_scale");
  weights.gate_input_scale = find(tensors, prefix + "gate_input_scale");
  weights.calibration = find(tensors, prefix + "calibration");
  weights.context.query = find_linear(tensors, prefix + "context.query", quantization);
  weights.context.attended = find_linear(tensors, prefix + "context.attended", quantization);
  weights.context.previous_state = find_linear(tensors, prefix + "context.previous_state", quantization);
  weights.context.position_bias = find(tensors, prefix + "context.position_bias");
  return weights;
}

Linear find_projection(const Tensors& tensors, const Quantization& quantization) {
  return find_linear(tensors, "projection.linear", quantization);
}

Router find_router(const Tensors& tensors, const std::string& prefix, const Quantization& quantization) {
  Router router;
  router.linear = find_linear(tensors, prefix + "linear", quantization);
  router.correction = find(tensors, prefix + "correction");
  return router;
}

TokenMemory find_memory(const Tensors& tensors, int layer, const Quantization& quantization) {
  return {layer, find_linear(tensors, "memories." + std::to_string(layer) + ".encode", quantization)};
}

bool PredictorConfig::has_mlp() const {
  return terms.empty() || std::any_of(terms.begin(), terms.end(), [](Term t) { return t != Term::gate; });
}

bool PredictorConfig::has_gate() const {
  return std::any_of(terms.begin(), terms.end(), [](Term t) { return t != Term::mlp; });
}

void ContextConfig::check() const {
  check_range("ContextConfig", "window", window, 0, 1 << 16);
  check_range("ContextConfig", "key_size", key_size, 0, 1 << 16);
  check_range("ContextConfig", "state_size", state_size, 0, 1 << 16);
  if ((window == 0) != (key_size == 0)) {
    throw std::invalid_argument("[ContextConfig] window and key_size are both 0 or neither, got " +
                                std::to_string(window) + " and " + std::to_string(key_size));
  }
}

void PredictorConfig::check() const {
  // Far beyond any model, and small enough that no product of two overflows.
  check_range("PredictorConfig", "hidden_size", hidden_size, 1, 1 << 20);
  check_range("PredictorConfig", "predictor_size", predictor_size, 1, 1 << 20);
  check_range("PredictorConfig", "trunk_rank", trunk_rank, 0, 1 << 20);
  check_range("PredictorConfig", "num_experts", num_experts, 1, 1 << 16);
  check_range("PredictorConfig", "lookahead", lookahead, 1, 1 << 8);
  check_range("PredictorConfig", "top_k", top_k, 1, num_experts);
  context.check();
  if (!terms.empty() && terms.size() != static_cast<size_t>(lookahead)) {
    throw std::invalid_argument("[PredictorConfig] terms needs one entry for each of " + std::to_string(lookahead) +
                                " distances, got " + std::to_string(terms.size()));
  }
}

}  // namespace mlx_od_moe
