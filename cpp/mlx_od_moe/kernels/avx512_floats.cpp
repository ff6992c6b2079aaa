// AVX-512 for batches of float formats: a chunk of two panels stays in the first-level cache, as
// float32, while all tokens pass over it. Few tokens go to the single-token kernels.
#include <immintrin.h>
#include <string.h>

#include "mlx_od_moe/kernels/kernels.h"

namespace mlx_od_moe::kernels {
namespace {

#include "mlx_od_moe/kernels/tiles.inl"

constexpr int kFewTokens = 3;
constexpr int kChunk = 256;      // columns: two panels of them are 32 KiB
constexpr int kTileTokens = 12;  // by two panels: 24 accumulators

// A chunk's weights as float32, [column][16 rows] at both pointers.
struct Chunk {
  const float* panels[2];
  int begin;  // first column
  int columns;
};

// Adds the chunk's products for P panels and T tokens to `out`; the first chunk sets it.
template <int P, int T>
void tile(const Chunk& w, const Tokens& x, int t, float* out, size_t out_stride) {
  __m512 sum[P][T];
#pragma GCC unroll 12
  for (int j = 0; j < T; ++j) {
#pragma GCC unroll 2
    for (int i = 0; i < P; ++i) {
      const float* from = out + static_cast<size_t>(j) * out_stride + i * kPanelRows;
      sum[i][j] = w.begin == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(from);
    }
  }
  const float* a = reinterpret_cast<const float*>(values_of(x, t)) + w.begin;
  const size_t stride = x.stride / sizeof(float);
  for (int c = 0; c < w.columns; ++c) {
    __m512 v[P];
#pragma GCC unroll 2
    for (int i = 0; i < P; ++i) v[i] = _mm512_load_ps(w.panels[i] + c * kPanelRows);
#pragma GCC unroll 12
    for (int j = 0; j < T; ++j) {
      const __m512 value = _mm512_set1_ps(a[static_cast<size_t>(j) * stride + static_cast<size_t>(c)]);
#pragma GCC unroll 2
      for (int i = 0; i < P; ++i) sum[i][j] = _mm512_fmadd_ps(v[i], value, sum[i][j]);
    }
  }
#pragma GCC unroll 12
  for (int j = 0; j < T; ++j) {
#pragma GCC unroll 2
    for (int i = 0; i < P; ++i) {
      _mm512_storeu_ps(out + static_cast<size_t>(j) * out_stride + i * kPanelRows, sum[i][j]);
    }
  }
}

template <int P, int T = kTileTokens>
void tile_of(int tokens, const Chunk& w, const Tokens& x, int t, float* out, size_t out_stride) {
  if (tokens == T) return tile<P, T>(w, x, t, out, out_stride);
  if constexpr (T > 1) tile_of<P, T - 1>(tokens, w, x, t, out, out_stride);
}

// All tokens, in tiles of nearly equal size.
template <int P>
void run_chunk(const Chunk& w, const Tokens& x, float* out, size_t out_stride) {
  int tiles = (x.count + kTileTokens - 1) / kTileTokens;
  for (int t = 0; t < x.count; --tiles) {
    const int tokens = (x.count - t + tiles - 1) / tiles;
    tile_of<P>(tokens, w, x, t, out + static_cast<size_t>(t) * out_stride, out_stride);
    t += tokens;
  }
}

struct F32 {
  static constexpr int kBytes = 4;
  static const float* expand(const unsigned char* from, int, float*) { return reinterpret_cast<const float*>(from); }
};

struct F16 {
  static constexpr int kBytes = 2;
  static const float* expand(const unsigned char* from, int columns, float* to) {
    for (int c = 0; c < columns; ++c) {
      const __m256i halves = _mm256_load_si256(reinterpret_cast<const __m256i*>(from + c * kPanelRows * 2));
      _mm512_store_ps(to + c * kPanelRows, _mm512_cvtph_ps(halves));
    }
    return to;
  }
};

struct Bf16 {
  static constexpr int kBytes = 2;
  static const float* expand(const unsigned char* from, int columns, float* to) {
    const __m512i odd_mask = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    for (int c = 0; c < columns; c += 2) {
      const __m512i pairs = _mm512_load_si512(from + c * kPanelRows * 2);
      _mm512_store_si512(to + c * kPanelRows, _mm512_slli_epi32(pairs, 16));
      _mm512_store_si512(to + (c + 1) * kPanelRows, _mm512_and_si512(pairs, odd_mask));
    }
    return to;
  }
};

template <class Weights>
void multiply_chunks(const Panels& w, const Tokens& x, float* out, size_t out_stride) {
  alignas(64) float memory[2][kChunk * kPanelRows];
  for (int p = 0; p < w.count; p += 2) {
    const bool two = p + 1 < w.count;
    for (int begin = 0; begin < w.columns; begin += kChunk) {
      Chunk chunk{{nullptr, nullptr}, begin, w.columns - begin < kChunk ? w.columns - begin : kChunk};
      const size_t at = static_cast<size_t>(begin) * kPanelRows * Weights::kBytes;
      chunk.panels[0] = Weights::expand(panel_of(w, p) + at, chunk.columns, memory[0]);
      if (two) chunk.panels[1] = Weights::expand(panel_of(w, p + 1) + at, chunk.columns, memory[1]);
      (two ? run_chunk<2> : run_chunk<1>)(chunk, x, out + p * kPanelRows, out_stride);
    }
  }
}

void multiply_f32(const Panels& w, const Tokens& x, float* out, size_t out_stride) {
  (x.count <= kFewTokens ? kAvx512.multiply[kF32] : multiply_chunks<F32>)(w, x, out, out_stride);
}

void multiply_f16(const Panels& w, const Tokens& x, float* out, size_t out_stride) {
  (x.count <= kFewTokens ? kAvx2.multiply[kF16] : multiply_chunks<F16>)(w, x, out, out_stride);
}

void multiply_bf16(const Panels& w, const Tokens& x, float* out, size_t out_stride) {
  (x.count <= kFewTokens ? kAvx2.multiply[kBf16] : multiply_chunks<Bf16>)(w, x, out, out_stride);
}

}  // namespace

const Multiply kAvx512BatchF32 = multiply_f32;
const Multiply kAvx512BatchF16 = multiply_f16;
const Multiply kAvx512BatchBf16 = multiply_bf16;

}  // namespace mlx_od_moe::kernels
