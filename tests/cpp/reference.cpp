#include "reference.h"

#include <algorithm>
#include <cmath>

namespace mlx_od_moe::tests {
namespace {

const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.data); }

double dot(const float* a, const double* b, size_t n) {
  double sum = 0;
  for (size_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

void layer_norm(std::vector<double>& x, const float* weight, const float* bias) {
  const auto n = static_cast<double>(x.size());
  double mean = 0;
  for (double v : x) mean += v / n;
  double variance = 0;
  for (double v : x) variance += (v - mean) * (v - mean) / n;
  for (size_t i = 0; i < x.size(); ++i) x[i] = (x[i] - mean) / std::sqrt(variance + 1e-5) * weight[i] + bias[i];
}

}  // namespace

RandomPredictor::RandomPredictor(const PredictorConfig& config, unsigned seed, const RouterOptions& options,
                                 bool biases)
    : generator_(seed) {
  const auto hidden = static_cast<size_t>(config.hidden_size);
  const auto inner = static_cast<size_t>(config.predictor_size);
  const auto experts = static_cast<size_t>(config.num_experts);
  const auto lookahead = static_cast<size_t>(config.lookahead);
  const auto deviation = [](size_t n) { return 1.0f / std::sqrt(static_cast<float>(n)); };
  weights_.config = config;
  if (config.has_mlp()) {
    const auto inputs = static_cast<size_t>(config.trunk_inputs());
    if (config.has_projection()) weights_.projection.weight = tensor(inputs, hidden, deviation(hidden));
    weights_.trunk.weight = tensor(inner, inputs, deviation(inputs));
    weights_.heads.weight = tensor(lookahead * experts, inner, deviation(inner));
    if (biases) weights_.trunk.bias = tensor(1, inner, 0.3f);
    if (biases) weights_.heads.bias = tensor(1, lookahead * experts, 0.3f);
    weights_.norm_weight = tensor(1, inner, 0.1f, 1);
    weights_.norm_bias = tensor(1, inner, 0.1f);
    if (config.previous_experts) weights_.previous.weight = tensor(inner, lookahead * experts, 0.2f);
  }
  if (!config.has_gate()) return;
  weights_.gate_scale = tensor(1, lookahead, 0.2f, 1);
  weights_.gate_input_scale = tensor(lookahead, hidden, 0.2f, 1);
  for (size_t d = 0; d < lookahead; ++d) {
    auto router = std::make_unique<Router>();
    router->linear.weight = tensor(experts, hidden, deviation(hidden));
    if (options.bias) router->linear.bias = tensor(1, experts, 0.3f);
    if (options.correction) router->correction = tensor(1, experts, 0.3f);
    router->scoring = options.scoring;
    router->n_group = options.n_group;
    router->topk_group = options.topk_group;
    weights_.routers.push_back(router.get());
    routers_.push_back(std::move(router));
  }
}

std::vector<float> RandomPredictor::values(size_t n, float deviation) {
  std::normal_distribution<float> distribution(0, deviation);
  std::vector<float> out(n);
  for (float& v : out) v = distribution(generator_);
  return out;
}

Tensor RandomPredictor::tensor(size_t rows, size_t columns, float deviation, float mean) {
  memory_.push_back(std::make_unique<std::vector<float>>(values(rows * columns, deviation)));
  for (float& v : *memory_.back()) v += mean;
  return {memory_.back()->data(), DType::float32, rows, columns};
}

std::vector<double> RandomPredictor::trunk(const Query& query, size_t token) const {
  const PredictorConfig& c = weights_.config;
  const auto hidden = static_cast<size_t>(c.hidden_size);
  const auto inner = static_cast<size_t>(c.predictor_size);
  const auto experts = static_cast<size_t>(c.num_experts);
  const size_t outputs = static_cast<size_t>(c.lookahead) * experts;
  const float* x = static_cast<const float*>(query.hidden) + token * hidden;
  std::vector<double> input(x, x + hidden);
  if (c.has_projection()) {
    const std::vector<double> state = input;
    input.resize(static_cast<size_t>(c.trunk_rank));
    for (size_t r = 0; r < input.size(); ++r) {
      input[r] = dot(floats(weights_.projection.weight) + r * hidden, state.data(), hidden);
    }
  }
  std::vector<double> z(inner);
  for (size_t r = 0; r < inner; ++r) {
    z[r] = dot(floats(weights_.trunk.weight) + r * input.size(), input.data(), input.size());
    if (weights_.trunk.bias) z[r] += floats(weights_.trunk.bias)[r];
    if (query.context != nullptr) z[r] += query.context[token * inner + r];
    if (query.previous == nullptr) continue;
    const auto n = static_cast<size_t>(query.num_previous);
    for (size_t i = 0; i < static_cast<size_t>(c.lookahead) * n; ++i) {
      const int32_t id = query.previous[token * static_cast<size_t>(c.lookahead) * n + i];
      if (id >= 0) z[r] += floats(weights_.previous.weight)[r * outputs + i / n * experts + static_cast<size_t>(id)];
    }
  }
  if (c.layer_norm) layer_norm(z, floats(weights_.norm_weight), floats(weights_.norm_bias));
  for (double& v : z) v = c.activation == Activation::relu ? std::max(v, 0.0) : v / (1 + std::exp(-v));
  return z;
}

std::vector<double> RandomPredictor::scores(const float* x, size_t distance) const {
  const auto hidden = static_cast<size_t>(weights_.config.hidden_size);
  const auto experts = static_cast<size_t>(weights_.config.num_experts);
  const Router& router = *weights_.routers[distance];
  std::vector<double> input(hidden);
  for (size_t i = 0; i < hidden; ++i)
    input[i] = double{x[i]} * floats(weights_.gate_input_scale)[distance * hidden + i];
  std::vector<double> out(experts);
  for (size_t e = 0; e < experts; ++e) {
    out[e] = dot(floats(router.linear.weight) + e * hidden, input.data(), hidden);
    if (router.linear.bias) out[e] += floats(router.linear.bias)[e];
    if (router.scoring == Scoring::sigmoid) {
      out[e] = 1 / (1 + std::exp(-out[e]));
      if (router.correction) out[e] += floats(router.correction)[e];
    }
  }
  if (router.scoring == Scoring::softmax || router.n_group == 1) return out;
  const size_t size = experts / static_cast<size_t>(router.n_group);
  std::vector<std::pair<double, size_t>> strengths;
  for (size_t g = 0; g < static_cast<size_t>(router.n_group); ++g) {
    std::vector<double> group(out.begin() + static_cast<std::ptrdiff_t>(g * size),
                              out.begin() + static_cast<std::ptrdiff_t>((g + 1) * size));
    std::sort(group.rbegin(), group.rend());
    strengths.emplace_back(group[0] + group[1], g);
  }
  std::sort(strengths.rbegin(), strengths.rend());
  for (size_t i = static_cast<size_t>(router.topk_group); i < strengths.size(); ++i) {
    std::fill_n(out.begin() + static_cast<std::ptrdiff_t>(strengths[i].second * size), size, 0.0);
  }
  return out;
}

std::vector<double> RandomPredictor::forward(const Query& query) const {
  const PredictorConfig& c = weights_.config;
  const auto inner = static_cast<size_t>(c.predictor_size);
  const auto experts = static_cast<size_t>(c.num_experts);
  std::vector<double> out;
  for (size_t t = 0; t < static_cast<size_t>(query.tokens); ++t) {
    const std::vector<double> z = c.has_mlp() ? trunk(query, t) : std::vector<double>();
    const float* x = static_cast<const float*>(query.hidden) + t * static_cast<size_t>(c.hidden_size);
    for (size_t d = 0; d < static_cast<size_t>(c.lookahead); ++d) {
      const Term term = c.terms.empty() ? Term::mlp : c.terms[d];
      std::vector<double> logits(experts, 0.0);
      for (size_t e = 0; e < experts && term != Term::gate; ++e) {
        const size_t row = d * experts + e;
        logits[e] = dot(floats(weights_.heads.weight) + row * inner, z.data(), inner);
        if (weights_.heads.bias) logits[e] += floats(weights_.heads.bias)[row];
      }
      if (term != Term::mlp) {
        const std::vector<double> gate = scores(x, d);
        for (size_t e = 0; e < experts; ++e) logits[e] += floats(weights_.gate_scale)[d] * gate[e];
      }
      out.insert(out.end(), logits.begin(), logits.end());
    }
  }
  return out;
}

double relative_error(const std::vector<float>& a, const std::vector<double>& b) {
  double error = 0;
  double norm = 1e-30;
  for (size_t i = 0; i < b.size(); ++i) {
    error += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  return std::sqrt(error / norm);
}

}  // namespace mlx_od_moe::tests
