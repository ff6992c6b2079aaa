// A random predictor, and its forward in float64, written as the formula in predictor.h reads.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "mlx_od_moe/predictor.h"

namespace mlx_od_moe::tests {

struct RouterOptions {
  Scoring scoring = Scoring::softmax;
  bool bias = false;
  bool correction = false;
  int n_group = 1;
  int topk_group = 1;
};

// Owns what PredictorWeights point to.
class RandomPredictor {
 public:
  RandomPredictor(const PredictorConfig& config, unsigned seed, const RouterOptions& router = {}, bool biases = true);

  const PredictorWeights& weights() const { return weights_; }
  // logits [tokens, lookahead, num_experts]
  std::vector<double> forward(const Query& query) const;
  std::vector<float> values(size_t n, float deviation);  // gaussian

 private:
  Tensor tensor(size_t rows, size_t columns, float deviation, float mean = 0);
  std::vector<double> trunk(const Query& query, size_t token) const;
  std::vector<double> scores(const float* x, size_t distance) const;

  std::mt19937 generator_;
  std::vector<std::unique_ptr<std::vector<float>>> memory_;
  PredictorWeights weights_;
  std::vector<std::unique_ptr<Router>> routers_;
};

// |a - b| / |b|
double relative_error(const std::vector<float>& a, const std::vector<double>& b);

// Sets MLX_OD_MOE_KERNEL while it lives.
class UseKernel {
 public:
  explicit UseKernel(const std::string& name) { setenv("MLX_OD_MOE_KERNEL", name.c_str(), 1); }
  ~UseKernel() { unsetenv("MLX_OD_MOE_KERNEL"); }
  UseKernel(const UseKernel&) = delete;
  UseKernel& operator=(const UseKernel&) = delete;
};

}  // namespace mlx_od_moe::tests
