// The replay simulator for Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>

#include "bindings.h"
#include "mlx_od_moe/eviction.h"
#include "mlx_od_moe/simulator.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace mlx_od_moe;

namespace {

using Routes = nb::ndarray<const int16_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<const int16_t, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Probabilities = nb::ndarray<const float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;

constexpr const char* kPrefetch[] = {"none", "predicted", "oracle", "oracle_next_token"};

Prefetch parse_prefetch(const std::string& name) {
  for (int i = 0; i < 4; ++i) {
    if (name == kPrefetch[i]) return Prefetch(i);
  }
  throw std::invalid_argument("[simulate] prefetch '" + name + "': it is none, predicted, oracle or oracle_next_token");
}

nb::dict to_dict(const SimulatorCounts& c) {
  nb::dict out;
  out["lookups"] = c.lookups;
  out["hits"] = c.hits;
  out["late"] = c.late;
  out["misses"] = c.misses;
  out["prefetched"] = c.prefetched;
  out["useful"] = c.useful;
  out["wasted"] = c.wasted;
  out["pending"] = c.pending;
  out["named"] = c.named;
  out["stall"] = c.stall;
  out["time"] = c.time;
  return out;
}

nb::dict run_simulation(const Routes& routes, int num_experts, const Ids& ids, const Probabilities& probabilities,
                        const SimulatorOptions& options) {
  RecordedRoutes recorded{{routes.data(), routes.size()},
                          int64_t(routes.shape(0)),
                          int(routes.shape(1)),
                          int(routes.shape(2)),
                          num_experts};
  RecordedPredictions predictions{
      {ids.data(), ids.size()}, {probabilities.data(), probabilities.size()}, int(ids.shape(2)), int(ids.shape(3))};
  SimulatorResult result;
  {
    nb::gil_scoped_release release;
    result = simulate(recorded, predictions, options);
  }
  nb::dict out = to_dict(result.total);
  nb::list layers;
  for (const SimulatorCounts& counts : result.layers) layers.append(to_dict(counts));
  out["layers"] = layers;
  return out;
}

}  // namespace

void bind_simulator(nb::module_& m) {
  m.def("eviction_policies", &eviction_policies, "The names that a store and the simulator take.");
  nb::class_<SimulatorOptions>(m, "SimulatorOptions", "See cpp/mlx_od_moe/simulator.h. Times are in one unit.")
      .def(nb::init<>())
      .def_rw("capacity", &SimulatorOptions::capacity, "Experts that each layer has room for.")
      .def_rw("policy", &SimulatorOptions::policy, "One of eviction_policies(), or belady.")
      .def_prop_rw(
          "prefetch", [](const SimulatorOptions& o) { return std::string(kPrefetch[size_t(o.prefetch)]); },
          [](SimulatorOptions& o, const std::string& name) { o.prefetch = parse_prefetch(name); },
          "none, predicted, oracle or oracle_next_token.")
      .def_prop_rw(
          "widths", [](const SimulatorOptions& o) { return o.prefetching.widths; },
          [](SimulatorOptions& o, std::vector<int> v) { o.prefetching.widths = std::move(v); },
          "Experts of one prediction that are considered, per distance.")
      .def_prop_rw(
          "thresholds", [](const SimulatorOptions& o) { return o.prefetching.thresholds; },
          [](SimulatorOptions& o, std::vector<float> v) { o.prefetching.thresholds = std::move(v); },
          "The least probability that is worth a read, per distance.")
      .def_prop_rw(
          "discount", [](const SimulatorOptions& o) { return o.prefetching.discount; },
          [](SimulatorOptions& o, float v) { o.prefetching.discount = v; },
          "Priority is probability x discount^(distance - 1).")
      .def_prop_rw(
          "margin", [](const SimulatorOptions& o) { return o.prefetching.margin; },
          [](SimulatorOptions& o, float v) { o.prefetching.margin = v; },
          "What is predicted with q makes room for what is predicted with p if q < margin x p.")
      .def_rw("layer_time", &SimulatorOptions::layer_time)
      .def_rw("token_time", &SimulatorOptions::token_time)
      .def_rw("first_attention", &SimulatorOptions::first_attention)
      .def_rw("read_time", &SimulatorOptions::read_time)
      .def_rw("latency", &SimulatorOptions::latency);
  m.def("simulate", &run_simulation, "routes"_a.noconvert(), "num_experts"_a, "ids"_a.noconvert(),
        "probabilities"_a.noconvert(), "options"_a,
        R"(Replay routes [tokens, layers, top_k] and predictions [tokens, layers + 1, lookahead, width].

Returns the counts of SimulatorCounts by name, and under "layers" those of each layer.)");
}
