// AVX-512 with VNNI: one vector holds a panel's 16 rows.
#include <immintrin.h>
#include <string.h>

#include "mlx_od_moe/kernels/kernels.h"

namespace mlx_od_moe::kernels {
namespace {

#define MLX_OD_MOE_COLLECT
#define MLX_OD_MOE_QUANTIZE
inline int collect(const float* scores, int n, float bound, int32_t* out) {
  const __m512 limit = _mm512_set1_ps(bound);
  const __m512i step = _mm512_set1_epi32(16);
  __m512i ids = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int count = 0;
  for (int i = 0; i < n; i += 16, ids = _mm512_add_epi32(ids, step)) {
    const __mmask16 within = static_cast<__mmask16>(n - i < 16 ? (1u << (n - i)) - 1 : 0xffffu);
    const __mmask16 hits =
        _mm512_mask_cmp_ps_mask(within, _mm512_maskz_loadu_ps(within, scores + i), limit, _CMP_GE_OQ);
    if (hits == 0) continue;
    _mm512_mask_compressstoreu_epi32(out + count, hits, ids);
    count += __builtin_popcount(hits);
  }
  return count;
}

#include "mlx_od_moe/kernels/row_ops.inl"
#include "mlx_od_moe/kernels/tiles.inl"
#include "mlx_od_moe/kernels/top_k.inl"

#include "mlx_od_moe/kernels/attention.inl"

inline float quantize_block(const float* x, int n, int8_t* out, int32_t* sum) {
  __m512 lanes = _mm512_setzero_ps();
  for (int i = 0; i < n; i += 16) lanes = _mm512_max_ps(lanes, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
  const float largest = _mm512_reduce_max_ps(lanes);
  const __m512 factor = _mm512_set1_ps(largest > kTiny ? 127.0f / largest : 0.0f);
  const __m512 low = _mm512_set1_ps(-127.0f);
  const __m512 high = _mm512_set1_ps(127.0f);
  __m512i total = _mm512_setzero_si512();
  for (int i = 0; i < n; i += 16) {
    // The bounds matter for infinite x only, where the product is NaN.
    const __m512 scaled = _mm512_max_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), factor), low);
    const __m512i q = _mm512_cvtps_epi32(_mm512_min_ps(scaled, high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm512_cvtepi32_epi8(q));
    total = _mm512_add_epi32(total, q);
  }
  *sum = _mm512_reduce_add_epi32(total);
  return largest * (1.0f / 127.0f);
}

inline int32_t load_quad(const int8_t* a) {
  int32_t quad;
  memcpy(&quad, a, sizeof(quad));
  return quad;
}

struct F32 {
  static constexpr int kPanels = 4, kTokens = 4;
  template <int P, int T>
  static void tile(const Panels& w, int p, const Tokens& x, int t, float* out, size_t out_stride) {
    constexpr int kUnroll = P * T < 16 ? 2 : 1;  // enough chains to hide the latency of fma
    const float* weights[P];
    const float* a[T];
    __m512 sum[kUnroll][P][T];
    for (int i = 0; i < P; ++i) weights[i] = reinterpret_cast<const float*>(panel_of(w, p + i));
    for (int j = 0; j < T; ++j) a[j] = reinterpret_cast<const float*>(values_of(x, t + j));
    for (int u = 0; u < kUnroll; ++u)
      for (int i = 0; i < P; ++i)
        for (int j = 0; j < T; ++j) sum[u][i][j] = _mm512_setzero_ps();
    for (int c = 0; c < w.columns; c += kUnroll) {
#pragma GCC unroll 2
      for (int u = 0; u < kUnroll; ++u) {
        __m512 v[P];
#pragma GCC unroll 4
        for (int i = 0; i < P; ++i) v[i] = _mm512_load_ps(weights[i] + (c + u) * kPanelRows);
#pragma GCC unroll 4
        for (int j = 0; j < T; ++j) {
          const __m512 value = _mm512_set1_ps(a[j][c + u]);
#pragma GCC unroll 4
          for (int i = 0; i < P; ++i) sum[u][i][j] = _mm512_fmadd_ps(v[i], value, sum[u][i][j]);
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

// Weights are packed with 128 added, since vpdpbusd multiplies unsigned by signed bytes; the
// accumulators start at minus 128 times the activations' sum.
struct Int8 {
  static constexpr int kPanels = 4, kTokens = 4;
  template <int P, int T>
  static void tile(const Panels& w, int p, const Tokens& x, int t, float* out, size_t out_stride) {
    constexpr int kUnroll = P * T < 16 ? 2 : 1;
    const unsigned char* weights[P];
    const int8_t* a[T];
    __m512 sum[P][T];
    for (int i = 0; i < P; ++i) weights[i] = panel_of(w, p + i);
    for (int j = 0; j < T; ++j) a[j] = reinterpret_cast<const int8_t*>(values_of(x, t + j));
    for (int i = 0; i < P; ++i)
      for (int j = 0; j < T; ++j) sum[i][j] = _mm512_setzero_ps();
    for (int begin = 0, block = 0; begin < w.columns; begin += kInt8Block, ++block) {
      const int end = begin + kInt8Block < w.columns ? begin + kInt8Block : w.columns;
      __m512i dot[kUnroll][P][T];
      for (int j = 0; j < T; ++j) {
        const __m512i offset = _mm512_set1_epi32(x.offsets[group_of(x, t + j, block)]);
        for (int i = 0; i < P; ++i) {
          dot[0][i][j] = offset;
          if constexpr (kUnroll == 2) dot[1][i][j] = _mm512_setzero_si512();
        }
      }
      for (int c = begin; c < end; c += 4 * kUnroll) {
#pragma GCC unroll 2
        for (int u = 0; u < kUnroll; ++u) {
          __m512i v[P];
#pragma GCC unroll 4
          for (int i = 0; i < P; ++i) v[i] = _mm512_load_si512(weights[i] + (c + 4 * u) * kPanelRows);
#pragma GCC unroll 4
          for (int j = 0; j < T; ++j) {
            const __m512i quad = _mm512_set1_epi32(load_quad(a[j] + c + 4 * u));
#pragma GCC unroll 4
            for (int i = 0; i < P; ++i) dot[u][i][j] = _mm512_dpbusd_epi32(dot[u][i][j], v[i], quad);
          }
        }
      }
      for (int j = 0; j < T; ++j) {
        const __m512 scale = _mm512_set1_ps(x.scales[group_of(x, t + j, block)]);
        for (int i = 0; i < P; ++i) {
          __m512i total = dot[0][i][j];
          if constexpr (kUnroll == 2) total = _mm512_add_epi32(total, dot[1][i][j]);
          sum[i][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), scale, sum[i][j]);
        }
      }
    }
    for (int i = 0; i < P; ++i) {
      const __m512 scale = _mm512_load_ps(weights[i] + w.columns * kPanelRows);
      for (int j = 0; j < T; ++j) {
        _mm512_storeu_ps(out + static_cast<size_t>(t + j) * out_stride + (p + i) * kPanelRows,
                         _mm512_mul_ps(sum[i][j], scale));
      }
    }
  }
};

struct Int4 {
  static constexpr int kPanels = 4, kTokens = 4;
  template <int P, int T>
  static void tile(const Panels& w, int p, const Tokens& x, int t, float* out, size_t out_stride) {
    if constexpr (P == 4 && T > 1) {  // more accumulators than registers
      tile<2, T>(w, p, x, t, out, out_stride);
      tile<2, T>(w, p + 2, x, t, out, out_stride);
    } else {
      const unsigned char* from[P];
      const int8_t* a[T];
      __m512 sum[P][T];
      for (int i = 0; i < P; ++i) from[i] = panel_of(w, p + i);
      for (int j = 0; j < T; ++j) a[j] = reinterpret_cast<const int8_t*>(values_of(x, t + j));
      for (int i = 0; i < P; ++i)
        for (int j = 0; j < T; ++j) sum[i][j] = _mm512_setzero_ps();
      const __m512i low_mask = _mm512_set1_epi8(0x0f);
      const __m512i high_mask = _mm512_set1_epi8(static_cast<char>(0xf0));
      const size_t group_bytes = static_cast<size_t>(w.group) * kPanelRows / 2 + 64;
      for (int begin = 0, g = 0; begin < w.columns; begin += w.group, ++g) {
        __m512i low[P][T];
        __m512i high[P][T];  // 16 times the dot product: the upper halves are not shifted down
        for (int i = 0; i < P; ++i)
          for (int j = 0; j < T; ++j) low[i][j] = high[i][j] = _mm512_setzero_si512();
        for (int c = 0; c < w.group; c += 8) {
          __m512i low_weights[P];
          __m512i high_weights[P];
#pragma GCC unroll 4
          for (int i = 0; i < P; ++i) {
            const __m512i raw = _mm512_load_si512(from[i] + c * 8);
            low_weights[i] = _mm512_and_si512(raw, low_mask);
            high_weights[i] = _mm512_and_si512(raw, high_mask);
          }
#pragma GCC unroll 4
          for (int j = 0; j < T; ++j) {
            const __m512i low_quad = _mm512_set1_epi32(load_quad(a[j] + begin + c));
            const __m512i high_quad = _mm512_set1_epi32(load_quad(a[j] + begin + c + 4));
#pragma GCC unroll 4
            for (int i = 0; i < P; ++i) {
              low[i][j] = _mm512_dpbusd_epi32(low[i][j], low_weights[i], low_quad);
              high[i][j] = _mm512_dpbusd_epi32(high[i][j], high_weights[i], high_quad);
            }
          }
        }
        for (int i = 0; i < P; ++i) {
          const __m512i* tail = reinterpret_cast<const __m512i*>(from[i] + group_bytes - 64);
          const __m512i packed = _mm512_load_si512(tail);
          const __m512 scale = _mm512_cvtph_ps(_mm512_castsi512_si256(packed));
          const __m512 bias = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(packed, 1));
          for (int j = 0; j < T; ++j) {
            const __m512i total = _mm512_add_epi32(low[i][j], _mm512_srai_epi32(high[i][j], 4));
            const __m512 scaled = _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[group_of(x, t + j, g)]));
            sum[i][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), scaled, sum[i][j]);
            sum[i][j] = _mm512_fmadd_ps(bias, _mm512_set1_ps(x.sums[group_of(x, t + j, g)]), sum[i][j]);
          }
          from[i] += group_bytes;
        }
      }
      for (int i = 0; i < P; ++i)
        for (int j = 0; j < T; ++j)
          _mm512_storeu_ps(out + static_cast<size_t>(t + j) * out_stride + (p + i) * kPanelRows, sum[i][j]);
    }
  }
};

}  // namespace

// Single tokens in f16 and bf16 come from the AVX2 file (512-bit conversions are slower than 256-bit
// ones), batches of floats from avx512_floats.cpp: see select.cpp.
const KernelSet kAvx512 = {
    "avx512",
    {multiply<F32>, nullptr, nullptr, multiply<Int8>, multiply<Int4>},
    {prepare_float, prepare_float, prepare_float, prepare_int8, prepare_int4},
    {4, 4, 4, 1, 1},
    128,
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

}  // namespace mlx_od_moe::kernels
