// bf16_products.h with AVX512-BF16 alone.
#include <immintrin.h>
#include <string.h>

#include "mlx_od_moe/kernels/kernels.h"

namespace mlx_od_moe::kernels {
namespace {

#include "mlx_od_moe/kernels/bf16_products.inl"

inline __m512bh pairs_of(__m512i words) {
  __m512bh pairs;
  memcpy(&pairs, &words, sizeof(pairs));
  return pairs;
}

struct Registers {
  static constexpr int kRows = 8;

  static void begin() {}
  static void end() {}

  static void multiply(const uint16_t* left, size_t left_stride, const uint16_t* right, size_t right_stride, int tiles,
                       bool add, float* out) {
    for (int first = 0; first < kBlock; first += kRows) {
      float* to = out + first * kBlock;
      __m512 sum[kRows][2];
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        sum[i][0] = add ? _mm512_load_ps(to + i * kBlock) : _mm512_setzero_ps();
        sum[i][1] = add ? _mm512_load_ps(to + i * kBlock + 16) : _mm512_setzero_ps();
      }
      const uint16_t* a = left + (first < 16 ? 0 : left_stride) + first % 16 * 32;
      const uint16_t* b = right;
      for (int t = 0; t < tiles; ++t, a += kTileNumbers) {
        for (int k = 0; k < 16; ++k, b += 32) {
          const __m512bh low = pairs_of(_mm512_loadu_si512(b)), high = pairs_of(_mm512_loadu_si512(b + right_stride));
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i) {
            int32_t pair;
            memcpy(&pair, a + i * 32 + 2 * k, sizeof(pair));
            const __m512bh row = pairs_of(_mm512_set1_epi32(pair));
            sum[i][0] = _mm512_dpbf16_ps(sum[i][0], row, low);
            sum[i][1] = _mm512_dpbf16_ps(sum[i][1], row, high);
          }
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        _mm512_store_ps(to + i * kBlock, sum[i][0]);
        _mm512_store_ps(to + i * kBlock + 16, sum[i][1]);
      }
    }
  }
};

}  // namespace

const Bf16Products kAvx512Bf16Products = table<Registers>();

}  // namespace mlx_od_moe::kernels
