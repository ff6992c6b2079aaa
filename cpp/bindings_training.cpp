#include <mlx/mlx.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "mlx_od_moe/adam_ops.h"
#include "mlx_od_moe/loss_ops.h"
#include "mlx_od_moe/product_ops.h"
#include "mlx_od_moe/training_ops.h"

namespace nb = nanobind;
using namespace nb::literals;

static void bind_products(nb::module_& m) {
  using mlx::core::array;
  m.def("has_bf16_products", &mlx_od_moe::has_bf16_products,
        "Whether this CPU has instructions for products in bfloat16, which the next three need.");
  m.def(
      "bf16_linear", [](const array& x, const array& weight) { return mlx_od_moe::bf16_linear(x, weight); }, "x"_a,
      "weight"_a, nb::sig("def bf16_linear(x: mlx.core.array, weight: mlx.core.array) -> mlx.core.array"),
      R"(x [..., k] times weight [m, k] transposed, [..., m]: operands rounded to bfloat16, summed in float32, and
so are the gradients of both. CPU streams only.)");
  m.def(
      "bf16_two_layers",
      [](const std::vector<array>& inputs, const std::vector<array>& weights, const array& bias, const array& heads,
         const array& head_bias, const std::optional<array>& skip) {
        return mlx_od_moe::bf16_two_layers(inputs, weights, bias, heads, head_bias, skip);
      },
      "inputs"_a, "weights"_a, "bias"_a, "heads"_a, "head_bias"_a, "skip"_a = nb::none(),
      nb::sig("def bf16_two_layers(inputs: list[mlx.core.array], weights: list[mlx.core.array], "
              "bias: mlx.core.array, heads: mlx.core.array, head_bias: mlx.core.array, "
              "skip: mlx.core.array | None = None) -> mlx.core.array"),
      R"(heads relu(sum of weights[i] inputs[i] + bias) + head_bias + skip inputs[0], [..., outputs], in products
as bf16_linear's. Inputs [..., k_i], weights [hidden, k_i], heads [outputs, hidden], skip [outputs, k_0].)");
  m.def(
      "bf16_muon",
      [](const array& gradient, const array& velocity, const array& weight, const array& rate, float momentum,
         int iterations) { return mlx_od_moe::bf16_muon(gradient, velocity, weight, rate, momentum, iterations); },
      "gradient"_a, "velocity"_a, "weight"_a, "rate"_a, "momentum"_a, "iterations"_a,
      nb::sig("def bf16_muon(gradient: mlx.core.array, velocity: mlx.core.array, weight: mlx.core.array, "
              "rate: mlx.core.array, momentum: float, iterations: int) -> list[mlx.core.array]"),
      R"([velocity, weight] after a step of Muon (Jordan et al., 2024) with Nesterov's momentum, whose iterations of
Newton-Schulz multiply as bf16_linear. All [n, m], `rate` a scalar. CPU streams only.)");
}

void bind_training(nb::module_& m) {
  m.def(
      "read_memories",
      [](const mlx::core::array& query, const mlx::core::array& position_bias, const mlx::core::array& sequence,
         const std::vector<mlx::core::array>& memories,
         bool bf16) { return mlx_od_moe::read_memories(query, position_bias, sequence, memories, bf16); },
      "query"_a, "position_bias"_a, "sequence"_a, "memories"_a, "bf16"_a = false,
      nb::sig("def read_memories(query: mlx.core.array, position_bias: mlx.core.array, sequence: mlx.core.array, "
              "memories: list[mlx.core.array], bf16: bool = False) -> list[mlx.core.array]"),
      R"(The previous token's states [batch, n, lookahead * state_size] and what attention over the last
`window` tokens' memories read [batch, n, lookahead * key_size]: see ContextReader. `bf16`: it multiplies in bfloat16,
summed in float32, where has_bf16_products. CPU streams only.)");
  m.def(
      "row_softmax", [](const mlx::core::array& x) { return mlx_od_moe::row_softmax(x); }, "x"_a,
      nb::sig("def row_softmax(x: mlx.core.array) -> mlx.core.array"),
      "Softmax over the last axis in float32, without a gradient. CPU streams only.");
  m.def(
      "row_sigmoid", [](const mlx::core::array& x) { return mlx_od_moe::row_sigmoid(x); }, "x"_a,
      nb::sig("def row_sigmoid(x: mlx.core.array) -> mlx.core.array"),
      "Sigmoid in float32, without a gradient. CPU streams only.");
  m.def(
      "cross_entropy",
      [](const mlx::core::array& logits, const mlx::core::array& labels) {
        return mlx_od_moe::cross_entropy(logits, labels);
      },
      "logits"_a, "labels"_a,
      nb::sig("def cross_entropy(logits: mlx.core.array, labels: mlx.core.array) -> mlx.core.array"),
      R"(Binary cross-entropy of logits [..., num_experts] against labels, floats of that shape or the chosen ids
[..., k], -1 where there is none: their mean, a scalar, with a gradient for the logits. CPU streams only.)");
  m.def(
      "soft_labels",
      [](const mlx::core::array& scores, int k, float temperature) {
        return mlx_od_moe::soft_labels(scores, k, temperature);
      },
      "scores"_a, "k"_a, "temperature"_a,
      nb::sig("def soft_labels(scores: mlx.core.array, k: int, temperature: float) -> mlx.core.array"),
      R"(Labels between 0 and 1, float32, of a router's scores [..., num_experts], as losses.py defines them; without a
gradient. CPU streams only.)");
  m.def(
      "adamw",
      [](const mlx::core::array& gradient, const mlx::core::array& first, const mlx::core::array& second,
         const mlx::core::array& weight, const mlx::core::array& rate, const std::array<double, 2>& betas,
         float epsilon, float decay) {
        const auto rounded = [](double x) { return static_cast<float>(x); };
        const mlx_od_moe::kernels::AdamStep step{
            rounded(betas[0]), rounded(betas[1]), rounded(1 - betas[0]), rounded(1 - betas[1]), 0.0f, epsilon, decay};
        return mlx_od_moe::adamw(gradient, first, second, weight, rate, step);
      },
      "gradient"_a, "first"_a, "second"_a, "weight"_a, "rate"_a, "betas"_a, "epsilon"_a, "decay"_a,
      nb::sig("def adamw(gradient: mlx.core.array, first: mlx.core.array, second: mlx.core.array, "
              "weight: mlx.core.array, rate: mlx.core.array, betas: list[float], epsilon: float, decay: float) "
              "-> list[mlx.core.array]"),
      R"([first, second, weight] after a step of AdamW (Loshchilov and Hutter, 2019) without bias correction. All of one
shape, `rate` a scalar. CPU streams only.)");
  bind_products(m);
}
