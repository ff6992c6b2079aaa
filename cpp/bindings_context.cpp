// SequenceContext for Python.
#include <mlx/mlx.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>

#include <limits>
#include <map>
#include <optional>

#include "bindings.h"
#include "bindings_input.h"
#include "mlx_od_moe/sequence_context.h"

namespace nb = nanobind;
using namespace nb::literals;
using mlx_od_moe::Predictor;
using mlx_od_moe::SequenceContext;
using namespace native_predictor;  // arrays

namespace {

void observe(SequenceContext& self, int layer, nb::handle states, std::optional<int64_t> position) {
  if (!self.remembers(layer)) return;
  const Input input = hidden_state(states);
  const int hidden_size = self.hidden_size();
  if (input.shape.empty() || input.shape.back() != static_cast<size_t>(hidden_size)) {
    throw std::invalid_argument("[SequenceContext] states must be [..., " + std::to_string(hidden_size) + "], but is " +
                                text(input.shape));
  }
  const size_t tokens = input.shape.product() / static_cast<size_t>(hidden_size);
  if (tokens > static_cast<size_t>(std::numeric_limits<int>::max())) {
    throw std::invalid_argument("[SequenceContext] too many tokens: " + std::to_string(tokens));
  }
  if (position && *position < 0) {
    throw std::invalid_argument("[SequenceContext] position can't be negative, got " + std::to_string(*position));
  }
  mlx_od_moe::Query query;
  query.hidden = input.data;
  query.dtype = input.dtype;
  query.tokens = static_cast<int>(tokens);
  query.position = position.value_or(-1);
  const nb::gil_scoped_release release;
  self.observe(layer, query);
}

}  // namespace

void bind_sequence_context(nb::module_& m) {
  nb::class_<SequenceContext>(m, "SequenceContext",
                              R"(What the tokens of one sequence left for the predictions of later ones.

Made for the native predictors of a bundle, as PredictorBundle.native() or load_bundle give them. When
tokens have passed a MoE layer, `observe` them there; a prediction with `sequence=` reads what earlier
tokens left at the layers that it is about. One thread at a time.)")
      .def(nb::init<const std::map<int, Predictor>&>(), "predictors"_a,
           "predictors: {MoE layer: its NativePredictor}. ValueError where their contexts differ.")
      .def("observe", &observe, "layer"_a, "states"_a, "position"_a = nb::none(),
           nb::sig("def observe(self, layer: int, states: object, position: int | None = None) -> None"),
           R"(Tokens have passed the layer.

Args:
    layer: by the model's index; one that no predictor looks at is ignored.
    states: the MoE block's inputs [..., hidden_size], in order; float32, float16 or bfloat16.
    position: the first one's place in the sequence; default: after the last one observed there.
        Tokens in between were not observed: nobody sees them there.

ValueError for another width, for a position observed before, and for states that are not finite.)")
      .def("reset", &SequenceContext::reset, "Forget all tokens.")
      .def("trim", &SequenceContext::trim, "tokens"_a,
           R"(Forget the last `tokens` tokens, as a prompt cache that is trimmed does.

Up to 16 tokens nothing else is lost. Beyond, the oldest of the window are missing, and the token
before the next one too: what is not there adds nothing.)")
      .def(
          "fork", [](const SequenceContext& self) { return SequenceContext(self); }, "An independent copy.")
      .def("__len__", [](const SequenceContext& self) { return static_cast<size_t>(self.length()); })
      .def_prop_ro("empty", &SequenceContext::empty, "Whether no predictor has a context.")
      .def_prop_ro("nbytes", &SequenceContext::bytes, "Bytes that it holds now; bounded.");
}
