// The products of a training step in bfloat16 (training_products.h) as lazy operations on mx::array.
//
// For CPU streams, where the CPU has instructions for such products; elsewhere the definitions in MLX's own
// operations, which these are tested against, serve.
//
// Threads    As MLX's operations: streams belong to threads, and each operation runs on its stream's.
// Errors     std::invalid_argument, "[bf16_linear] rule", when the graph is built.
// Units      float32; inputs may be float16. Products of operands rounded to bfloat16, summed in float32.
#pragma once

#include <mlx/array.h>
#include <mlx/utils.h>

#include <optional>
#include <vector>

#include "mlx_od_moe/export.h"

namespace mlx_od_moe {

// Whether this CPU has them.
MLX_OD_MOE_API bool has_bf16_products();

// x [..., k] times weight [m, k] transposed: [..., m]. Has a gradient for both.
MLX_OD_MOE_API mlx::core::array bf16_linear(const mlx::core::array& x, const mlx::core::array& weight,
                                            mlx::core::StreamOrDevice s = {});

// heads relu(sum of weights[i] inputs[i] + bias) + head_bias + skip inputs[0], [..., outputs].
//
// inputs: each [..., k_i]; weights: each [hidden, k_i]; bias [hidden]; heads [outputs, hidden]; head_bias [outputs];
// skip [outputs, k_0]. Has a gradient for all. Hidden values are kept in bfloat16.
MLX_OD_MOE_API mlx::core::array bf16_two_layers(const std::vector<mlx::core::array>& inputs,
                                                const std::vector<mlx::core::array>& weights,
                                                const mlx::core::array& bias, const mlx::core::array& heads,
                                                const mlx::core::array& head_bias,
                                                const std::optional<mlx::core::array>& skip,
                                                mlx::core::StreamOrDevice s = {});

// {velocity, weight} after a step of Muon with Nesterov's momentum; all [n, m], `rate` a scalar. No gradient.
MLX_OD_MOE_API std::vector<mlx::core::array> bf16_muon(const mlx::core::array& gradient,
                                                       const mlx::core::array& velocity, const mlx::core::array& weight,
                                                       const mlx::core::array& rate, float momentum, int iterations,
                                                       mlx::core::StreamOrDevice s = {});

}  // namespace mlx_od_moe
