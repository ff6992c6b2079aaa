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

namespace nb = nanobind;
using namespace nb::literals;
using mlx_od_moe::Predictor;
using mlx_od_moe::ReadProbe;

namespace {

using States = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Clock = std::chrono::steady_clock;

double time_predict(const Predictor& predictor, const States& x, int k) {
  const mlx_od_moe::PredictorConfig& config = predictor.config();
  if (x.shape(1) != static_cast<size_t>(config.hidden_size)) {
    throw std::invalid_argument("[time_predict] x must be [tokens, " + std::to_string(config.hidden_size) + "], got " +
                                std::to_string(x.shape(1)) + " columns");
  }
  const mlx_od_moe::Query query{x.data(), mlx_od_moe::DType::float32, static_cast<int>(x.shape(0)), nullptr, 0,
                                nullptr};
  std::vector<int32_t> ids(x.shape(0) * static_cast<size_t>(config.lookahead) * 32);
  const nb::gil_scoped_release release;
  const Clock::time_point start = Clock::now();
  predictor.predict(query, k, ids.data());
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

}  // namespace

void bind_bench(nb::module_& m) {
  m.def("time_predict", &time_predict, "predictor"_a, "x"_a, "k"_a,
        "Microseconds that NativePredictor.predict takes for a caller in C++; x is float32 [tokens, hidden_size].");
  nb::class_<ReadProbe>(m, "ReadProbe", "Memory to read, and the threads to read it with: the floor of any forward.")
      .def(nb::init<size_t, int>(), "bytes"_a, "threads"_a = 1, nb::call_guard<nb::gil_scoped_release>())
      .def("read", &ReadProbe::read, "offset"_a, "bytes"_a, nb::call_guard<nb::gil_scoped_release>(),
           "Load each of the bytes once and do nothing else; returns the microseconds that took.")
      .def_prop_ro("bytes", &ReadProbe::bytes)
      .def_prop_ro("threads", &ReadProbe::threads);
}
