// What `mlx-od-moe bench` measures by C++'s clock, without Python's share.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <chrono>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "mlx_od_moe/predictor.h"
#include "mlx_od_moe/read_probe.h"
#include "mlx_od_moe/sequence_context.h"

namespace nb = nanobind;
using namespace nb::literals;
using mlx_od_moe::Predictor;
using mlx_od_moe::ReadProbe;
using mlx_od_moe::SequenceContext;

namespace {

using States = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Clock = std::chrono::steady_clock;

mlx_od_moe::Query query_of(const States& x) {
  mlx_od_moe::Query query;
  query.hidden = x.data();
  query.tokens = static_cast<int>(x.shape(0));
  return query;
}

double time_observe(SequenceContext& sequence, int layer, const States& x) {
  if (x.shape(1) != static_cast<size_t>(sequence.hidden_size())) {
    throw std::invalid_argument("[time_observe] x must be [tokens, " + std::to_string(sequence.hidden_size()) +
                                "], got " + std::to_string(x.shape(1)) + " columns");
  }
  const mlx_od_moe::Query query = query_of(x);
  const nb::gil_scoped_release release;
  const Clock::time_point start = Clock::now();
  sequence.observe(layer, query);
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

double time_predict(const Predictor& predictor, const States& x, int k, const SequenceContext* sequence) {
  const mlx_od_moe::PredictorConfig& config = predictor.config();
  if (x.shape(1) != static_cast<size_t>(config.hidden_size)) {
    throw std::invalid_argument("[time_predict] x must be [tokens, " + std::to_string(config.hidden_size) + "], got " +
                                std::to_string(x.shape(1)) + " columns");
  }
  mlx_od_moe::Query query = query_of(x);
  query.sequence = sequence;
  std::vector<int32_t> ids(x.shape(0) * static_cast<size_t>(config.lookahead) * 32);
  const nb::gil_scoped_release release;
  const Clock::time_point start = Clock::now();
  predictor.predict(query, k, ids.data());
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

}  // namespace

void bind_bench(nb::module_& m) {
  m.def("time_observe", &time_observe, "sequence"_a, "layer"_a, "x"_a,
        "Microseconds that SequenceContext.observe takes for a caller in C++; x is float32 [tokens, hidden_size].");
  m.def("time_predict", &time_predict, "predictor"_a, "x"_a, "k"_a, "sequence"_a = nb::none(),
        "Microseconds that NativePredictor.predict takes for a caller in C++; x is float32 [tokens, hidden_size].");
  nb::class_<ReadProbe>(m, "ReadProbe", "Memory to read, and the threads to read it with: the floor of any forward.")
      .def(nb::init<size_t, int>(), "bytes"_a, "threads"_a = 1, nb::call_guard<nb::gil_scoped_release>())
      .def("read", &ReadProbe::read, "offset"_a, "bytes"_a, nb::call_guard<nb::gil_scoped_release>(),
           "Load each of the bytes once and do nothing else; returns the microseconds that took.")
      .def_prop_ro("bytes", &ReadProbe::bytes)
      .def_prop_ro("threads", &ReadProbe::threads);
}
