// AMX for batches: a panel's 64 bytes by 16 are one tile as they lie in memory. Few tokens go to AVX-512.
#include <immintrin.h>
#include <string.h>

#include "mlx_od_moe/kernels/kernels.h"

namespace mlx_od_moe::kernels {
namespace {

#include "mlx_od_moe/kernels/tiles.inl"

constexpr int kFewTokens = 4;     // at most: not worth the tiles' set-up
constexpr int kFewForInt4 = 8;    // whose groups cost more
constexpr int kTileTokens = 16;   // rows of a tile of activations
constexpr int kTileBytes = 1024;  // 16 rows of 64 bytes

#include "mlx_od_moe/kernels/tile_config.inl"

inline int tokens_in(int left) { return left < kTileTokens ? left : kTileTokens; }

// Tiles 0-3: results of 2 x 16 tokens by 2 panels; 4, 5: the tokens; 6, 7: the panels.
//
// For `left` tokens: how many go to the first 16 and the second. Tiles without tokens keep one row, unused.
inline void configure(int left) {
  TileConfig config;
  const int first = tokens_in(left);
  const int second = tokens_in(left - first);
  config.rows[0] = config.rows[1] = config.rows[4] = static_cast<uint8_t>(first);
  config.rows[2] = config.rows[3] = config.rows[5] = static_cast<uint8_t>(second > 0 ? second : 1);
  _tile_loadconfig(&config);
}

// out[token][16 rows] of a tile of float results.
inline void copy_rows(const float* tile, int tokens, float* out, size_t out_stride) {
  for (int t = 0; t < tokens; ++t) {
    _mm512_storeu_ps(out + static_cast<size_t>(t) * out_stride, _mm512_load_ps(tile + t * kPanelRows));
  }
}

// Panels p and, where Two, p + 1; up to 32 tokens from t on.
template <bool Two>
void bf16_tiles(const Panels& w, int p, const Tokens& x, int t, float* out, size_t out_stride) {
  alignas(64) float results[4][kTileTokens * kPanelRows];
  const int first = tokens_in(x.count - t);
  const int second = tokens_in(x.count - t - first);
  const unsigned char* a = values_of(x, t);
  const unsigned char* b = values_of(x, second > 0 ? t + kTileTokens : t);
  const unsigned char* panel = panel_of(w, p);
  const unsigned char* next = panel_of(w, Two ? p + 1 : p);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int c = 0; c < w.columns; c += 32) {
    _tile_loadd(6, panel + c * kPanelRows * 2, 64);
    _tile_loadd(4, a + c * 2, x.stride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Two) {
      _tile_loadd(7, next + c * kPanelRows * 2, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (second > 0) {
      _tile_loadd(5, b + c * 2, x.stride);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (Two) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, results[0], 64);
  _tile_stored(1, results[1], 64);
  _tile_stored(2, results[2], 64);
  _tile_stored(3, results[3], 64);
  for (int half = 0; half < 2; ++half) {
    float* to = out + static_cast<size_t>(t + half * kTileTokens) * out_stride + p * kPanelRows;
    const int tokens = half == 0 ? first : second;
    copy_rows(results[2 * half], tokens, to, out_stride);
    if constexpr (Two) copy_rows(results[2 * half + 1], tokens, to + kPanelRows, out_stride);
  }
}

// sums[token][16 rows] += scale * (products + offset) for one block of columns.
inline void add_int8(const int32_t* products, const Tokens& x, int t, int tokens, int block, float* sums) {
  for (int i = 0; i < tokens; ++i) {
    const size_t at = group_of(x, t + i, block);
    const __m512i dot =
        _mm512_add_epi32(_mm512_load_si512(products + i * kPanelRows), _mm512_set1_epi32(x.offsets[at]));
    const __m512 sum = _mm512_load_ps(sums + i * kPanelRows);
    _mm512_store_ps(sums + i * kPanelRows, _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(x.scales[at]), sum));
  }
}

template <bool Two>
void int8_tiles(const Panels& w, int p, const Tokens& x, int t, float* out, size_t out_stride) {
  alignas(64) float sums[4][kTileTokens * kPanelRows] = {};
  alignas(64) int32_t products[4][kTileTokens * kPanelRows];
  const int first = tokens_in(x.count - t);
  const int second = tokens_in(x.count - t - first);
  const unsigned char* a = values_of(x, t);
  const unsigned char* b = values_of(x, second > 0 ? t + kTileTokens : t);
  const unsigned char* panel = panel_of(w, p);
  const unsigned char* next = panel_of(w, Two ? p + 1 : p);
  for (int begin = 0, block = 0; begin < w.columns; begin += kInt8Block, ++block) {
    const int end = begin + kInt8Block < w.columns ? begin + kInt8Block : w.columns;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int c = begin; c < end; c += 64) {
      _tile_loadd(6, panel + c * kPanelRows, 64);
      _tile_loadd(4, a + c, x.stride);
      _tile_dpbsud(0, 4, 6);
      if constexpr (Two) {
        _tile_loadd(7, next + c * kPanelRows, 64);
        _tile_dpbsud(1, 4, 7);
      }
      if (second > 0) {
        _tile_loadd(5, b + c, x.stride);
        _tile_dpbsud(2, 5, 6);
        if constexpr (Two) _tile_dpbsud(3, 5, 7);
      }
    }
    _tile_stored(0, products[0], 64);
    _tile_stored(1, products[1], 64);
    _tile_stored(2, products[2], 64);
    _tile_stored(3, products[3], 64);
    add_int8(products[0], x, t, first, block, sums[0]);
    if constexpr (Two) add_int8(products[1], x, t, first, block, sums[1]);
    add_int8(products[2], x, t + kTileTokens, second, block, sums[2]);
    if constexpr (Two) add_int8(products[3], x, t + kTileTokens, second, block, sums[3]);
  }
  for (int i = 0; i < (Two ? 2 : 1); ++i) {
    const __m512 scale = _mm512_load_ps(panel_of(w, p + i) + w.columns * kPanelRows);
    for (int j = 0; j < first + second; ++j) {
      const __m512 sum = _mm512_load_ps(sums[2 * (j / kTileTokens) + i] + j % kTileTokens * kPanelRows);
      _mm512_storeu_ps(out + static_cast<size_t>(t + j) * out_stride + (p + i) * kPanelRows, _mm512_mul_ps(sum, scale));
    }
  }
}

// 64 columns of int4 as the bytes of a tile.
inline void unpack(const unsigned char* from, unsigned char* tile) {
  const __m512i mask = _mm512_set1_epi8(0x0f);
  for (int v = 0; v < 8; ++v) {
    const __m512i raw = _mm512_load_si512(from + v * 64);
    _mm512_store_si512(tile + v * 128, _mm512_and_si512(raw, mask));
    _mm512_store_si512(tile + v * 128 + 64, _mm512_and_si512(_mm512_srli_epi16(raw, 4), mask));
  }
}

// sums[token][16 rows] += scale * products + bias * sum of one group.
inline void add_int4(const int32_t* products, const Tokens& x, int t, int tokens, int group, const unsigned char* tail,
                     float* sums) {
  const __m512i packed = _mm512_load_si512(tail);
  const __m512 scale = _mm512_cvtph_ps(_mm512_castsi512_si256(packed));
  const __m512 bias = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(packed, 1));
  for (int i = 0; i < tokens; ++i) {
    const size_t at = group_of(x, t + i, group);
    const __m512 sum = _mm512_load_ps(sums + i * kPanelRows);
    const __m512 dot = _mm512_cvtepi32_ps(_mm512_load_si512(products + i * kPanelRows));
    const __m512 scaled = _mm512_fmadd_ps(dot, _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[at])), sum);
    _mm512_store_ps(sums + i * kPanelRows, _mm512_fmadd_ps(bias, _mm512_set1_ps(x.sums[at]), scaled));
  }
}

constexpr int kMostTokens = 64;  // that int4_panel takes at once

// One panel, up to 64 tokens: its groups are unpacked once.
void int4_panel(const Panels& w, int p, const Tokens& x, int t, int tokens, float* out, size_t out_stride) {
  alignas(64) unsigned char weights[2 * kTileBytes];
  alignas(64) int32_t products[2][kTileTokens * kPanelRows];
  alignas(64) float sums[kMostTokens * kPanelRows];
  memset(sums, 0, sizeof(sums));
  const unsigned char* from = panel_of(w, p);
  const bool wide = w.group == 128;
  for (int c = 0, g = 0; c < w.columns; c += w.group, ++g) {
    for (int i = 0; i < w.group; i += 64, from += 512) unpack(from, weights + i * kPanelRows);
    _tile_loadd(6, weights, 64);
    if (wide) _tile_loadd(7, weights + kTileBytes, 64);
    for (int i = 0; i < tokens; i += kTileTokens) {
      const unsigned char* a = values_of(x, t + i) + c;
      const int count = tokens_in(tokens - i);
      // The last, smaller part has its own tiles: 2 for the results, 5 for the tokens.
      if (count == kTileTokens) {
        _tile_zero(0);
        _tile_loadd(4, a, x.stride);
        _tile_dpbsud(0, 4, 6);
        if (wide) {
          _tile_loadd(4, a + 64, x.stride);
          _tile_dpbsud(0, 4, 7);
        }
        _tile_stored(0, products[0], 64);
        add_int4(products[0], x, t + i, count, g, from, sums + i * kPanelRows);
      } else {
        _tile_zero(2);
        _tile_loadd(5, a, x.stride);
        _tile_dpbsud(2, 5, 6);
        if (wide) {
          _tile_loadd(5, a + 64, x.stride);
          _tile_dpbsud(2, 5, 7);
        }
        _tile_stored(2, products[1], 64);
        add_int4(products[1], x, t + i, count, g, from, sums + i * kPanelRows);
      }
    }
    from += 64;
  }
  copy_rows(sums, tokens, out + static_cast<size_t>(t) * out_stride + p * kPanelRows, out_stride);
}

template <void (*Pair)(const Panels&, int, const Tokens&, int, float*, size_t),
          void (*Single)(const Panels&, int, const Tokens&, int, float*, size_t)>
void multiply_tiles(const Panels& w, const Tokens& x, float* out, size_t out_stride) {
  for (int t = 0; t < x.count; t += 2 * kTileTokens) {
    configure(x.count - t);
    int p = 0;
    for (; p + 2 <= w.count; p += 2) Pair(w, p, x, t, out, out_stride);
    if (p < w.count) Single(w, p, x, t, out, out_stride);
  }
  _tile_release();
}

void multiply_bf16(const Panels& w, const Tokens& x, float* out, size_t out_stride) {
  if (x.count <= kFewTokens) return kAvx512Bf16Multiply(w, x, out, out_stride);
  multiply_tiles<bf16_tiles<true>, bf16_tiles<false>>(w, x, out, out_stride);
}

void multiply_int8(const Panels& w, const Tokens& x, float* out, size_t out_stride) {
  if (x.count <= kFewTokens) return kAvx512.multiply[kInt8](w, x, out, out_stride);
  multiply_tiles<int8_tiles<true>, int8_tiles<false>>(w, x, out, out_stride);
}

void multiply_int4(const Panels& w, const Tokens& x, float* out, size_t out_stride) {
  if (x.count <= kFewForInt4 || w.group < 64) return kAvx512.multiply[kInt4](w, x, out, out_stride);
  configure(kTileTokens + x.count % kTileTokens);  // whole tiles, and the rest
  for (int t = 0; t < x.count; t += kMostTokens) {
    const int tokens = x.count - t < kMostTokens ? x.count - t : kMostTokens;
    for (int p = 0; p < w.count; ++p) int4_panel(w, p, x, t, tokens, out, out_stride);
  }
  _tile_release();
}

}  // namespace

const Multiply kAmxBf16 = multiply_bf16;
const Multiply kAmxInt8 = multiply_int8;
const Multiply kAmxInt4 = multiply_int4;

}  // namespace mlx_od_moe::kernels
