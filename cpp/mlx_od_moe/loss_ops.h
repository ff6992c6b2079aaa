// A training loss as a lazy operation on mx::array, for CPU streams; losses.py defines it in MLX's own operations.
//
// Threads    As MLX's operations: streams belong to threads, and each operation runs on its stream's.
// Errors     std::invalid_argument, "[cross_entropy] rule", when the graph is built.
#pragma once

#include <mlx/array.h>
#include <mlx/utils.h>

#include "mlx_od_moe/export.h"

namespace mlx_od_moe {

// Binary cross-entropy of each expert against "is chosen", mean over logits [..., num_experts], a scalar; chosen
// [..., k]: ids, -1 where there is none. Its gradient, for the logits, has a floor: see losses.py.
MLX_OD_MOE_API mlx::core::array cross_entropy(const mlx::core::array& logits, const mlx::core::array& chosen,
                                              mlx::core::StreamOrDevice s = {});

}  // namespace mlx_od_moe
