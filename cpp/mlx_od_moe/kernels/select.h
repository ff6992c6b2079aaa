// Which instruction set's kernels this process uses.
#pragma once

#include <string>
#include <vector>

#include "mlx_od_moe/export.h"

#include "mlx_od_moe/kernels/kernels.h"

namespace mlx_od_moe::kernels {

// The fastest set that this CPU runs, or the one named by the environment variable
// MLX_OD_MOE_KERNEL. Throws std::invalid_argument where that one is unknown or can't run here.
MLX_OD_MOE_API const KernelSet& select_kernels();

// Names of the sets that this CPU runs, best first; the last is always "scalar".
std::vector<std::string> available_kernels();

}  // namespace mlx_od_moe::kernels
