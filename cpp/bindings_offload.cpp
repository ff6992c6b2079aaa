// What runs a model's experts from the store: the native part of mlx_od_moe.switch and mlx_od_moe.runtime.
#include <mlx/compile_impl.h>
#include <mlx/mlx.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "bindings.h"
#include "bindings_runner.h"
#include "bindings_store.h"
#include "expert_loan.h"
#include "graph_leases.h"
#include "mlx_od_moe/pass_observer.h"
#include "mlx_od_moe/prefetcher.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using namespace nb::literals;
using mlx_od_moe::ExpertLease;
using mlx_od_moe::PassObserver;
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

// Leases may outlive it: what it was made of ends with it, on Python's threads.
class Observer {
 public:
  explicit Observer(PassObserver::Parts parts) : native_(std::make_shared<PassObserver>(std::move(parts))) {}
  ~Observer() { native_->close(); }
  Observer(const Observer&) = delete;
  Observer& operator=(const Observer&) = delete;

  const std::shared_ptr<PassObserver>& native() const { return native_; }
  PassObserver* operator->() const { return native_.get(); }

 private:
  std::shared_ptr<PassObserver> native_;
};

template <class T>
using Table = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;

template <class T>
std::vector<T> copied(const Table<T>& table) {
  return {table.data(), table.data() + table.size()};
}

void make_observer(Observer* self, const Store& store, std::shared_ptr<PredictionQueue> queue,
                   std::shared_ptr<Prefetcher> prefetcher, nb::handle runner, std::vector<int> watched,
                   std::map<int, std::vector<int>> previous_at, std::vector<int> token_layers,
                   const std::optional<Table<int32_t>>& tokens, const std::optional<Table<uint16_t>>& experts,
                   const std::optional<Table<uint8_t>>& probabilities, nb::handle next, int next_from) {
  PassObserver::Parts parts;
  parts.store = shared(store);
  parts.queue = std::move(queue);
  parts.prefetcher = std::move(prefetcher);
  parts.previous_at = std::move(previous_at);
  if (!runner.is_none()) {
    parts.runner = shared_runner(runner);
    parts.watched = std::move(watched);
  }
  if (tokens && experts && probabilities) {
    parts.tokens.emplace(copied(*tokens), copied(*experts), copied(*probabilities), std::move(token_layers));
  }
  if (!next.is_none()) parts.next = {shared_runner(next), next_from};
  new (self) Observer(std::move(parts));
}

void bind_observer(nb::module_& m) {
  nb::class_<Observer>(m, "PassObserver",
                       R"(Told what forward passes do, prefetches by it: see cpp/mlx_od_moe/pass_observer.h.

watched: the layers whose states the runner is given. previous_at: for layers whose predictors take the last token's experts, the layers that they speak of. The
next three are what TokenExperts has, and token_layers the first MoE layers, which it speaks of. next: a runner whose
layer 0 is the last MoE layer, next_from.)")
      .def("__init__", &make_observer, "store"_a, "queue"_a, "prefetcher"_a, "runner"_a.none(), "watched"_a,
           "previous_at"_a, "token_layers"_a, "tokens"_a.none(), "experts"_a.none(), "probabilities"_a.none(),
           "next"_a.none(), "next_from"_a,
           nb::sig("def __init__(self, store: ExpertStore, queue: PredictionQueue, prefetcher: Prefetcher, runner: "
                   "ShadowRunner | None, watched: list[int], previous_at: dict[int, list[int]], token_layers: "
                   "list[int], tokens: "
                   "numpy.typing.NDArray[numpy.int32] | None, experts: numpy.typing.NDArray[numpy.uint16] | None, "
                   "probabilities: numpy.typing.NDArray[numpy.uint8] | None, next: ShadowRunner | None, next_from: "
                   "int) -> None"))
      .def(
          "begin",
          [](Observer& o, const Ids& tokens, uint64_t step) { o->begin({tokens.data(), tokens.size()}, step); },
          "tokens"_a, "step"_a,
          nb::sig("def begin(self, tokens: numpy.typing.NDArray[numpy.int32], step: int) -> None"),
          "A pass begins, with one token of each sequence.")
      .def(
          "begin_in_graph",
          [](Observer& o, const mx::array& tokens, uint64_t step, const LeaseChain& chain) {
            return BeginPass::of(tokens, o.native(), step, chain);
          },
          "tokens"_a, "step"_a, "chain"_a,
          nb::sig("def begin_in_graph(self, tokens: mlx.core.array, step: int, chain: LeaseChain) -> mlx.core.array"),
          "The same tokens: `begin` is called when MLX has them, after the chain's last lease has ended.")
      .def(
          "remember",
          [](Observer& o, int layer, const Ids& ids) {
            o->remember(layer, {ids.data(), ids.size()}, static_cast<int>(ids.shape(0)));
          },
          "layer"_a, "ids"_a, nb::sig("def remember(self, layer: int, ids: numpy.typing.NDArray[numpy.int32]) -> None"),
          "The experts [sequences, top_k] of each sequence's last token.")
      .def(
          "previous", [](Observer& o, int layer, int sequences) { return o->previous(layer, sequences); }, "layer"_a,
          "sequences"_a,
          "What is remembered of the layers that the layer's predictor speaks of: [sequences, layers, top_k], flat;\n"
          "empty: not known of all.")
      .def(
          "miss", [](Observer& o) { o->miss(); }, "What is told next does not follow what was told last.")
      .def(
          "take_missed", [](Observer& o) { return o->take_missed(); }, "Whether that was so since the last call.")
      .def("take_error", [](Observer& o) { return o->take_error(); }, "Why predicting stopped, once.");
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
            const LeaseChain held = chain;  // for as long as other threads may change it
            nb::gil_scoped_release release;
            held.settle();
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
      .def(
          "begin",
          [](const GraphLeases& leases, const mx::array& ids, const LeaseChain& chain, const Observer& observer,
             uint64_t step, std::optional<mx::array> hidden,
             int sequence) { return leases.begin(ids, {observer.native(), step, std::move(hidden), sequence}, chain); },
          "ids"_a, "chain"_a, "observer"_a, "step"_a, "hidden"_a = nb::none(), "sequence"_a = 0,
          nb::sig("def begin(self, ids: mlx.core.array, chain: LeaseChain, observer: PassObserver, step: int, hidden: "
                  "mlx.core.array | None = None, sequence: int = 0) -> GraphLease"),
          R"(For ids [...], once the chain's last has ended; before, the observer is told.

hidden: the layer's input, of one token of the sequence, to predict from; None: it is not looked at.)");
  bind_observer(m);
  m.def(
      "is_computed", [](const mx::array& array) { return array.is_available(); }, "array"_a,
      nb::sig("def is_computed(array: mlx.core.array) -> bool"), "Whether MLX has computed it; never waits.");
  m.def(
      "clear_compile_cache", [] { mx::detail::compile_clear_cache(mx::detail::compile_cache()); },
      R"(Forgets what mx.compile has compiled on this thread.

The last thing for a thread to do that a process may end right after. MLX forgets it otherwise when the
thread is gone for Python; where the interpreter is by then at its end, the process aborts.)");

  nb::class_<NextTokenPrefetcher>(m, "NextTokenPrefetcher",
                                  R"(The same for a runner whose layers 1, 2 ... are these of the next token.

Give it to the runner as on_prediction.)")
      .def(nb::init<std::shared_ptr<Prefetcher>, std::vector<int>>(), "prefetcher"_a, "layers"_a);
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
