// NEON with the int8 dot product (ARMv8.2 dotprod: all Apple chips, and servers since 2018).
#include <arm_neon.h>

#include "mlx_od_moe/kernels/kernels.h"

namespace mlx_od_moe::kernels {
namespace {

#include "mlx_od_moe/kernels/tiles.inl"

#include "mlx_od_moe/kernels/neon_bytes.inl"

struct LaneDot {
  template <int Lane>
  static int32x4_t add(int32x4_t sum, int8x16_t rows, int8x16_t quads) {
    return vdotq_laneq_s32(sum, rows, quads, Lane);
  }
};

}  // namespace

const Multiply kNeonDotInt8 = multiply<Int8<LaneDot>>;
const Multiply kNeonDotInt4 = multiply<Int4<LaneDot>>;

}  // namespace mlx_od_moe::kernels
