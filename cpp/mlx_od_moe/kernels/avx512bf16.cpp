// AVX512-BF16: products of bfloat16 pairs, summed in float32.
#include <immintrin.h>
#include <string.h>

#include "mlx_od_moe/kernels/kernels.h"

namespace mlx_od_moe::kernels {
namespace {

#include "mlx_od_moe/kernels/tiles.inl"

inline __m512bh load_weights(const unsigned char* from) {
  const __m512i raw = _mm512_load_si512(from);
  __m512bh pairs;
  memcpy(&pairs, &raw, sizeof(pairs));
  return pairs;
}

inline __m512bh broadcast_pair(const unsigned char* a) {
  int32_t pair;
  memcpy(&pair, a, sizeof(pair));
  const __m512i raw = _mm512_set1_epi32(pair);
  __m512bh pairs;
  memcpy(&pairs, &raw, sizeof(pairs));
  return pairs;
}

struct Bf16 {
  static constexpr int kPanels = 4, kTokens = 4;
  template <int P, int T>
  static void tile(const Panels& w, int p, const Tokens& x, int t, float* out, size_t out_stride) {
    constexpr int kUnroll = P * T < 16 ? 2 : 1;
    const unsigned char* weights[P];
    const unsigned char* a[T];
    __m512 sum[kUnroll][P][T];
    for (int i = 0; i < P; ++i) weights[i] = panel_of(w, p + i);
    for (int j = 0; j < T; ++j) a[j] = values_of(x, t + j);
    for (int u = 0; u < kUnroll; ++u)
      for (int i = 0; i < P; ++i)
        for (int j = 0; j < T; ++j) sum[u][i][j] = _mm512_setzero_ps();
    for (int c = 0; c < w.columns; c += 2 * kUnroll) {
#pragma GCC unroll 2
      for (int u = 0; u < kUnroll; ++u) {
        __m512bh v[P];
#pragma GCC unroll 4
        for (int i = 0; i < P; ++i) v[i] = load_weights(weights[i] + (c + 2 * u) * kPanelRows * 2);
#pragma GCC unroll 4
        for (int j = 0; j < T; ++j) {
          const __m512bh pair = broadcast_pair(a[j] + (c + 2 * u) * 2);
#pragma GCC unroll 4
          for (int i = 0; i < P; ++i) sum[u][i][j] = _mm512_dpbf16_ps(sum[u][i][j], v[i], pair);
        }
      }
    }
    for (int i = 0; i < P; ++i) {
      for (int j = 0; j < T; ++j) {
        __m512 total = sum[0][i][j];
        if constexpr (kUnroll == 2) total = _mm512_add_ps(total, sum[1][i][j]);
        _mm512_storeu_ps(out + static_cast<size_t>(t + j) * out_stride + (p + i) * kPanelRows, total);
      }
    }
  }
};

void prepare_pairs(const float* x, int columns, int, unsigned char* values, float*, float*, int32_t*) {
  for (int c = 0; c < columns; c += 16) {
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + c));
    memcpy(values + c * 2, &rounded, sizeof(rounded));
  }
}

}  // namespace

const Multiply kAvx512Bf16Multiply = multiply<Bf16>;
const Prepare kAvx512Bf16Prepare = prepare_pairs;

}  // namespace mlx_od_moe::kernels
