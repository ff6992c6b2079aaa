// The Python extension `_ext`: the module and its predictors (see bindings.h for the rest).
#include <mlx/mlx.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "bindings.h"
#include "bindings_input.h"
#include "mlx_od_moe/mlx_ops.h"
#include "mlx_od_moe/predictor.h"
#include "mlx_od_moe/predictor_file.h"
#include "mlx_od_moe/sequence_context.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using namespace nb::literals;
using mlx_od_moe::Predictor;
using mlx_od_moe::Tensor;
using namespace native_predictor;  // arrays

namespace {

// A query and what keeps its arrays alive.
struct Call {
  Input hidden, previous, context;
  mlx_od_moe::Query query;
  Shape leading;  // the shape of x without its last axis

  Call(const Predictor& predictor, nb::handle x, nb::handle previous_ids, nb::handle context_vector,
       const mlx_od_moe::SequenceContext* sequence)
      : hidden(hidden_state(x)) {
    const mlx_od_moe::PredictorConfig& config = predictor.config();
    if (hidden.shape.empty() || hidden.shape.back() != static_cast<size_t>(config.hidden_size)) {
      throw std::invalid_argument("[NativePredictor] the hidden state has " +
                                  (hidden.shape.empty() ? std::string("no") : std::to_string(hidden.shape.back())) +
                                  " features, but this predictor is for hidden_size " +
                                  std::to_string(config.hidden_size));
    }
    leading = hidden.shape;
    leading.pop_back();
    const size_t tokens = leading.product();
    if (tokens > static_cast<size_t>(std::numeric_limits<int>::max())) {
      throw std::invalid_argument("[NativePredictor] too many tokens: " + std::to_string(tokens));
    }
    query = {hidden.data, hidden.dtype, static_cast<int>(tokens), nullptr, 0, nullptr};
    if (!previous_ids.is_none()) add_previous(config, previous_ids);
    if (!context_vector.is_none()) add_context(config, context_vector);
    query.sequence = sequence;
  }

 private:
  void add_previous(const mlx_od_moe::PredictorConfig& config, nb::handle ids) {
    previous = values_of<int32_t>(ids, mx::int32, "previous");
    Shape expected = leading;
    expected.push_back(static_cast<size_t>(config.lookahead));
    if (previous.shape.size() != expected.size() + 1 ||
        !std::equal(expected.begin(), expected.end(), previous.shape.begin())) {
      expected.push_back(static_cast<size_t>(config.top_k));
      throw std::invalid_argument("[NativePredictor] previous must be " + text(expected) + ", but is " +
                                  text(previous.shape));
    }
    query.previous = static_cast<const int32_t*>(previous.data);
    query.num_previous = static_cast<int>(previous.shape.back());
  }

  void add_context(const mlx_od_moe::PredictorConfig& config, nb::handle vector) {
    context = values_of<float>(vector, mx::float32, "context");
    Shape expected = leading;
    expected.push_back(static_cast<size_t>(config.predictor_size));
    if (!(context.shape == expected)) {
      throw std::invalid_argument("[NativePredictor] context must be " + text(expected) + ", but is " +
                                  text(context.shape));
    }
    query.context = static_cast<const float*>(context.data);
  }
};

// Calls run(pointer) without the GIL, for `out` or for a new numpy array; returns that.
template <class T, class Run>
nb::object write_result(const Shape& shape, nb::object out, const Run& run) {
  using Array = nb::ndarray<T, nb::numpy, nb::c_contig, nb::device::cpu>;
  T* data = nullptr;
  if (out.is_none()) {
    data = new T[std::max<size_t>(shape.product(), 1)];
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    out = nb::cast(Array(data, shape.size(), shape.begin(), owner));
  } else {
    Array given;
    if (!nb::try_cast(out, given, false)) {
      throw nb::type_error(std::is_same_v<T, float> ? "[NativePredictor] out must be a contiguous float32 numpy array"
                                                    : "[NativePredictor] out must be a contiguous int32 numpy array");
    }
    Shape is;
    for (size_t i = 0; i < given.ndim(); ++i) is.push_back(given.shape(i));
    if (!(is == shape))
      throw std::invalid_argument("[NativePredictor] out must be " + text(shape) + ", but is " + text(is));
    data = given.data();
  }
  nb::gil_scoped_release release;
  run(data);
  return out;
}

nb::object logits(const Predictor& self, nb::handle x, nb::handle previous, nb::handle context, nb::object out,
                  const mlx_od_moe::SequenceContext* sequence) {
  const Call call(self, x, previous, context, sequence);
  Shape shape = call.leading;
  shape.push_back(static_cast<size_t>(self.config().lookahead));
  shape.push_back(static_cast<size_t>(self.config().num_experts));
  return write_result<float>(shape, std::move(out), [&](float* to) { self.logits(call.query, to); });
}

nb::object predict(const Predictor& self, nb::handle x, std::optional<int> k, nb::handle previous, nb::handle context,
                   nb::object out, const mlx_od_moe::SequenceContext* sequence) {
  const Call call(self, x, previous, context, sequence);
  const int count = k.value_or(self.config().top_k);
  Shape shape = call.leading;
  shape.push_back(static_cast<size_t>(self.config().lookahead));
  shape.push_back(static_cast<size_t>(std::clamp(count, 0, self.config().num_experts)));
  return write_result<int32_t>(shape, std::move(out), [&](int32_t* to) { self.predict(call.query, count, to); });
}

// Tensors by name, for as long as `owners` lives.
mlx_od_moe::Tensors tensors_of(const std::map<std::string, mx::array>& arrays, std::vector<Input>& owners) {
  mlx_od_moe::Tensors tensors;
  for (const auto& [name, array] : arrays) {
    Input input = from_mlx(array);
    const Shape& s = input.shape;
    if (s.empty() || s.size() > 2) throw std::invalid_argument("[NativePredictor] " + name + " is no vector or matrix");
    tensors[name] = {input.data, input.dtype, s.size() == 1 ? 1 : *s.begin(), s.back()};
    owners.push_back(std::move(input));
  }
  return tensors;
}

template <class T>
T option(const nb::dict& options, const char* name) {
  return nb::cast<T>(options[name]);
}

mlx_od_moe::PredictorConfig config_of(const nb::dict& options) {
  mlx_od_moe::PredictorConfig config;
  config.hidden_size = option<int>(options, "hidden_size");
  config.predictor_size = option<int>(options, "predictor_size");
  config.trunk_rank = option<int>(options, "trunk_rank");
  config.num_experts = option<int>(options, "num_experts");
  config.lookahead = option<int>(options, "lookahead");
  config.top_k = option<int>(options, "top_k");
  config.activation = mlx_od_moe::parse_activation(option<std::string>(options, "activation"));
  config.layer_norm = option<bool>(options, "layer_norm");
  config.previous_experts = option<bool>(options, "previous_experts");
  if (const nb::object context = nb::borrow(options["context"]); !context.is_none()) {
    const nb::dict sizes = nb::cast<nb::dict>(context);
    config.context = {option<int>(sizes, "window"), option<int>(sizes, "key_size"), option<int>(sizes, "state_size"),
                      option<bool>(sizes, "early_query")};
  }
  for (const nb::handle term : options["terms"]) {
    config.terms.push_back(mlx_od_moe::parse_term(nb::cast<std::string>(term)));
  }
  return config;
}

void make_predictor(Predictor* self, const std::map<std::string, mx::array>& arrays, const nb::dict& config,
                    const std::vector<nb::dict>& router_configs, int bits, int group_size, const std::string& format,
                    int threads) {
  std::vector<Input> owners;
  const mlx_od_moe::Tensors tensors = tensors_of(arrays, owners);
  const mlx_od_moe::Quantization quantization{bits, group_size};
  mlx_od_moe::PredictorWeights weights =
      mlx_od_moe::find_predictor(tensors, "predictor.", config_of(config), quantization);
  std::vector<mlx_od_moe::Router> routers;
  for (size_t d = 0; d < router_configs.size(); ++d) {
    const nb::dict& options = router_configs[d];
    routers.push_back(mlx_od_moe::find_router(tensors, "routers." + std::to_string(d) + ".", quantization));
    routers.back().scoring = mlx_od_moe::parse_scoring(option<std::string>(options, "scoring"));
    routers.back().n_group = option<int>(options, "n_group");
    routers.back().topk_group = option<int>(options, "topk_group");
  }
  for (const mlx_od_moe::Router& router : routers) weights.routers.push_back(&router);
  mlx_od_moe::PredictorOptions options{mlx_od_moe::parse_format(format), threads, 64};
  if (bits == 4) options.group_size = group_size;  // int4 as it is, without quantising again
  nb::gil_scoped_release release;
  new (self) Predictor(weights, options);
}

void make_op(mlx_od_moe::PredictorOp* self, std::map<std::string, mx::array> arrays, const nb::dict& config,
             const std::vector<nb::dict>& router_configs, int bits, int group_size, const std::string& format,
             int threads) {
  std::vector<mlx_od_moe::RouterOptions> routers;
  for (const nb::dict& options : router_configs) {
    routers.push_back({mlx_od_moe::parse_scoring(option<std::string>(options, "scoring")),
                       option<int>(options, "n_group"), option<int>(options, "topk_group")});
  }
  const mlx_od_moe::PredictorConfig checked = config_of(config);
  mlx_od_moe::PredictorOptions options{mlx_od_moe::parse_format(format), threads, 64};
  if (bits == 4) options.group_size = group_size;
  nb::gil_scoped_release release;
  for (auto& [name, array] : arrays) {
    array = mx::contiguous(array);
    array.eval();
  }
  new (self) mlx_od_moe::PredictorOp(std::move(arrays), checked, std::move(routers), {bits, group_size}, options);
}

std::map<int, Predictor> pack_bundle(const std::map<std::string, mx::array>& arrays,
                                     const std::map<std::string, std::string>& metadata, const std::string& format,
                                     int threads) {
  std::vector<Input> owners;
  const mlx_od_moe::Tensors tensors = tensors_of(arrays, owners);
  const mlx_od_moe::PredictorOptions options{mlx_od_moe::parse_format(format), threads, 64};
  nb::gil_scoped_release release;
  return mlx_od_moe::PredictorBundle::make(tensors, metadata, options, "PredictorBundle").predictors();
}

}  // namespace

NB_MODULE(_ext, m) {
  // Loads libmlx and registers mx.array before any function here names it (stubs need it too).
  nb::module_::import_("mlx.core");
  m.doc() = "Native parts of mlx-od-moe.";
  m.def(
      "is_available", [](const mx::array& a) { return a.is_available(); }, "array"_a,
      nb::sig("def is_available(array: mlx.core.array) -> bool"),
      "Whether an array's value is computed, without waiting for it.");
  m.def("available_kernels", &mlx_od_moe::available_kernels,
        "Instruction sets that this CPU runs, best first; MLX_OD_MOE_KERNEL chooses another than the first.");

  nb::class_<Predictor>(m, "NativePredictor", R"(A predictor's forward on CPU threads, without MLX.

Made by ExpertPredictor.native(). Immutable: any number of threads may use one at once. A call takes
at most `threads` threads, its own among them, and gives the same result for every number of them.

x is the hidden state [..., hidden_size] as a numpy array or mx.array, float32, float16 or bfloat16:
read without a copy where it is contiguous. An mx.array is evaluated on the calling thread. The GIL
is released while the native code runs. ValueError where x has another width or is not finite, and
TypeError where it has another type.)")
      .def("__init__", &make_predictor, "tensors"_a, "config"_a, "routers"_a, "bits"_a, "group_size"_a, "format"_a,
           "threads"_a)
      .def_static(
          "load",
          [](const std::string& path, const std::string& format, int threads) {
            const mlx_od_moe::PredictorOptions options{mlx_od_moe::parse_format(format), threads, 64};
            nb::gil_scoped_release release;
            return mlx_od_moe::load_predictor(path, options);
          },
          "path"_a, "format"_a = "int4", "threads"_a = 1,
          "From a file that ExpertPredictor.save wrote. ValueError naming the file where it is not one.")
      .def("logits", &logits, "x"_a, "previous"_a = nb::none(), "context"_a = nb::none(), "out"_a = nb::none(),
           "sequence"_a = nb::none(),
           nb::sig("def logits(self, x: object, previous: object | None = None, context: object | None = None, out: "
                   "object | None = None, sequence: SequenceContext | None = None) -> "
                   "numpy.typing.NDArray[numpy.float32]"),
           R"(Logits [..., lookahead, num_experts] as a float32 numpy array.

Args:
    x: hidden state [..., hidden_size].
    previous: the previous token's experts at the target layers, [..., lookahead, n]; -1: none.
    context: added to the trunk's output, float32 [..., predictor_size].
    out: where to write them; returned.
    sequence: what the tokens before left, for a predictor of a bundle with context. Tokens of one
        call follow each other; they see those before the call.)")
      .def("predict", &predict, "x"_a, "k"_a = nb::none(), "previous"_a = nb::none(), "context"_a = nb::none(),
           "out"_a = nb::none(), "sequence"_a = nb::none(),
           nb::sig("def predict(self, x: object, k: int | None = None, previous: object | None = None, context: object "
                   "| None = None, out: object | None = None, sequence: SequenceContext | None = None) -> "
                   "numpy.typing.NDArray[numpy.int32]"),
           R"(Expert ids [..., lookahead, k] as an int32 numpy array, best first; of equals the lower first.

Args:
    x: hidden state [..., hidden_size].
    k: 1 ... min(32, num_experts); default: the model's top_k.
    previous, context, sequence: as for `logits`.
    out: int32 array to write them to; returned.)")
      .def_prop_ro("hidden_size", [](const Predictor& p) { return p.config().hidden_size; })
      .def_prop_ro("predictor_size", [](const Predictor& p) { return p.config().predictor_size; })
      .def_prop_ro("num_experts", [](const Predictor& p) { return p.config().num_experts; })
      .def_prop_ro("lookahead", [](const Predictor& p) { return p.config().lookahead; })
      .def_prop_ro("top_k", [](const Predictor& p) { return p.config().top_k; })
      .def_prop_ro("format", [](const Predictor& p) { return mlx_od_moe::format_name(p.options().format); })
      .def_prop_ro("threads", [](const Predictor& p) { return p.options().threads; })
      .def_prop_ro("kernel", &Predictor::kernel, "Instruction set in use.")
      .def_prop_ro("weight_bytes", &Predictor::weight_bytes, "Bytes that one forward reads.")
      .def_prop_ro("projection_bytes", &Predictor::projection_bytes,
                   "Of these, the bytes of the projection to the trunk's rank; predictors may share it.");

  m.def("pack_bundle", &pack_bundle, "tensors"_a, "metadata"_a, "format"_a, "threads"_a,
        "The predictors of a bundle's tensors and metadata, in one allocation.");
  m.def(
      "load_bundle",
      [](const std::string& path, const std::string& format, int threads) {
        const mlx_od_moe::PredictorOptions options{mlx_od_moe::parse_format(format), threads, 64};
        nb::gil_scoped_release release;
        return mlx_od_moe::PredictorBundle::load(path, options).predictors();
      },
      "path"_a, "format"_a = "int4", "threads"_a = 1,
      "{MoE layer: its NativePredictor} from a file that PredictorBundle.save wrote, in one allocation.");

  nb::class_<mlx_od_moe::PredictorOp>(m, "PredictorOp", R"(The predictor as a lazy MLX operation.

On a CPU stream it runs the native kernels, on a GPU stream MLX's own operations. It composes with
mx.eval, mx.async_eval and mx.compile; it has no gradient. States that are not finite give NaN.)")
      .def("__init__", &make_op, "tensors"_a, "config"_a, "routers"_a, "bits"_a, "group_size"_a, "format"_a,
           "threads"_a)
      .def("__call__", &mlx_od_moe::PredictorOp::logits, "x"_a, "previous"_a = nb::none(), "context"_a = nb::none(),
           nb::kw_only(), "stream"_a = nb::none(),
           nb::sig("def __call__(self, x: mlx.core.array, previous: mlx.core.array | None = None, context: "
                   "mlx.core.array | None = None, *, stream: mlx.core.Stream | mlx.core.Device | None = None) -> "
                   "mlx.core.array"),
           "Logits [..., lookahead, num_experts] (float32) of hidden states [..., hidden_size].")
      .def("from_ops", &mlx_od_moe::PredictorOp::logits_from_ops, "x"_a, "previous"_a = nb::none(),
           "context"_a = nb::none(), nb::kw_only(), "stream"_a = nb::none(),
           nb::sig("def from_ops(self, x: mlx.core.array, previous: mlx.core.array | None = None, context: "
                   "mlx.core.array | None = None, *, stream: mlx.core.Stream | mlx.core.Device | None = None) -> "
                   "mlx.core.array"),
           "The same from MLX's own operations, whatever the stream.")
      .def("predict", &mlx_od_moe::PredictorOp::predict, "x"_a, "k"_a, "previous"_a = nb::none(),
           "context"_a = nb::none(), nb::kw_only(), "stream"_a = nb::none(),
           nb::sig("def predict(self, x: mlx.core.array, k: int, previous: mlx.core.array | None = None, context: "
                   "mlx.core.array | None = None, *, stream: mlx.core.Stream | mlx.core.Device | None = None) -> "
                   "mlx.core.array"),
           "Expert ids [..., lookahead, k] (uint32), best first.");
  bind_parts(m);
}
