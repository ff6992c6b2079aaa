// The products of a training step in bfloat16, by kernels/bf16_products.h: a linear map, the predictor's two layers
// and Muon's step, each with what lies between its products.
//
// Threads    Any; each thread keeps the memory for packed operands that its largest call needed.
// Errors     none: sizes are positive, and `products` is that of the CPU's KernelSet.
// Units      Matrices row by row; float32 unless said otherwise. Sums in float32, operands rounded to bfloat16.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "mlx_od_moe/export.h"
#include "mlx_od_moe/kernels/bf16_products.h"

namespace mlx_od_moe {

using kernels::Bf16Products;
using kernels::Rows;

// out [n, m] = a [n, k] b [m, k]^T.
MLX_OD_MOE_API void multiply_rows(const Bf16Products& products, const Rows& a, const Rows& b, float* out);
// out [n, m] = a [n, k] b [k, m].
MLX_OD_MOE_API void multiply(const Bf16Products& products, const Rows& a, const Rows& b, float* out);
// out [n, m] = a [k, n]^T b [k, m].
MLX_OD_MOE_API void multiply_columns(const Bf16Products& products, const Rows& a, const Rows& b, float* out);

// outputs = heads relu(sum of weights[i] inputs[i] + bias) + head_bias + skip inputs[0].
struct TwoLayers {
  std::vector<Rows> inputs;   // each [tokens, k_i]
  std::vector<Rows> weights;  // each [hidden, k_i]
  const float* bias;          // [hidden]
  Rows heads;                 // [outputs, hidden]
  const float* head_bias;     // [outputs]
  Rows skip;                  // [outputs, k_0]; data null: none

  int tokens() const { return inputs[0].rows; }
  int hidden() const { return heads.columns; }
  int outputs() const { return heads.rows; }
};

// What `run_layers` keeps for the gradient: the hidden values in bfloat16, packed.
MLX_OD_MOE_API size_t active_numbers(int tokens, int hidden);

MLX_OD_MOE_API void run_layers(const Bf16Products& products, const TwoLayers& layers, uint16_t* active, float* outputs);

// All are set; those of the inputs may be null: not wanted.
struct LayerGradients {
  std::vector<float*> inputs, weights;
  float* bias;
  float* heads;
  float* head_bias;
  float* skip;  // where there is one
};

MLX_OD_MOE_API void run_layers_gradient(const Bf16Products& products, const TwoLayers& layers, const uint16_t* active,
                                        const float* cotangent, const LayerGradients& to);

// One step of Muon (Jordan et al., 2024) with Nesterov's momentum, for a matrix [rows, columns].
struct MuonStep {
  int rows, columns;
  float momentum;
  int iterations;  // of Newton-Schulz
};

// velocity and weight may be what they become.
MLX_OD_MOE_API void step_muon(const Bf16Products& products, const MuonStep& step, float rate, const float* gradient,
                              const float* velocity, const float* weight, float* new_velocity, float* new_weight);

}  // namespace mlx_od_moe
