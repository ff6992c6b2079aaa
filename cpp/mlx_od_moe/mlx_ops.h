// The predictor as lazy operations on mx::array, to compose with a model's own.
//
// On a CPU stream the forward is one primitive that runs the kernels of predictor.h; on a GPU stream
// (Metal, CUDA) it is composed of MLX's own operations. `logits_from_ops` is that composition on any
// stream: the plain definition that the primitive is tested against.
//
// Threads    As MLX's operations: streams belong to threads.
// Ownership  Arrays are shared with the caller; the packed weights are a copy of their own.
// Errors     std::invalid_argument, "[PredictorOp] rule, value", when the graph is built. A hidden state
//            that is not finite gives NaN logits, since an operation can't throw when it runs.
// Units      x [..., hidden_size] of any float type; logits float32 [..., lookahead, num_experts].
// Costs      Each evaluation adds MLX's own scheduling to the forward: for the lowest latency call
//            Predictor directly. No gradients: train with the Python module.
#pragma once

#include <mlx/array.h>
#include <mlx/stream.h>
#include <mlx/utils.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "mlx_od_moe/export.h"
#include "mlx_od_moe/predictor.h"

namespace mlx_od_moe {

struct RouterOptions {
  Scoring scoring = Scoring::softmax;
  int n_group = 1;
  int topk_group = 1;
};

class MLX_OD_MOE_API PredictorOp {
 public:
  using Arrays = std::map<std::string, mlx::core::array>;

  // Arrays by the names that ExpertPredictor.save gives them, evaluated and row-contiguous.
  PredictorOp(Arrays arrays, const PredictorConfig& config, std::vector<RouterOptions> routers,
              const Quantization& quantization, const PredictorOptions& options);

  // previous: ids [..., lookahead, n], -1 for none. context: [..., predictor_size].
  mlx::core::array logits(const mlx::core::array& x, const std::optional<mlx::core::array>& previous = std::nullopt,
                          const std::optional<mlx::core::array>& context = std::nullopt,
                          mlx::core::StreamOrDevice s = {}) const;
  mlx::core::array logits_from_ops(const mlx::core::array& x,
                                   const std::optional<mlx::core::array>& previous = std::nullopt,
                                   const std::optional<mlx::core::array>& context = std::nullopt,
                                   mlx::core::StreamOrDevice s = {}) const;
  // Ids [..., lookahead, k] (uint32), best first.
  mlx::core::array predict(const mlx::core::array& x, int k,
                           const std::optional<mlx::core::array>& previous = std::nullopt,
                           const std::optional<mlx::core::array>& context = std::nullopt,
                           mlx::core::StreamOrDevice s = {}) const;

  const Predictor& native() const { return native_; }

 private:
  mlx::core::array linear(const mlx::core::array& x, const std::string& name, mlx::core::StreamOrDevice s) const;
  mlx::core::array mlp(const mlx::core::array& x, const std::optional<mlx::core::array>& previous,
                       const std::optional<mlx::core::array>& context, mlx::core::StreamOrDevice s) const;
  mlx::core::array scores(const mlx::core::array& x, int distance, mlx::core::StreamOrDevice s) const;
  mlx::core::array calibrated(const mlx::core::array& logits, mlx::core::StreamOrDevice s) const;

  Arrays arrays_;
  std::vector<RouterOptions> routers_;
  Quantization quantization_;
  Predictor native_;
};

}  // namespace mlx_od_moe
