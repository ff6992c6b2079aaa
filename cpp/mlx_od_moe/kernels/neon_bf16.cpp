// NEON with bfloat16 dot products (ARMv8.6 bf16).
#include <arm_neon.h>

#include "mlx_od_moe/kernels/kernels.h"

namespace mlx_od_moe::kernels {
namespace {

#include "mlx_od_moe/kernels/tiles.inl"

inline bfloat16x8_t load(const unsigned char* from) { return vreinterpretq_bf16_u8(vld1q_u8(from)); }

struct Bf16 {
  static constexpr int kPanels = 4, kTokens = 4;
  template <int P, int T>
  static void tile(const Panels& w, int p, const Tokens& x, int t, float* out, size_t out_stride) {
    if constexpr (P > 1 && T > 1) {  // more accumulators than registers
      tile<P / 2, T>(w, p, x, t, out, out_stride);
      tile<P / 2, T>(w, p + P / 2, x, t, out, out_stride);
    } else {
      float32x4_t sum[P][T][4];
      for (int i = 0; i < P; ++i)
        for (int j = 0; j < T; ++j)
          for (int r = 0; r < 4; ++r) sum[i][j][r] = vdupq_n_f32(0);
      for (int c = 0; c < w.columns; c += 8) {
        bfloat16x8_t a[T];
        for (int j = 0; j < T; ++j) a[j] = load(values_of(x, t + j) + c * 2);
        for (int i = 0; i < P; ++i) {
          const unsigned char* from = panel_of(w, p + i) + c * kPanelRows * 2;
          for (int r = 0; r < 4; ++r) {
            for (int j = 0; j < T; ++j) {
              float32x4_t s = sum[i][j][r];
              s = vbfdotq_laneq_f32(s, load(from + r * 16), a[j], 0);
              s = vbfdotq_laneq_f32(s, load(from + r * 16 + 64), a[j], 1);
              s = vbfdotq_laneq_f32(s, load(from + r * 16 + 128), a[j], 2);
              sum[i][j][r] = vbfdotq_laneq_f32(s, load(from + r * 16 + 192), a[j], 3);
            }
          }
        }
      }
      for (int i = 0; i < P; ++i)
        for (int j = 0; j < T; ++j)
          for (int r = 0; r < 4; ++r)
            vst1q_f32(out + static_cast<size_t>(t + j) * out_stride + (p + i) * kPanelRows + r * 4, sum[i][j][r]);
    }
  }
};

}  // namespace

const Multiply kNeonBf16Multiply = multiply<Bf16>;

}  // namespace mlx_od_moe::kernels
