// The Python extension `_ext`: the only file that includes nanobind.
#include <mlx/mlx.h>
#include <nanobind/nanobind.h>

namespace nb = nanobind;
namespace mx = mlx::core;

NB_MODULE(_ext, m) {
  // Loads libmlx and registers mx.array before any function here names it (stubs need it too).
  nb::module_::import_("mlx.core");
  m.doc() = "Native parts of mlx-od-moe.";
  m.def("is_available", [](const mx::array& a) { return a.is_available(); }, nb::arg("array"),
        nb::sig("def is_available(array: mlx.core.array) -> bool"),
        "Whether an array's value is computed, without waiting for it.");
}
