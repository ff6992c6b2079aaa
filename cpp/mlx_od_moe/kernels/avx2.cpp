// AVX2 with FMA and F16C: two vectors hold a panel's 16 rows. 16 registers, so small tiles.
#include <immintrin.h>
#include <string.h>

#include "mlx_od_moe/kernels/kernels.h"

namespace mlx_od_moe::kernels {
namespace {

#define MLX_OD_MOE_COLLECT
#define MLX_OD_MOE_QUANTIZE
inline int collect(const float* scores, int n, float bound, int32_t* out) {
  const __m256 limit = _mm256_set1_ps(bound);
  int count = 0;
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    int hits = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(scores + i), limit, _CMP_GE_OQ));
    for (; hits != 0; hits &= hits - 1) out[count++] = i + __builtin_ctz(static_cast<unsigned>(hits));
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

inline float quantize_block(const float* x, int n, int8_t* out, int32_t* sum) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 lanes = _mm256_setzero_ps();
  for (int i = 0; i < n; i += 8) lanes = _mm256_max_ps(lanes, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i)));
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  const float largest = _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
  const __m256 factor = _mm256_set1_ps(largest > kTiny ? 127.0f / largest : 0.0f);
  // vpack* work within 128-bit halves: this puts their groups of four bytes back in order.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256 low = _mm256_set1_ps(-127.0f);
  const __m256 high = _mm256_set1_ps(127.0f);
  __m256i total = _mm256_setzero_si256();
  for (int i = 0; i < n; i += 32) {
    __m256i q[4];
    for (int j = 0; j < 4; ++j) {
      // The bounds matter for infinite x only, where the product is NaN.
      const __m256 scaled = _mm256_max_ps(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * j), factor), low);
      q[j] = _mm256_cvtps_epi32(_mm256_min_ps(scaled, high));
      total = _mm256_add_epi32(total, q[j]);
    }
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_permutevar8x32_epi32(bytes, order));
  }
  __m128i pair = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
  pair = _mm_add_epi32(pair, _mm_shuffle_epi32(pair, 0x4e));
  *sum = _mm_cvtsi128_si32(_mm_add_epi32(pair, _mm_shuffle_epi32(pair, 0xb1)));
  return largest * (1.0f / 127.0f);
}

inline int32_t load_quad(const int8_t* a) {
  int32_t quad;
  memcpy(&quad, a, sizeof(quad));
  return quad;
}

inline __m256i load_bytes(const unsigned char* from) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
}

struct F32 {
  static constexpr int kStep = 1, kBytes = 64;  // columns and bytes of one step through a panel
  static void load(const unsigned char* from, __m256 v[1][2]) {
    v[0][0] = _mm256_load_ps(reinterpret_cast<const float*>(from));
    v[0][1] = _mm256_load_ps(reinterpret_cast<const float*>(from) + 8);
  }
};

struct F16 {
  static constexpr int kStep = 1, kBytes = 32;
  static void load(const unsigned char* from, __m256 v[1][2]) {
    v[0][0] = _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(from)));
    v[0][1] = _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(from) + 1));
  }
};

struct Bf16 {
  static constexpr int kStep = 2, kBytes = 64;
  static void load(const unsigned char* from, __m256 v[2][2]) {
    const __m256i odd_mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    for (int half = 0; half < 2; ++half) {
      const __m256i pairs = load_bytes(from + 32 * half);
      v[0][half] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
      v[1][half] = _mm256_castsi256_ps(_mm256_and_si256(pairs, odd_mask));
    }
  }
};

// Products with float32 activations; Weights says how a step of the panel becomes float32.
template <class Weights>
struct Floats {
  static constexpr int kPanels = 2, kTokens = 4;
  template <int P, int T>
  static void tile(const Panels& w, int p, const Tokens& x, int t, float* out, size_t out_stride) {
    if constexpr (P == 2 && T > 1) {  // more accumulators than registers
      tile<1, T>(w, p, x, t, out, out_stride);
      tile<1, T>(w, p + 1, x, t, out, out_stride);
    } else {
      constexpr int kStep = Weights::kStep;
      constexpr int kUnroll = P * T * 2 * kStep < 8 ? 2 : 1;
      constexpr int kChains = P * T * 2 < 8 ? kUnroll * kStep : 1;
      const unsigned char* from[P];
      const float* a[T];
      __m256 sum[kChains][P][T][2];
      for (int i = 0; i < P; ++i) from[i] = panel_of(w, p + i);
      for (int j = 0; j < T; ++j) a[j] = reinterpret_cast<const float*>(values_of(x, t + j));
      for (int u = 0; u < kChains; ++u)
        for (int i = 0; i < P; ++i)
          for (int j = 0; j < T; ++j) sum[u][i][j][0] = sum[u][i][j][1] = _mm256_setzero_ps();
      for (int c = 0; c < w.columns; c += kStep * kUnroll) {
#pragma GCC unroll 2
        for (int u = 0; u < kUnroll; ++u) {
#pragma GCC unroll 2
          for (int i = 0; i < P; ++i) {
            __m256 v[kStep][2];
            Weights::load(from[i], v);
            from[i] += Weights::kBytes;
#pragma GCC unroll 2
            for (int s = 0; s < kStep; ++s) {
              const int chain = kChains == 1 ? 0 : u * kStep + s;
#pragma GCC unroll 4
              for (int j = 0; j < T; ++j) {
                const __m256 value = _mm256_broadcast_ss(a[j] + c + u * kStep + s);
                sum[chain][i][j][0] = _mm256_fmadd_ps(v[s][0], value, sum[chain][i][j][0]);
                sum[chain][i][j][1] = _mm256_fmadd_ps(v[s][1], value, sum[chain][i][j][1]);
              }
            }
          }
        }
      }
      for (int i = 0; i < P; ++i) {
        for (int j = 0; j < T; ++j) {
          float* to = out + static_cast<size_t>(t + j) * out_stride + (p + i) * kPanelRows;
          for (int half = 0; half < 2; ++half) {
            __m256 total = sum[0][i][j][half];
            for (int u = 1; u < kChains; ++u) total = _mm256_add_ps(total, sum[u][i][j][half]);
            _mm256_storeu_ps(to + 8 * half, total);
          }
        }
      }
    }
  }
};

// |weight| times the activation with the weight's sign: the pairwise 16-bit sums of vpmaddubsw then
// stay below 2 * 127 * 127 and can't saturate.
struct Int8 {
  static constexpr int kPanels = 2, kTokens = 4;
  template <int P, int T>
  static void tile(const Panels& w, int p, const Tokens& x, int t, float* out, size_t out_stride) {
    if constexpr (P == 2 && T > 1) {
      tile<1, T>(w, p, x, t, out, out_stride);
      tile<1, T>(w, p + 1, x, t, out, out_stride);
    } else {
      const __m256i ones = _mm256_set1_epi16(1);
      const unsigned char* from[P];
      const int8_t* a[T];
      __m256 sum[P][T][2];
      for (int i = 0; i < P; ++i) from[i] = panel_of(w, p + i);
      for (int j = 0; j < T; ++j) a[j] = reinterpret_cast<const int8_t*>(values_of(x, t + j));
      for (int i = 0; i < P; ++i)
        for (int j = 0; j < T; ++j) sum[i][j][0] = sum[i][j][1] = _mm256_setzero_ps();
      for (int begin = 0, block = 0; begin < w.columns; begin += kInt8Block, ++block) {
        const int end = begin + kInt8Block < w.columns ? begin + kInt8Block : w.columns;
        __m256i dot[P][T][2];
        for (int i = 0; i < P; ++i)
          for (int j = 0; j < T; ++j) dot[i][j][0] = dot[i][j][1] = _mm256_setzero_si256();
        for (int c = begin; c < end; c += 4) {
#pragma GCC unroll 2
          for (int i = 0; i < P; ++i) {
            const __m256i v0 = load_bytes(from[i] + c * kPanelRows);
            const __m256i v1 = load_bytes(from[i] + c * kPanelRows + 32);
            const __m256i size0 = _mm256_abs_epi8(v0);
            const __m256i size1 = _mm256_abs_epi8(v1);
#pragma GCC unroll 4
            for (int j = 0; j < T; ++j) {
              const __m256i quad = _mm256_set1_epi32(load_quad(a[j] + c));
              const __m256i pairs0 = _mm256_maddubs_epi16(size0, _mm256_sign_epi8(quad, v0));
              const __m256i pairs1 = _mm256_maddubs_epi16(size1, _mm256_sign_epi8(quad, v1));
              dot[i][j][0] = _mm256_add_epi32(dot[i][j][0], _mm256_madd_epi16(pairs0, ones));
              dot[i][j][1] = _mm256_add_epi32(dot[i][j][1], _mm256_madd_epi16(pairs1, ones));
            }
          }
        }
        for (int j = 0; j < T; ++j) {
          const __m256 scale = _mm256_set1_ps(x.scales[group_of(x, t + j, block)]);
          for (int i = 0; i < P; ++i)
            for (int half = 0; half < 2; ++half)
              sum[i][j][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[i][j][half]), scale, sum[i][j][half]);
        }
      }
      for (int i = 0; i < P; ++i) {
        const float* scales = reinterpret_cast<const float*>(from[i] + w.columns * kPanelRows);
        for (int j = 0; j < T; ++j)
          for (int half = 0; half < 2; ++half)
            _mm256_storeu_ps(out + static_cast<size_t>(t + j) * out_stride + (p + i) * kPanelRows + 8 * half,
                             _mm256_mul_ps(sum[i][j][half], _mm256_load_ps(scales + 8 * half)));
      }
    }
  }
};

// 16-bit sums of 64 columns stay below 8 * 2 * 15 * 127 = 30480, so they are widened once per 64.
struct Int4 {
  static constexpr int kPanels = 2, kTokens = 4;
  template <int P, int T>
  static void tile(const Panels& w, int p, const Tokens& x, int t, float* out, size_t out_stride) {
    if constexpr (P == 2) {
      tile<1, T>(w, p, x, t, out, out_stride);
      tile<1, T>(w, p + 1, x, t, out, out_stride);
    } else if constexpr (T == 4) {
      tile<1, 2>(w, p, x, t, out, out_stride);
      tile<1, 2>(w, p, x, t + 2, out, out_stride);
    } else {
      const __m256i ones = _mm256_set1_epi16(1);
      const __m256i mask = _mm256_set1_epi8(0x0f);
      const unsigned char* from = panel_of(w, p);
      const int8_t* a[T];
      __m256 sum[T][2];
      for (int j = 0; j < T; ++j) {
        a[j] = reinterpret_cast<const int8_t*>(values_of(x, t + j));
        sum[j][0] = sum[j][1] = _mm256_setzero_ps();
      }
      for (int begin = 0, g = 0; begin < w.columns; begin += w.group, ++g) {
        __m256i dot[T][2];
        for (int j = 0; j < T; ++j) dot[j][0] = dot[j][1] = _mm256_setzero_si256();
        for (int part = 0; part < w.group; part += kColumnStep) {
          const int end = part + kColumnStep < w.group ? part + kColumnStep : w.group;
          __m256i low[T][2];
          __m256i high[T][2];
          for (int j = 0; j < T; ++j)
            for (int half = 0; half < 2; ++half) low[j][half] = high[j][half] = _mm256_setzero_si256();
          for (int c = part; c < end; c += 8, from += 64) {
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
              const __m256i raw = load_bytes(from + 32 * half);
              const __m256i low_weights = _mm256_and_si256(raw, mask);
              const __m256i high_weights = _mm256_and_si256(_mm256_srli_epi16(raw, 4), mask);
#pragma GCC unroll 2
              for (int j = 0; j < T; ++j) {
                const __m256i low_quad = _mm256_set1_epi32(load_quad(a[j] + begin + c));
                const __m256i high_quad = _mm256_set1_epi32(load_quad(a[j] + begin + c + 4));
                low[j][half] = _mm256_add_epi16(low[j][half], _mm256_maddubs_epi16(low_weights, low_quad));
                high[j][half] = _mm256_add_epi16(high[j][half], _mm256_maddubs_epi16(high_weights, high_quad));
              }
            }
          }
          for (int j = 0; j < T; ++j)
            for (int half = 0; half < 2; ++half) {
              const __m256i wide =
                  _mm256_add_epi32(_mm256_madd_epi16(low[j][half], ones), _mm256_madd_epi16(high[j][half], ones));
              dot[j][half] = _mm256_add_epi32(dot[j][half], wide);
            }
        }
        for (int half = 0; half < 2; ++half) {
          const __m128i* tail = reinterpret_cast<const __m128i*>(from) + half;
          const __m256 scale = _mm256_cvtph_ps(_mm_load_si128(tail));
          const __m256 bias = _mm256_cvtph_ps(_mm_load_si128(tail + 2));
          for (int j = 0; j < T; ++j) {
            const __m256 scaled = _mm256_mul_ps(scale, _mm256_set1_ps(x.scales[group_of(x, t + j, g)]));
            sum[j][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[j][half]), scaled, sum[j][half]);
            sum[j][half] = _mm256_fmadd_ps(bias, _mm256_set1_ps(x.sums[group_of(x, t + j, g)]), sum[j][half]);
          }
        }
        from += 64;
      }
      for (int j = 0; j < T; ++j)
        for (int half = 0; half < 2; ++half)
          _mm256_storeu_ps(out + static_cast<size_t>(t + j) * out_stride + p * kPanelRows + 8 * half, sum[j][half]);
    }
  }
};

}  // namespace

const KernelSet kAvx2 = {
    "avx2",
    {multiply<Floats<F32>>, multiply<Floats<F16>>, multiply<Floats<Bf16>>, multiply<Int8>, multiply<Int4>},
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

}  // namespace mlx_od_moe::kernels
