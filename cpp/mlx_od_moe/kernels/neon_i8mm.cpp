// NEON with 2x8 by 8x2 int8 matrix products (ARMv8.6 i8mm), for batches; single tokens keep the dot product.
#include <arm_neon.h>

#include "mlx_od_moe/kernels/kernels.h"

namespace mlx_od_moe::kernels {
namespace {

#include "mlx_od_moe/kernels/tiles.inl"

// Two tokens' eight columns from c on.
inline int8x16_t load_pair(const Tokens& x, int t, int c) {
  return vcombine_s8(vld1_s8(reinterpret_cast<const int8_t*>(values_of(x, t)) + c),
                     vld1_s8(reinterpret_cast<const int8_t*>(values_of(x, t + 1)) + c));
}

// Rows 2r and 2r + 1 with eight columns each, from two quads of four rows.
inline int8x16_t row_pair(int8x16_t first, int8x16_t second, bool upper) {
  const int32x4_t a = vreinterpretq_s32_s8(first);
  const int32x4_t b = vreinterpretq_s32_s8(second);
  return vreinterpretq_s8_s32(upper ? vzip2q_s32(a, b) : vzip1q_s32(a, b));
}

// sums[r] of rows 2r, 2r + 1 and tokens t, t + 1: [row 0 token 0, row 0 token 1, row 1 ...].
inline void store_pairs(const float32x4_t sums[8], float* first, float* second) {
  for (int r = 0; r < 8; r += 2) {
    vst1q_f32(first + 2 * r, vuzp1q_f32(sums[r], sums[r + 1]));
    vst1q_f32(second + 2 * r, vuzp2q_f32(sums[r], sums[r + 1]));
  }
}

inline float32x4_t per_token(float first, float second) {
  const float both[4] = {first, second, first, second};
  return vld1q_f32(both);
}

inline float32x4_t per_row(float32x4_t four, bool upper) {
  return upper ? vzip2q_f32(four, four) : vzip1q_f32(four, four);
}

// T is 2 or 4; a last single token goes to `Single`.
struct Int8 {
  static constexpr int kPanels = 1, kTokens = 4;
  template <int P, int T>
  static void tile(const Panels& w, int p, const Tokens& x, int t, float* out, size_t out_stride) {
    constexpr int kPairs = T / 2;
    const unsigned char* panel = panel_of(w, p);
    float32x4_t sum[kPairs][8];
    for (int j = 0; j < kPairs; ++j)
      for (int r = 0; r < 8; ++r) sum[j][r] = vdupq_n_f32(0);
    for (int begin = 0, block = 0; begin < w.columns; begin += kInt8Block, ++block) {
      const int end = begin + kInt8Block < w.columns ? begin + kInt8Block : w.columns;
      int32x4_t dot[kPairs][8];
      for (int j = 0; j < kPairs; ++j)
        for (int r = 0; r < 8; ++r) dot[j][r] = vdupq_n_s32(0);
      for (int c = begin; c < end; c += 8) {
        const int8_t* from = reinterpret_cast<const int8_t*>(panel + c * kPanelRows);
        for (int r = 0; r < 4; ++r) {
          const int8x16_t first = vld1q_s8(from + r * 16);
          const int8x16_t second = vld1q_s8(from + r * 16 + 64);
          for (int j = 0; j < kPairs; ++j) {
            const int8x16_t a = load_pair(x, t + 2 * j, c);
            dot[j][2 * r] = vmmlaq_s32(dot[j][2 * r], row_pair(first, second, false), a);
            dot[j][2 * r + 1] = vmmlaq_s32(dot[j][2 * r + 1], row_pair(first, second, true), a);
          }
        }
      }
      for (int j = 0; j < kPairs; ++j) {
        const float32x4_t scale =
            per_token(x.scales[group_of(x, t + 2 * j, block)], x.scales[group_of(x, t + 2 * j + 1, block)]);
        for (int r = 0; r < 8; ++r) sum[j][r] = vfmaq_f32(sum[j][r], vcvtq_f32_s32(dot[j][r]), scale);
      }
    }
    const float* scales = reinterpret_cast<const float*>(panel + w.columns * kPanelRows);
    for (int j = 0; j < kPairs; ++j) {
      for (int r = 0; r < 8; ++r) {
        sum[j][r] = vmulq_f32(sum[j][r], per_row(vld1q_f32(scales + r / 2 * 4), r % 2 != 0));
      }
      float* to = out + static_cast<size_t>(t + 2 * j) * out_stride + p * kPanelRows;
      store_pairs(sum[j], to, to + out_stride);
    }
  }
};

inline float32x4_t load_halves(const unsigned char* from) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(from))));
}

struct Int4 {
  static constexpr int kPanels = 1, kTokens = 4;
  template <int P, int T>
  static void tile(const Panels& w, int p, const Tokens& x, int t, float* out, size_t out_stride) {
    constexpr int kPairs = T / 2;
    const uint8x16_t mask = vdupq_n_u8(15);
    const unsigned char* from = panel_of(w, p);
    float32x4_t sum[kPairs][8];
    for (int j = 0; j < kPairs; ++j)
      for (int r = 0; r < 8; ++r) sum[j][r] = vdupq_n_f32(0);
    for (int begin = 0, g = 0; begin < w.columns; begin += w.group, ++g) {
      int32x4_t dot[kPairs][8];
      for (int j = 0; j < kPairs; ++j)
        for (int r = 0; r < 8; ++r) dot[j][r] = vdupq_n_s32(0);
      for (int c = begin; c < begin + w.group; c += 8, from += 64) {
        for (int r = 0; r < 4; ++r) {
          const uint8x16_t raw = vld1q_u8(from + r * 16);
          const int8x16_t first = vreinterpretq_s8_u8(vandq_u8(raw, mask));
          const int8x16_t second = vreinterpretq_s8_u8(vshrq_n_u8(raw, 4));
          for (int j = 0; j < kPairs; ++j) {
            const int8x16_t a = load_pair(x, t + 2 * j, c);
            dot[j][2 * r] = vmmlaq_s32(dot[j][2 * r], row_pair(first, second, false), a);
            dot[j][2 * r + 1] = vmmlaq_s32(dot[j][2 * r + 1], row_pair(first, second, true), a);
          }
        }
      }
      for (int j = 0; j < kPairs; ++j) {
        const size_t a = group_of(x, t + 2 * j, g);
        const size_t b = group_of(x, t + 2 * j + 1, g);
        const float32x4_t token_scale = per_token(x.scales[a], x.scales[b]);
        const float32x4_t token_sum = per_token(x.sums[a], x.sums[b]);
        for (int r = 0; r < 8; ++r) {
          const float32x4_t scale = per_row(load_halves(from + r / 2 * 8), r % 2 != 0);
          const float32x4_t bias = per_row(load_halves(from + 32 + r / 2 * 8), r % 2 != 0);
          sum[j][r] = vfmaq_f32(sum[j][r], vcvtq_f32_s32(dot[j][r]), vmulq_f32(scale, token_scale));
          sum[j][r] = vfmaq_f32(sum[j][r], bias, token_sum);
        }
      }
      from += 64;
    }
    for (int j = 0; j < kPairs; ++j) {
      float* to = out + static_cast<size_t>(t + 2 * j) * out_stride + p * kPanelRows;
      store_pairs(sum[j], to, to + out_stride);
    }
  }
};

// Pairs of tokens here, a last odd one by the dot product.
template <class K>
void multiply_pairs(const Panels& w, const Tokens& x, float* out, size_t out_stride, Multiply single) {
  for (int p = 0; p < w.count && x.count > 1; ++p) {
    int t = 0;
    for (; t + 4 <= x.count; t += 4) K::template tile<1, 4>(w, p, x, t, out, out_stride);
    for (; t + 2 <= x.count; t += 2) K::template tile<1, 2>(w, p, x, t, out, out_stride);
  }
  if (x.count % 2 == 0) return;
  const int last = x.count - 1;
  const size_t groups = group_of(x, last, 0);
  const Tokens one = {values_of(x, last), x.stride, x.scales + groups, x.sums + groups, x.offsets + groups,
                      x.groups,           1};
  single(w, one, out + static_cast<size_t>(last) * out_stride, out_stride);
}

void multiply_int8(const Panels& w, const Tokens& x, float* out, size_t out_stride) {
  multiply_pairs<Int8>(w, x, out, out_stride, kNeonDotInt8);
}

void multiply_int4(const Panels& w, const Tokens& x, float* out, size_t out_stride) {
  multiply_pairs<Int4>(w, x, out, out_stride, kNeonDotInt4);
}

}  // namespace

const Multiply kNeonI8mmInt8 = multiply_int8;
const Multiply kNeonI8mmInt4 = multiply_int4;

}  // namespace mlx_od_moe::kernels
