// What training computes over and over and MLX's CPU backend is slow at, as lazy operations on mx::array.
//
// Only for CPU streams: on a GPU, and to define what these compute, context.py and losses.py compose MLX's
// own operations.
//
// Threads    As MLX's operations: streams belong to threads, and each operation runs on its stream's.
// Errors     std::invalid_argument, "[read_memories] rule", when the graph is built.
// Units      float32; other float types are converted.
#pragma once

#include <mlx/array.h>
#include <mlx/utils.h>

#include <vector>

#include "mlx_od_moe/export.h"

namespace mlx_od_moe {

// What a context's first products take: (the previous token's states [batch, n, lookahead * state_size], zero
// where it is of another sequence, and what attention read [batch, n, lookahead * key_size]).
//
// query [batch, n, lookahead * key_size]; position_bias [lookahead, window + 1]; sequence: int
// [batch, window + n]; memories: per distance [batch, window + n, 2 * key_size + state_size]. See ContextReader.
// Has a gradient for all but `sequence`. `bf16`: attention multiplies in bfloat16, summed in float32; where
// has_bf16_products (product_ops.h) only.
MLX_OD_MOE_API std::vector<mlx::core::array> read_memories(const mlx::core::array& query,
                                                           const mlx::core::array& position_bias,
                                                           const mlx::core::array& sequence,
                                                           const std::vector<mlx::core::array>& memories,
                                                           bool bf16 = false, mlx::core::StreamOrDevice s = {});

// Over the last axis. Without gradients: they serve the losses' own.
MLX_OD_MOE_API mlx::core::array row_softmax(const mlx::core::array& x, mlx::core::StreamOrDevice s = {});
MLX_OD_MOE_API mlx::core::array row_sigmoid(const mlx::core::array& x, mlx::core::StreamOrDevice s = {});

}  // namespace mlx_od_moe
