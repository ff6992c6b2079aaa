// A training loss as lazy operations on mx::array, for CPU streams; losses.py defines them in MLX's own.
//
// Threads    As MLX's operations: streams belong to threads, and each operation runs on its stream's.
// Errors     std::invalid_argument, "[name of the operation] rule", when the graph is built.
#pragma once

#include <mlx/array.h>
#include <mlx/utils.h>

#include "mlx_od_moe/export.h"

namespace mlx_od_moe {

// Binary cross-entropy of each expert against its label, mean over logits [..., num_experts], a scalar. `labels`:
// floats of the logits' shape; or integers [..., k], the ids of the experts whose label is 1 (-1: none), all others'
// are 0. Its gradient, for the logits, has a floor: see losses.py.
MLX_OD_MOE_API mlx::core::array cross_entropy(const mlx::core::array& logits, const mlx::core::array& labels,
                                              mlx::core::StreamOrDevice s = {});

// What losses.py makes of a router's scores [..., num_experts]: labels between 0 and 1, float32. No gradient.
// 1 <= k < num_experts.
MLX_OD_MOE_API mlx::core::array soft_labels(const mlx::core::array& scores, int k, float temperature,
                                            mlx::core::StreamOrDevice s = {});

}  // namespace mlx_od_moe
