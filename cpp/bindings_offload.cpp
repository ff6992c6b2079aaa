// What lends the store's slots to MLX: the native part of mlx_od_moe.switch.
#include <mlx/mlx.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <utility>
#include <vector>

#include "bindings.h"
#include "mlx_od_moe/expert_store.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using namespace nb::literals;
using mlx_od_moe::ExpertLease;

namespace {

// MLX keeps the memory of an operation's inputs until the operation has run, on a CPU thread or a GPU, or
// until its output goes without having been computed. So the end of that memory is the end of the lease.
// MLX never writes to memory that it does not own.
std::vector<mx::array> lend(ExpertLease& lease, const std::vector<mx::array>& pools) {
  const auto shared = std::make_shared<ExpertLease>(std::move(lease));
  std::vector<mx::array> lent;
  lent.reserve(pools.size());
  for (const mx::array& pool : pools) {
    // The pool itself is held too: it may be the last that holds its memory.
    mx::allocator::Data data(pool.buffer(), [shared, pool](mx::allocator::Buffer) {});
    lent.emplace_back(std::move(data), pool.shape(), pool.dtype());
  }
  return lent;
}

}  // namespace

void bind_offload(nb::module_& m) {
  m.def("lend", &lend, "lease"_a, "pools"_a,
        nb::sig("def lend(lease: ExpertLease, pools: collections.abc.Sequence[mlx.core.array]) -> "
                "list[mlx.core.array]"),
        R"(Arrays over the same memory as the pools, which take the lease over.

It ends when MLX has computed all that these arrays went into, or that will never be computed.)");
  m.def(
      "is_computed", [](const mx::array& array) { return array.is_available(); }, "array"_a,
      nb::sig("def is_computed(array: mlx.core.array) -> bool"), "Whether MLX has computed it; never waits.");
}
