// Prediction and PredictionQueue for Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <limits>
#include <string>

#include "bindings.h"
#include "bindings_wait.h"
#include "mlx_od_moe/prediction_queue.h"

namespace nb = nanobind;
using namespace nb::literals;
using mlx_od_moe::PredictionQueue;
using mlx_od_moe::PredictionRecord;

namespace {

template <class T>
T checked(int64_t value, int64_t most, const char* name, int64_t least = 0) {
  if (value >= least && value <= most) return static_cast<T>(value);
  throw std::invalid_argument(std::string("[Prediction] ") + name + " must be " + std::to_string(least) + " ... " +
                              std::to_string(most) + ", got " + std::to_string(value));
}

void make_prediction(PredictionRecord* self, uint64_t step, int64_t source_layer, int64_t target_layer,
                     int64_t distance, const std::vector<int64_t>& expert_ids,
                     const std::optional<std::vector<float>>& scores, int64_t first_rank, bool batch) {
  constexpr int64_t kMaxIds = PredictionRecord::kMaxIds;
  PredictionRecord r;
  r.step = step;
  r.source_layer = checked<int16_t>(source_layer, INT16_MAX, "source_layer", -1);
  r.target_layer = checked<int16_t>(target_layer, INT16_MAX, "target_layer");
  r.distance = checked<uint8_t>(distance, UINT8_MAX, "distance");
  r.count = checked<uint8_t>(static_cast<int64_t>(expert_ids.size()), kMaxIds, "the number of expert_ids");
  if (first_rank % kMaxIds != 0) {
    throw std::invalid_argument("[Prediction] first_rank must be a multiple of 16, got " + std::to_string(first_rank));
  }
  r.part = checked<uint8_t>(first_rank / kMaxIds, PredictionRecord::kMaxParts - 1, "first_rank / 16");
  r.batch = batch;
  for (size_t i = 0; i < expert_ids.size(); ++i) r.ids[i] = checked<int16_t>(expert_ids[i], INT16_MAX, "expert_ids");
  if (scores) {
    if (scores->size() != expert_ids.size()) {
      throw std::invalid_argument("[Prediction] scores must be as many as expert_ids (" +
                                  std::to_string(expert_ids.size()) + "), got " + std::to_string(scores->size()));
    }
    std::copy(scores->begin(), scores->end(), r.scores);
  }
  new (self) PredictionRecord(r);
}

std::optional<PredictionRecord> try_pop(PredictionQueue& queue) {
  PredictionRecord record;
  if (!queue.try_pop(record)) return std::nullopt;
  return record;
}

std::optional<PredictionRecord> wait_pop(PredictionQueue& queue, std::optional<double> timeout) {
  PredictionRecord record;
  if (queue.try_pop(record)) return record;
  bool popped = false;
  wait_without_gil(timeout, [&](auto deadline) {
    popped = queue.wait_pop(record, deadline);
    return popped || queue.closed();
  });
  // Closed between a vain attempt and the question: what came before it is still to be had.
  return popped || queue.try_pop(record) ? std::optional(record) : std::nullopt;
}

nb::dict statistics(const PredictionQueue& queue) {
  const mlx_od_moe::QueueStatistics s = queue.statistics();
  nb::dict out;
  out["pushed"] = s.pushed;
  out["popped"] = s.popped;
  out["dropped"] = s.dropped;
  out["expired"] = s.expired;
  out["waiting"] = s.waiting;
  return out;
}

std::string represent(const PredictionRecord& r) {
  std::string ids;
  for (int i = 0; i < r.count; ++i) ids += (i > 0 ? ", " : "") + std::to_string(r.ids[i]);
  return "Prediction(step=" + std::to_string(r.step) + ", source_layer=" + std::to_string(r.source_layer) +
         ", target_layer=" + std::to_string(r.target_layer) + ", expert_ids=[" + ids + "])";
}

}  // namespace

void bind_prediction_queue(nb::module_& m) {
  m.def("_begin_exit", [] { interpreter_exit.begin(); });
  nb::class_<PredictionRecord>(m, "Prediction",
                               R"(Up to 16 experts that one layer's predictor wants at another, best first.

More are spread over several predictions, told apart by `first_rank`: 0, 16, 32 ...)")
      .def("__init__", &make_prediction, "step"_a, "source_layer"_a, "target_layer"_a, "distance"_a, "expert_ids"_a,
           "scores"_a = nb::none(), "first_rank"_a = 0, "batch"_a = false)
      .def("__repr__", &represent)
      .def_ro("step", &PredictionRecord::step, "The forward pass it was made in.")
      .def_ro("source_layer", &PredictionRecord::source_layer,
              "The MoE layer whose hidden state it was made from; -1: it was made from the token.")
      .def_ro("target_layer", &PredictionRecord::target_layer, "The MoE layer that it is about.")
      .def_ro("distance", &PredictionRecord::distance, "MoE layers from source to target.")
      .def_ro("ready_ns", &PredictionRecord::ready_ns, "When the hidden state was there, by time.monotonic_ns().")
      .def_ro("batch", &PredictionRecord::batch, "Scores are numbers of tokens that want the expert, not logits.")
      .def_prop_ro(
          "first_rank", [](const PredictionRecord& r) { return r.part * PredictionRecord::kMaxIds; },
          "The rank of the first expert here.")
      .def_prop_ro("expert_ids", [](const PredictionRecord& r) { return std::vector<int>(r.ids, r.ids + r.count); })
      .def_prop_ro("scores",
                   [](const PredictionRecord& r) { return std::vector<float>(r.scores, r.scores + r.count); });

  nb::class_<PredictionQueue>(m, "PredictionQueue",
                              R"(A bounded queue of predictions without a lock, for any number of threads.

Full, it drops its oldest. A prediction of a newer step, or begin_step, ends the step before: what that
one left is never handed out. The GIL is released where a call waits.)")
      .def(nb::init<size_t>(), "capacity"_a = 1024, "capacity: in predictions, rounded up to a power of two.")
      .def("try_push", &PredictionQueue::try_push, "prediction"_a,
           "Never waits. False: closed, or the prediction is of an older step.")
      .def("try_pop", &try_pop, "The oldest prediction of the current step, or None. Never waits.")
      .def("wait_pop", &wait_pop, "timeout"_a = nb::none(),
           "Wait for a prediction, at most `timeout` seconds. None: time is up, or closed and empty.")
      .def("begin_step", &PredictionQueue::begin_step, "step"_a,
           "Make predictions of earlier steps invisible. A step before the current one changes nothing.")
      .def("close", &PredictionQueue::close, "Refuse further predictions and wake all who wait.")
      .def("size_approx", &PredictionQueue::size_approx, "Predictions inside, expired ones included.")
      .def("statistics", &statistics, nb::sig("def statistics(self) -> dict[str, int]"),
           "Counts so far: pushed == popped + dropped + expired + waiting, once nobody uses the queue.")
      .def_prop_ro("step", &PredictionQueue::step, "The current step.")
      .def_prop_ro("closed", &PredictionQueue::closed)
      .def_prop_ro("capacity", &PredictionQueue::capacity);
}
