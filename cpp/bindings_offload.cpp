// What runs a model's experts from the store: the native part of mlx_od_moe.switch and mlx_od_moe.runtime.
#include <mlx/compile_impl.h>
#include <mlx/mlx.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "bindings.h"
#include "bindings_store.h"
#include "expert_loan.h"
#include "graph_leases.h"
#include "mlx_od_moe/prefetcher.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using namespace nb::literals;
using mlx_od_moe::ExpertLease;
using mlx_od_moe::PredictionQueue;
using mlx_od_moe::PredictionRecall;
using mlx_od_moe::PrefetchChange;
using mlx_od_moe::Prefetcher;
using mlx_od_moe::PrefetcherOptions;

namespace {

using Ids = nb::ndarray<const int32_t, nb::c_contig, nb::device::cpu>;
using Slots = Ids;

nb::list recalls(const Prefetcher& prefetcher) {
  nb::list out;
  for (const PredictionRecall& r : prefetcher.recalls()) {
    nb::dict one;
    one["layer"] = r.layer;
    one["distance"] = r.distance;
    one["predictions"] = r.predictions;
    one["chosen"] = r.chosen;
    one["named"] = r.named;
    one["useful"] = r.useful;
    one["wasted"] = r.wasted;
    one["on"] = r.on;
    out.append(one);
  }
  return out;
}

nb::list take_changes(Prefetcher& prefetcher) {
  nb::list out;
  for (const PrefetchChange& c : prefetcher.take_changes()) {
    out.append(nb::make_tuple(c.layer, c.distance, c.on, c.useful_share));
  }
  return out;
}

}  // namespace

void bind_offload(nb::module_& m) {
  nb::class_<ExpertLoan>(m, "ExpertLoan", R"(Arrays over a layer's pools, and slot numbers that come later.

A graph is built with them; `begin` gives it the lease, which ends when MLX has computed all that the arrays
went into, or that will never be computed. Before, an evaluation raises RuntimeError.)")
      .def(
          "__init__",
          [](ExpertLoan* self, const std::vector<mx::array>& pools, const std::vector<int>& shape) {
            new (self) ExpertLoan(pools, mx::Shape(shape.begin(), shape.end()));
          },
          "pools"_a, "shape"_a,
          nb::sig("def __init__(self, pools: collections.abc.Sequence[mlx.core.array], shape: "
                  "collections.abc.Sequence[int]) -> None"))
      .def_prop_ro("pools", &ExpertLoan::pools, nb::sig("def pools(self) -> list[mlx.core.array]"),
                   "Over the same memory as the pools; none once it has begun.")
      .def_prop_ro("slots", &ExpertLoan::slots, nb::sig("def slots(self) -> mlx.core.array"), "uint32, of the shape.")
      .def(
          "begin",
          [](ExpertLoan& loan, ExpertLease& lease, const Slots& slots) {
            loan.begin(lease, {slots.data(), slots.size()});
          },
          "lease"_a, "slots"_a,
          nb::sig("def begin(self, lease: ExpertLease, slots: numpy.typing.NDArray[numpy.int32]) -> None"),
          "Takes the lease over.");
  nb::class_<LeaseChain>(m, "LeaseChain", "The GraphLeases of one thread: see cpp/graph_leases.h.")
      .def(nb::init<>())
      .def(
          "settle",
          [](LeaseChain& chain) {
            nb::gil_scoped_release release;
            chain.settle();
          },
          "Waits for the leases that MLX is to begin without being asked again. Raises what they failed of.")
      .def("count", &LeaseChain::count, "Leases that may still begin, or have not ended.")
      .def("forget", &LeaseChain::forget, "No more are built: what is left of them need not be kept for the next.")
      .def("revoke", &LeaseChain::revoke, "Leases that have not begun fail where they would.")
      .def("renew", &LeaseChain::renew, "After a failure, leases that are built from now on are tried again.");
  nb::class_<GraphLease>(m, "GraphLease", "A lease that MLX begins and ends itself, on a CPU.")
      .def_prop_ro("slots", &GraphLease::slots, nb::sig("def slots(self) -> mlx.core.array"),
                   "Where the experts lie, uint32, of the shape of their ids.")
      .def("end", &GraphLease::end, "output"_a, "chain"_a,
           nb::sig("def end(self, output: mlx.core.array, chain: LeaseChain) -> mlx.core.array"),
           "What was computed with the slots. Its evaluation ends the lease.");
  nb::class_<GraphLeases>(m, "GraphLeases", "Makes them for one layer.")
      .def(
          "__init__",
          [](GraphLeases* self, const Store& store, int layer) { new (self) GraphLeases{shared(store), layer}; },
          "store"_a, "layer"_a)
      .def("begin", &GraphLeases::begin, "ids"_a, "chain"_a,
           nb::sig("def begin(self, ids: mlx.core.array, chain: LeaseChain) -> GraphLease"),
           "For ids [...], once the chain's last has ended.");
  m.def(
      "is_computed", [](const mx::array& array) { return array.is_available(); }, "array"_a,
      nb::sig("def is_computed(array: mlx.core.array) -> bool"), "Whether MLX has computed it; never waits.");
  m.def(
      "clear_compile_cache", [] { mx::detail::compile_clear_cache(mx::detail::compile_cache()); },
      R"(Forgets what mx.compile has compiled on this thread.

The last thing for a thread to do that a process may end right after. MLX forgets it otherwise when the
thread is gone for Python; where the interpreter is by then at its end, the process aborts.)");

  nb::class_<Prefetcher>(m, "Prefetcher", R"(Prefetches what a ShadowRunner predicts, where that pays.

Give a runner its queue, and itself as on_prediction. See cpp/mlx_od_moe/prefetcher.h.)")
      .def(
          "__init__",
          [](Prefetcher* self, const Store& store, const std::shared_ptr<PredictionQueue>& queue) {
            new (self) Prefetcher(shared(store), queue, PrefetcherOptions());
          },
          "store"_a, "queue"_a)
      .def("drain", &Prefetcher::drain, "Prefetches what the records that wait in the queue name.")
      .def(
          "reached",
          [](Prefetcher& p, int layer, const Ids& ids, uint64_t step) {
            p.reached(layer, {ids.data(), ids.size()}, step);
          },
          "layer"_a, "ids"_a, "step"_a,
          nb::sig("def reached(self, layer: int, ids: numpy.typing.NDArray[numpy.int32], step: int) -> None"),
          "The layer has chosen: its predictions are judged.")
      .def("recalls", &recalls, nb::sig("def recalls(self) -> list[dict[str, typing.Any]]"),
           "For each layer and distance: how its predictions have done, and whether they cause reads.")
      .def("take_changes", &take_changes, nb::sig("def take_changes(self) -> list[tuple[int, int, bool, float]]"),
           "(layer, distance, whether on now, share of useful ones), since the last call.")
      .def("uses", &Prefetcher::uses, "layer"_a, "For each expert of the layer, the calls of `reached` that named it.");
}
