// ShadowRunner for Python: the native part of mlx_od_moe.shadow_runner.ShadowRunner.
#include <mlx/mlx.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string>

#include "bindings.h"
#include "bindings_runner.h"
#include "bindings_sequences.h"
#include "bindings_wait.h"
#include "float_type.h"
#include "mlx_od_moe/prefetcher.h"
#include "mlx_od_moe/shadow_runner.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using namespace nb::literals;
using mlx_od_moe::DType;
using mlx_od_moe::PredictionQueue;
using mlx_od_moe::PredictionRecord;
using mlx_od_moe::Predictor;
using mlx_od_moe::Query;
using mlx_od_moe::ShadowRunner;
using runner_input::Sequences;
using runner_input::text;

namespace {

// Larger states are referred to, not copied, where they cannot change: mx.arrays.
constexpr size_t kMostCopied = size_t{1} << 16;

// An array that another thread computes, or has computed. It is this object's alone, so that nobody else
// changes its state while we wait; its buffer is shared.
class ArrayBytes : public mlx_od_moe::PendingBytes {
 public:
  explicit ArrayBytes(mx::array array) : array_(std::move(array)) {}
  const void* wait() override {
    array_.wait();  // for its event: nothing is evaluated here
    return array_.data<char>();
  }

 private:
  mx::array array_;
};

// The hidden state of a call, and its shape.
struct Hidden {
  Query query;
  std::unique_ptr<mlx_od_moe::PendingBytes> bytes;
  std::vector<size_t> shape;
  nb::object owner;  // of query.hidden, while the call lasts

  explicit Hidden(nb::handle x) {
    if (nb::isinstance<mx::array>(x)) {
      from_mlx(nb::cast<mx::array>(x));
    } else {
      from_buffer(x);
    }
  }

 private:
  [[noreturn]] static void refuse_type() {
    throw nb::type_error(
        "[ShadowRunner] hidden_states must be a numpy array or mx.array of float32, float16 or bfloat16");
  }

  void from_mlx(const mx::array& a) {
    const std::optional<DType> type = float_type(a);
    if (!type) refuse_type();
    query.dtype = *type;
    if (a.is_tracer())
      throw std::invalid_argument("[ShadowRunner] predict_async can't be part of mx.compile or mx.grad");
    shape.assign(a.shape().begin(), a.shape().end());
    const bool ready = a.is_available() && a.flags().row_contiguous;
    if (ready && a.nbytes() <= kMostCopied) {
      query.hidden = a.data<char>();
      return;
    }
    // Rides the evaluation of `a` where that is under way, and starts it where it is not.
    mx::array own = mx::contiguous(a);
    {
      nb::gil_scoped_release release;
      mx::async_eval({own});
    }
    bytes = std::make_unique<ArrayBytes>(std::move(own));
  }

  void from_buffer(nb::handle x) {
    using Array = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
    Array array;
    if (!nb::try_cast(x, array)) refuse_type();
    const nb::dlpack::dtype type = array.dtype();
    const auto code = static_cast<nb::dlpack::dtype_code>(type.code);
    if (type == nb::dtype<float>()) {
      query.dtype = DType::float32;
    } else if (type.bits == 16 && code == nb::dlpack::dtype_code::Float) {
      query.dtype = DType::float16;
    } else if (type.bits == 16 && code == nb::dlpack::dtype_code::Bfloat) {
      query.dtype = DType::bfloat16;
    } else {
      refuse_type();
    }
    for (size_t i = 0; i < array.ndim(); ++i) shape.push_back(array.shape(i));
    query.hidden = array.data();
    owner = nb::cast(std::move(array));
  }
};

// Values known already, such as the last token's experts; an mx.array is evaluated here.
template <class T>
using Values = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;

template <class T>
Values<T> values(nb::handle x, std::vector<size_t> expected, bool any_last, const char* name) {
  Values<T> array;
  if (!nb::try_cast(x, array)) {
    throw nb::type_error(("[ShadowRunner] " + std::string(name) + " must be an array of " +
                          (std::is_same_v<T, float> ? "float32" : "int32"))
                             .c_str());
  }
  std::vector<size_t> shape;
  for (size_t i = 0; i < array.ndim(); ++i) shape.push_back(array.shape(i));
  if (any_last && shape.size() == expected.size()) expected.back() = shape.back();
  if (shape != expected) {
    throw std::invalid_argument("[ShadowRunner] " + std::string(name) + " must be " + text(expected) + ", but is " +
                                text(shape));
  }
  return array;
}

// A function of Python's, called and let go with the GIL, on whatever thread.
class Callback {
 public:
  explicit Callback(nb::object function) : function_(std::move(function)) {}
  ~Callback() {
    const nb::gil_scoped_acquire acquire;
    function_.reset();
  }
  Callback(const Callback&) = delete;
  Callback& operator=(const Callback&) = delete;

  void operator()(const PredictionRecord& record) {
    const nb::gil_scoped_acquire acquire;
    const nb::object function = function_;  // lives on while it runs, whatever is cleared meanwhile
    if (function.is_valid()) function(record);
  }
  nb::object& function() { return function_; }

 private:
  nb::object function_;
};

class Runner {
 public:
  Runner(const std::map<int, std::pair<Predictor, std::vector<int>>>& predictors, const std::vector<int>& moe_layers,
         std::optional<int> k, int capacity, std::shared_ptr<PredictionQueue> queue, nb::object on_prediction) {
    std::vector<mlx_od_moe::LayerPredictor> layers;
    for (const auto& [layer, predictor] : predictors) layers.push_back({layer, predictor.first, predictor.second});
    ShadowRunner::OnPrediction call;
    if (std::shared_ptr<mlx_od_moe::Prefetcher> prefetcher; nb::try_cast(on_prediction, prefetcher) && prefetcher) {
      call = [prefetcher](const PredictionRecord&) { prefetcher->drain(); };
    } else if (NextTokenPrefetcher* next = nullptr; nb::try_cast(on_prediction, next) && next) {
      call = *next;
    } else if (!on_prediction.is_none()) {
      callback_ = std::make_shared<Callback>(std::move(on_prediction));
      call = [callback = callback_](const PredictionRecord& record) { (*callback)(record); };
    }
    if (k && *k < 1) throw std::invalid_argument("[ShadowRunner] k must be 1 or more, got " + std::to_string(*k));
    native_ = std::make_shared<ShadowRunner>(std::move(layers), moe_layers,
                                             mlx_od_moe::RunnerOptions{k.value_or(0), capacity}, std::move(queue),
                                             std::move(call));
  }

  // What no call has reported is reported here.
  ~Runner() {
    close();
    for (;;) {
      try {
        native_->check();
        break;
      } catch (nb::python_error& error) {
        error.discard_as_unraisable("ShadowRunner");
      } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        PyErr_WriteUnraisable(nullptr);
      }
    }
    const nb::gil_scoped_release release;
    native_.reset();
  }

  uint64_t predict_async(nb::handle hidden_states, int layer, std::optional<uint64_t> step, nb::handle previous,
                         nb::handle context, nb::handle sequence) {
    const Sequences sequences(sequence);
    const int hidden_size = native_->hidden_size(layer);
    if (hidden_size == 0) return native_->predict_async(layer, {}, nullptr, step);
    Hidden hidden(hidden_states);
    std::vector<size_t> shape = hidden.shape;
    if (shape.empty() || shape.back() != static_cast<size_t>(hidden_size)) {
      throw std::invalid_argument("[ShadowRunner] hidden_states must be [..., " + std::to_string(hidden_size) +
                                  "], but is " + text(shape));
    }
    sequences.check(shape);
    shape.pop_back();
    size_t tokens = 1;
    for (const size_t n : shape) tokens *= n;
    hidden.query.tokens = static_cast<int>(tokens);
    const auto hand_in = [&] {
      return sequences.several
                 ? native_->predict_async(layer, hidden.query, std::move(hidden.bytes), step, *sequences.several)
                 : native_->predict_async(layer, hidden.query, std::move(hidden.bytes), step, sequences.one);
    };
    const Predictor* predictor = native_->predictor(layer);
    if (predictor == nullptr) return hand_in();
    const mlx_od_moe::PredictorConfig& config = predictor->config();
    shape.push_back(static_cast<size_t>(config.lookahead));
    shape.push_back(static_cast<size_t>(config.top_k));
    Values<int32_t> experts;
    if (!previous.is_none()) {
      experts = values<int32_t>(previous, shape, true, "previous");
      hidden.query.previous = experts.data();
      hidden.query.num_previous = static_cast<int>(experts.shape(experts.ndim() - 1));
    }
    Values<float> vector;
    if (!context.is_none()) {
      shape.resize(shape.size() - 2);
      shape.push_back(static_cast<size_t>(config.predictor_size));
      vector = values<float>(context, shape, false, "context");
      hidden.query.context = vector.data();
    }
    return hand_in();
  }

  std::vector<mlx_od_moe::ScoredExpert> get(int layer, std::optional<double> timeout) {
    if (timeout == 0.0) return native_->get_predictions(layer);
    std::vector<mlx_od_moe::ScoredExpert> experts;
    wait_without_gil(timeout, [&](auto deadline) {
      bool settled = false;
      experts = native_->get_predictions(layer, deadline, &settled);
      return settled || native_->on_its_thread();
    });
    return experts;
  }

  nb::dict statistics() const {
    const mlx_od_moe::RunnerStatistics s = native_->statistics();
    nb::dict out;
    out["submitted"] = s.submitted;
    out["predicted"] = s.predicted;
    out["observed"] = s.observed;
    out["dropped"] = s.dropped;
    out["expired"] = s.expired;
    out["failed"] = s.failed;
    out["waiting"] = s.waiting;
    out["errors"] = s.errors;
    out["latency_p50_us"] = static_cast<double>(s.latency_p50_ns) / 1000;
    out["latency_p99_us"] = static_cast<double>(s.latency_p99_ns) / 1000;
    return out;
  }

  void close() {
    const nb::gil_scoped_release release;
    native_->close();
  }

  ShadowRunner& native() { return *native_; }
  const std::shared_ptr<ShadowRunner>& shared() const { return native_; }

  static int traverse(PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    if (!nb::inst_ready(self)) return 0;
    if (auto& callback = nb::inst_ptr<Runner>(self)->callback_) Py_VISIT(callback->function().ptr());
    return 0;
  }

  static int clear(PyObject* self) {
    // The thread calls an object that has gone no more.
    if (auto& callback = nb::inst_ptr<Runner>(self)->callback_) callback->function().reset();
    return 0;
  }

 private:
  std::shared_ptr<Callback> callback_;
  std::shared_ptr<ShadowRunner> native_;
};

std::vector<int> ids_of(Runner& runner, int layer, std::optional<double> timeout) {
  std::vector<int> ids;
  for (const auto& expert : runner.get(layer, timeout)) ids.push_back(expert.id);
  return ids;
}

std::vector<std::pair<int, float>> scored_ids_of(Runner& runner, int layer, std::optional<double> timeout) {
  std::vector<std::pair<int, float>> experts;
  for (const auto& expert : runner.get(layer, timeout)) experts.emplace_back(expert.id, expert.score);
  return experts;
}

PyType_Slot runner_slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(&Runner::traverse)},
                              {Py_tp_clear, reinterpret_cast<void*>(&Runner::clear)},
                              {0, nullptr}};

}  // namespace

std::shared_ptr<ShadowRunner> shared_runner(nb::handle runner) { return nb::cast<const Runner&>(runner).shared(); }

void bind_shadow_runner(nb::module_& m) {
  nb::class_<Runner>(m, "ShadowRunner", nb::type_slots(runner_slots), nb::is_weak_referenceable())
      .def(nb::init<const std::map<int, std::pair<Predictor, std::vector<int>>>&, const std::vector<int>&,
                    std::optional<int>, int, std::shared_ptr<PredictionQueue>, nb::object>(),
           "predictors"_a, "moe_layers"_a, "k"_a.none(), "capacity"_a, "queue"_a.none(), "on_prediction"_a.none())
      .def("predict_async", &Runner::predict_async, "hidden_states"_a.none(), "current_layer"_a, "step"_a = nb::none(),
           "previous"_a = nb::none(), "context"_a = nb::none(), "sequence"_a = 0,
           nb::sig("def predict_async(self, hidden_states: object, current_layer: int, step: int | None = None, "
                   "previous: object | None = None, context: object | None = None, "
                   "sequence: int | collections.abc.Sequence[int] = 0) -> int"),
           R"(Hand in a MoE layer's hidden state and return at once.

Args:
    hidden_states: the MoE block's input [..., hidden_size], a numpy array or mx.array of float32,
        float16 or bfloat16. An mx.array that is not computed yet is started with mx.async_eval, and
        predicted from once it is there. Several tokens give one prediction: the union of theirs.
    current_layer: the MoE layer, by the model's index. A layer without a predictor (the last ones)
        predicts nothing.
    step: the forward pass, not before an earlier one's. Default: the current one, or the next where
        current_layer does not come after the last one handed in.
    previous: the previous token's experts at the target layers, int32 [..., lookahead, n], -1: none,
        for predictors that take them.
    context: added to the trunk's output, float32 [..., predictor_size].
    sequence: whose next tokens these are, where predictors have a context. A forward pass has as
        many tokens at each of its layers, which rise; with several sequences in turns, give `step`.
        A list: hidden_states [n, hidden_size] or [n, 1, hidden_size] are the next tokens of n
        different ones, each predicted for with its own context.

Returns the step. Raises ValueError for a wrong layer, shape or step, RuntimeError once closed, and what
an earlier prediction or callback raised.)")
      .def(
          "reset", [](Runner& r, int sequence) { r.native().reset(sequence); }, "sequence"_a = 0,
          "The sequence starts anew, and its context's memory is freed. Like trim and fork it holds for what is\n"
          "handed in after, on the thread that calls predict_async; without contexts it does nothing.")
      .def(
          "trim", [](Runner& r, int sequence, int64_t tokens) { r.native().trim(sequence, tokens); }, "sequence"_a,
          "tokens"_a,
          "The sequence's last `tokens` tokens were taken back, as mlx-lm's trim_prompt_cache does. Up to 16 tokens\n"
          "its context loses no others.")
      .def(
          "fork", [](Runner& r, int sequence, int to) { r.native().fork(sequence, to); }, "sequence"_a, "to"_a,
          "Sequence `to` goes on from a copy of the sequence's context, whatever it was before.")
      .def("get_predictions_for_layer", &ids_of, "layer"_a, "timeout"_a = 0.0,
           nb::sig("def get_predictions_for_layer(self, layer: int, timeout: float | None = 0.0) -> list[int]"),
           R"(Expert ids of the layer's freshest prediction in the current step, best first; [] for none.

timeout: seconds to wait for the predictions under way; 0: not at all, None: for as long as it takes.)")
      .def("get_scored_predictions_for_layer", &scored_ids_of, "layer"_a, "timeout"_a = 0.0,
           nb::sig("def get_scored_predictions_for_layer(self, layer: int, timeout: float | None = 0.0) -> "
                   "list[tuple[int, float]]"),
           "The same with each expert's logit, or for several tokens the number that want it.")
      .def("statistics", &Runner::statistics, nb::sig("def statistics(self) -> dict[str, float]"),
           R"(Counts so far: submitted == predicted + observed + dropped + expired + failed + waiting.

`errors` counts failed predictions and callbacks; latency_p50_us and latency_p99_us are from hidden
state to queue.)")
      .def("_close", &Runner::close)
      .def("_check", [](Runner& r) { r.native().check(); })
      .def_prop_ro(
          "queue", [](Runner& r) { return r.native().queue(); }, "Where all predictions go.")
      .def_prop_ro(
          "step", [](Runner& r) { return r.native().step(); }, "The current forward pass.")
      .def_prop_ro("moe_layers", [](Runner& r) { return r.native().moe_layers(); })
      .def_prop_ro("closed", [](Runner& r) { return r.native().closed(); });
}
