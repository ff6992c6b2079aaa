// The type that a state has in C++.
#pragma once

#include <mlx/mlx.h>

#include <optional>

#include "mlx_od_moe/weights.h"

// None: it is no hidden state.
inline std::optional<mlx_od_moe::DType> float_type(const mlx::core::array& a) {
  if (a.dtype() == mlx::core::float32) return mlx_od_moe::DType::float32;
  if (a.dtype() == mlx::core::float16) return mlx_od_moe::DType::float16;
  if (a.dtype() == mlx::core::bfloat16) return mlx_od_moe::DType::bfloat16;
  return std::nullopt;
}
