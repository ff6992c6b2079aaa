// NEON as every AArch64 CPU has it: four vectors hold a panel's 16 rows.
#include <arm_neon.h>
#include <string.h>

#include "mlx_od_moe/kernels/kernels.h"

namespace mlx_od_moe::kernels {
namespace {

#define MLX_OD_MOE_NEON
#define MLX_OD_MOE_COLLECT
#define MLX_OD_MOE_QUANTIZE
inline int collect(const float* scores, int n, float bound, int32_t* out) {
  const float32x4_t limit = vdupq_n_f32(bound);
  int count = 0;
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    uint32x4_t hits = vcgeq_f32(vld1q_f32(scores + i), limit);
    for (int j = 4; j < 16; j += 4) hits = vorrq_u32(hits, vcgeq_f32(vld1q_f32(scores + i + j), limit));
    if (vmaxvq_u32(hits) == 0) continue;
    for (int j = i; j < i + 16; ++j) {
      if (scores[j] >= bound) out[count++] = j;
    }
  }
  for (; i < n; ++i) {
    if (scores[i] >= bound) out[count++] = i;
  }
  return count;
}

#include "mlx_od_moe/kernels/row_ops.inl"
#include "mlx_od_moe/kernels/tiles.inl"
#include "mlx_od_moe/kernels/top_k.inl"

#include "mlx_od_moe/kernels/attention.inl"

#include "mlx_od_moe/kernels/neon_bytes.inl"

inline float quantize_block(const float* x, int n, int8_t* out, int32_t* sum) {
  float32x4_t lanes = vdupq_n_f32(0);
  for (int i = 0; i < n; i += 4) lanes = vmaxq_f32(lanes, vabsq_f32(vld1q_f32(x + i)));
  const float largest = vmaxvq_f32(lanes);
  const float factor = largest > kTiny ? 127.0f / largest : 0.0f;
  int32x4_t total = vdupq_n_s32(0);
  for (int i = 0; i < n; i += 16) {
    int32x4_t q[4];
    for (int j = 0; j < 4; ++j) {  // conversion makes 0 of NaN, so infinite x need no bounds
      q[j] = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i + 4 * j), factor));
      total = vaddq_s32(total, q[j]);
    }
    const int16x8_t low = vcombine_s16(vqmovn_s32(q[0]), vqmovn_s32(q[1]));
    const int16x8_t high = vcombine_s16(vqmovn_s32(q[2]), vqmovn_s32(q[3]));
    vst1q_s8(out + i, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
  }
  *sum = vaddvq_s32(total);
  return largest * (1.0f / 127.0f);
}

struct F32 {
  static constexpr int kStep = 1, kBytes = 64;  // columns and bytes of one step through a panel
  static void load(const unsigned char* from, float32x4_t v[1][4]) {
    for (int r = 0; r < 4; ++r) v[0][r] = vld1q_f32(reinterpret_cast<const float*>(from) + 4 * r);
  }
};

struct F16 {
  static constexpr int kStep = 1, kBytes = 32;
  static void load(const unsigned char* from, float32x4_t v[1][4]) {
    for (int r = 0; r < 4; ++r) v[0][r] = load_halves(from + 8 * r);
  }
};

struct Bf16 {
  static constexpr int kStep = 2, kBytes = 64;
  static void load(const unsigned char* from, float32x4_t v[2][4]) {
    for (int r = 0; r < 4; ++r) {
      const uint32x4_t pairs = vreinterpretq_u32_u8(vld1q_u8(from + 16 * r));
      v[0][r] = vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16));
      v[1][r] = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000u)));
    }
  }
};

// Products with float32 activations; Weights says how a step of the panel becomes float32.
template <class Weights>
struct Floats {
  static constexpr int kPanels = 4, kTokens = 4;
  template <int P, int T>
  static void tile(const Panels& w, int p, const Tokens& x, int t, float* out, size_t out_stride) {
    if constexpr (P > 1 && T > 1) {  // more accumulators than registers
      tile<P / 2, T>(w, p, x, t, out, out_stride);
      tile<P / 2, T>(w, p + P / 2, x, t, out, out_stride);
    } else {
      constexpr int kStep = Weights::kStep;
      const unsigned char* from[P];
      const float* a[T];
      float32x4_t sum[P][T][4];
      for (int i = 0; i < P; ++i) from[i] = panel_of(w, p + i);
      for (int j = 0; j < T; ++j) a[j] = reinterpret_cast<const float*>(values_of(x, t + j));
      for (int i = 0; i < P; ++i)
        for (int j = 0; j < T; ++j)
          for (int r = 0; r < 4; ++r) sum[i][j][r] = vdupq_n_f32(0);
      for (int c = 0; c < w.columns; c += kStep) {
        for (int i = 0; i < P; ++i) {
          float32x4_t v[kStep][4];
          Weights::load(from[i], v);
          from[i] += Weights::kBytes;
          for (int s = 0; s < kStep; ++s)
            for (int j = 0; j < T; ++j)
              for (int r = 0; r < 4; ++r) sum[i][j][r] = vfmaq_n_f32(sum[i][j][r], v[s][r], a[j][c + s]);
        }
      }
      for (int i = 0; i < P; ++i)
        for (int j = 0; j < T; ++j)
          for (int r = 0; r < 4; ++r)
            vst1q_f32(out + static_cast<size_t>(t + j) * out_stride + (p + i) * kPanelRows + r * 4, sum[i][j][r]);
    }
  }
};

// Without the dot product instruction: 16-bit products, of which two fit into 16 bits.
struct PlainDot {
  template <int Lane>
  static int32x4_t add(int32x4_t sum, int8x16_t rows, int8x16_t quads) {
    const int8x16_t quad = vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(quads), Lane));
    const int16x8_t low = vmull_s8(vget_low_s8(rows), vget_low_s8(quad));
    const int16x8_t high = vmull_high_s8(rows, quad);
    return vpadalq_s16(sum, vpaddq_s16(low, high));
  }
};

}  // namespace

const KernelSet kNeon = {
    "neon",
    {multiply<Floats<F32>>, multiply<Floats<F16>>, multiply<Floats<Bf16>>, multiply<Int8<PlainDot>>,
     multiply<Int4<PlainDot>>},
    {prepare_float, prepare_float, prepare_float, prepare_int8, prepare_int4},
    {4, 4, 4, 1, 1},
    0,
    to_float,
    scale_row,
    add_row,
    layer_norm,
    silu,
    relu,
    sigmoid,
    top_k,
    softmax,
    adam,
    attend,
    attend_gradient,
    nullptr,
    nullptr,
};

const Prepare kNeonBf16Prepare = prepare_bfloat;

}  // namespace mlx_od_moe::kernels
