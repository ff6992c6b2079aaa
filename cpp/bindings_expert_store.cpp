// ExpertStore and ExpertLease for Python: the native part of mlx_od_moe.expert_store.
#include <mlx/mlx.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "bindings.h"
#include "bindings_wait.h"
#include "mlx_od_moe/expert_store.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using namespace nb::literals;
using mlx_od_moe::ExpertFile;
using mlx_od_moe::ExpertLease;
using mlx_od_moe::ExpertStore;
using mlx_od_moe::StoreCounters;

namespace {

using Ids = nb::ndarray<const int32_t, nb::c_contig, nb::device::cpu>;
using Slots = nb::ndarray<int32_t, nb::c_contig, nb::device::cpu>;
using Scores = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;

std::span<const int32_t> span(const Ids& ids) { return {ids.data(), ids.size()}; }

// The pools are held for as long as the readers may write to them.
struct Store {
  std::vector<std::vector<mx::array>> pools;
  std::unique_ptr<ExpertStore> store;

  ExpertStore* operator->() const { return store.get(); }
};

// Memory for a pool, without a value. Aligned, so that direct reads can go there without a detour: what
// MLX allocates on a CPU is not.
mx::array new_pool(const std::vector<int>& sizes, mx::Dtype dtype) {
  constexpr size_t kAlignment = mlx_od_moe::ExpertReader::kAlignment;
  const mx::Shape shape(sizes.begin(), sizes.end());
  size_t items = 1;
  for (int n : sizes) items *= static_cast<size_t>(n);
  mx::array memory(mx::allocator::malloc(items * dtype.size() + kAlignment), shape, dtype);
  const auto address = reinterpret_cast<uintptr_t>(memory.data<char>());
  const size_t skipped = (kAlignment - address % kAlignment) % kAlignment / dtype.size();
  mx::array pool(shape, dtype, nullptr, {});
  pool.copy_shared_buffer(memory, memory.strides(), memory.flags(), items, static_cast<int64_t>(skipped));
  pool.set_status(mx::array::Status::available);
  return pool;
}

void make_store(Store* self, const std::shared_ptr<ExpertFile>& file, std::vector<int> slots,
                std::vector<std::vector<mx::array>> pools, const std::string& policy, int readers, bool direct_io,
                bool verify, std::optional<std::pair<double, double>> disk, uint64_t prefetch_bytes) {
  mlx_od_moe::StoreOptions options;
  options.slots = std::move(slots);
  options.policy = policy;
  options.readers = readers;
  options.prefetch_bytes = prefetch_bytes;
  options.reader.direct_io = direct_io;
  options.reader.verify = verify;
  if (disk) {
    const auto latency = std::chrono::duration<double>(disk->second);
    options.reader.disk = {disk->first, std::chrono::duration_cast<std::chrono::nanoseconds>(latency)};
  }
  mlx_od_moe::Pools lent;
  for (std::vector<mx::array>& layer : pools) {
    lent.emplace_back();
    for (mx::array& pool : layer) lent.back().push_back(reinterpret_cast<std::byte*>(pool.data<char>()));
  }
  auto store = std::make_unique<ExpertStore>(file, options, std::move(lent));
  new (self) Store{std::move(pools), std::move(store)};
}

ExpertLease acquire(const Store& self, int layer, const Ids& ids, Slots slots, std::optional<double> timeout) {
  if (slots.size() != ids.size()) throw std::invalid_argument("[ExpertStore] slots must be as many as ids");
  ExpertLease lease = self->request(layer, span(ids));
  bool arrived = lease.ready() && lease.wait();
  if (!arrived) wait_without_gil(timeout, [&](auto deadline) { return arrived = lease.wait(deadline); });
  if (!arrived) {
    PyErr_SetString(PyExc_TimeoutError, "[ExpertStore] the experts were not there in time");
    throw nb::python_error();
  }
  for (size_t i = 0; i < ids.size(); ++i) slots.data()[i] = lease.slot(ids.data()[i]);
  return lease;
}

int prefetch(const Store& self, int layer, const Ids& ids, const std::optional<Scores>& scores,
             std::optional<uint64_t> step) {
  std::span<const float> given;
  if (scores) given = {scores->data(), scores->size()};
  return self->prefetch(layer, span(ids), given, step ? *step : self->step());
}

nb::dict to_dict(const StoreCounters& counters) {
  nb::dict out;
  for (const mlx_od_moe::StoreCounter& counter : mlx_od_moe::kStoreCounters) {
    out[counter.name] = counters.*counter.value;
  }
  out["non_resident_recall"] = counters.non_resident_recall();
  return out;
}

nb::dict counters(const Store& self) {
  StoreCounters all;
  nb::dict layers;
  for (int layer : self->layers()) {
    const StoreCounters one = self->counters(layer);
    layers[nb::int_(layer)] = to_dict(one);
    all += one;
  }
  nb::dict out = to_dict(all);
  out["layers"] = layers;
  return out;
}

}  // namespace

void bind_expert_store(nb::module_& m) {
  // What the system reports becomes OSError, or its subclass for that error.
  nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
    try {
      std::rethrow_exception(thrown);
    } catch (const mlx_od_moe::ExpertReadError& error) {
      PyErr_SetObject(PyExc_OSError, nb::make_tuple(error.code().value(), error.what(), error.failure().file).ptr());
    } catch (const std::system_error& error) {
      PyErr_SetObject(PyExc_OSError, nb::make_tuple(error.code().value(), error.what()).ptr());
    }
  });

  m.def("new_pool", &new_pool, "shape"_a, "dtype"_a,
        nb::sig("def new_pool(shape: collections.abc.Sequence[int], dtype: mlx.core.Dtype) -> mlx.core.array"),
        "An evaluated array without a value.");
  m.def(
      "partition_slots",
      [](const ExpertFile& file, uint64_t capacity_bytes, int top_k) {
        return mlx_od_moe::partition_slots(file.layout(), capacity_bytes, top_k);
      },
      "file"_a, "capacity_bytes"_a, "top_k"_a, "Slots for each layer: equally many, as many as fit.");

  nb::class_<ExpertLease>(m, "ExpertLease", "See mlx_od_moe.expert_store.ExpertLease.")
      .def("release", &ExpertLease::release);

  nb::class_<Store>(m, "ExpertStore", "See mlx_od_moe.expert_store.ExpertStore.")
      .def("__init__", &make_store, "file"_a, "slots"_a, "pools"_a, "policy"_a, "readers"_a, "direct_io"_a, "verify"_a,
           "disk"_a.none(), "prefetch_bytes"_a,
           nb::sig("def __init__(self, file: ExpertFile, slots: collections.abc.Sequence[int], pools: "
                   "collections.abc.Sequence[collections.abc.Sequence[mlx.core.array]], policy: str, readers: int, "
                   "direct_io: bool, verify: bool, disk: tuple[float, float] | None, prefetch_bytes: int) -> None"))
      .def("acquire", &acquire, "layer"_a, "ids"_a, "slots"_a, "timeout"_a = nb::none(),
           nb::sig("def acquire(self, layer: int, ids: numpy.typing.NDArray[numpy.int32], slots: "
                   "numpy.typing.NDArray[numpy.int32], timeout: float | None = None) -> ExpertLease"))
      .def("prefetch", &prefetch, "layer"_a, "ids"_a, "scores"_a = nb::none(), "step"_a = nb::none(),
           nb::sig("def prefetch(self, layer: int, ids: numpy.typing.NDArray[numpy.int32], scores: "
                   "numpy.typing.NDArray[numpy.float32] | None = None, step: int | None = None) -> int"))
      .def(
          "cancel", [](const Store& s, uint64_t step) { s->cancel(step); }, "step"_a)
      .def_prop_ro("step", [](const Store& s) { return s->step(); })
      .def(
          "slots", [](const Store& s, int layer) { return s->slots(layer); }, "layer"_a)
      .def(
          "resident", [](const Store& s, int layer) { return s->resident(layer); }, "layer"_a)
      .def("counters", &counters, nb::sig("def counters(self) -> dict[str, typing.Any]"))
      .def("close",
           [](const Store& s) {
             nb::gil_scoped_release release;
             s->close();
           })
      .def_prop_ro("closed", [](const Store& s) { return s->closed(); });
}
