// A step of AdamW as a lazy operation on mx::array, for CPU streams.
//
// Threads    As MLX's operations: streams belong to threads, and each operation runs on its stream's.
// Errors     std::invalid_argument, "[adamw] rule", when the graph is built.
// Units      float32; other float types are converted.
#pragma once

#include <mlx/array.h>
#include <mlx/utils.h>

#include <vector>

#include "mlx_od_moe/export.h"
#include "mlx_od_moe/kernels/kernels.h"

namespace mlx_od_moe {

// [first, second, weight] after a step without bias correction, for moments and a weight of the gradient's shape; in
// place where nobody else holds them. The rate is that array's one number, not the step's.
MLX_OD_MOE_API std::vector<mlx::core::array> adamw(const mlx::core::array& gradient, const mlx::core::array& first,
                                                   const mlx::core::array& second, const mlx::core::array& weight,
                                                   const mlx::core::array& rate, const kernels::AdamStep& step,
                                                   mlx::core::StreamOrDevice s = {});

}  // namespace mlx_od_moe
