// Types of numbers that kernels read.
#pragma once

namespace mlx_od_moe::kernels {

enum Type { kFloat32, kFloat16, kBfloat16 };

}  // namespace mlx_od_moe::kernels
