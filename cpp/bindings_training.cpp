#include <mlx/mlx.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "mlx_od_moe/training_ops.h"

namespace nb = nanobind;
using namespace nb::literals;

void bind_training(nb::module_& m) {
  m.def(
      "read_memories",
      [](const mlx::core::array& query, const mlx::core::array& position_bias, const mlx::core::array& sequence,
         const std::vector<mlx::core::array>& memories) {
        return mlx_od_moe::read_memories(query, position_bias, sequence, memories);
      },
      "query"_a, "position_bias"_a, "sequence"_a, "memories"_a,
      nb::sig("def read_memories(query: mlx.core.array, position_bias: mlx.core.array, sequence: mlx.core.array, "
              "memories: list[mlx.core.array]) -> list[mlx.core.array]"),
      R"(The previous token's states [batch, n, lookahead * state_size] and what attention over the last
`window` tokens' memories read [batch, n, lookahead * key_size]: see ContextReader. CPU streams only.)");
  m.def(
      "row_softmax", [](const mlx::core::array& x) { return mlx_od_moe::row_softmax(x); }, "x"_a,
      nb::sig("def row_softmax(x: mlx.core.array) -> mlx.core.array"),
      "Softmax over the last axis in float32, without a gradient. CPU streams only.");
  m.def(
      "row_sigmoid", [](const mlx::core::array& x) { return mlx_od_moe::row_sigmoid(x); }, "x"_a,
      nb::sig("def row_sigmoid(x: mlx.core.array) -> mlx.core.array"),
      "Sigmoid in float32, without a gradient. CPU streams only.");
}
