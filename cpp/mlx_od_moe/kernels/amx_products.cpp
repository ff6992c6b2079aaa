// bf16_products.h with AMX: a block is four tiles of results, two of the left and two of the right.
#include <immintrin.h>
#include <string.h>

#include "mlx_od_moe/kernels/kernels.h"

namespace mlx_od_moe::kernels {
namespace {

constexpr int kLeftPairs = 8;
constexpr int kDepthTiles = 8;

inline __m512i to_words(__m512 low, __m512 high) {
  const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
  __m512i words;
  memcpy(&words, &rounded, sizeof(words));
  return words;
}

// Of 16 columns, those that there are.
inline __mmask16 columns_from(const Rows& x, int column) {
  const int left = x.columns - column;
  return static_cast<__mmask16>(left >= 16 ? 0xffffu : left <= 0 ? 0u : (1u << left) - 1u);
}

template <Type type>
inline __m512 load_floats(const Rows& x, int row, int column, __mmask16 columns) {
  const size_t at = static_cast<size_t>(row) * x.stride + static_cast<size_t>(column);
  if constexpr (type == kFloat32) return _mm512_maskz_loadu_ps(columns, static_cast<const float*>(x.data) + at);
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(columns, static_cast<const uint16_t*>(x.data) + at));
}

// Words of 32 bits.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(r[i], r[i + 1]), b = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]), d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
    t[i] = _mm512_unpacklo_epi64(a, c);
    t[i + 1] = _mm512_unpackhi_epi64(a, c);
    t[i + 2] = _mm512_unpacklo_epi64(b, d);
    t[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
    r[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

inline void store_tile(const __m512i (&r)[16], uint16_t* to) {
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * 32, r[i]);
}

inline uint16_t* tile_of(const Operand& o, int panel, int tile) {
  return o.data + static_cast<size_t>(panel) * o.stride + static_cast<size_t>(tile) * kTileNumbers;
}

// r[i] = words(i) for the rows that there are, else 0. The usual number is a constant, so that r stays in registers.
template <class Words>
inline void fill(__m512i (&r)[16], int rows, const Words& words) {
  if (rows >= 16) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = words(i);
  } else {
    for (int i = 0; i < 16; ++i) r[i] = i < rows ? words(i) : _mm512_setzero_si512();
  }
}

template <Type type>
void pack_rows_of(const Rows& x, Side side, const Operand& to) {
  for (int p = 0; p < to.count; ++p) {
    for (int t = 0; t < to.tiles; ++t) {
      const __mmask16 low = columns_from(x, t * 32), high = columns_from(x, t * 32 + 16);
      __m512i r[16];
      fill(r, x.rows - p * 16, [&](int i) {
        const int row = p * 16 + i;
        return to_words(load_floats<type>(x, row, t * 32, low), load_floats<type>(x, row, t * 32 + 16, high));
      });
      if (side == kRight) transpose(r);
      store_tile(r, tile_of(to, p, t));
    }
  }
}

void pack_rows(const Rows& x, Side side, const Operand& to) {
  x.type == kFloat32 ? pack_rows_of<kFloat32>(x, side, to) : pack_rows_of<kFloat16>(x, side, to);
}

// Words 2 i and 2 i + 1 of the result: word i of the two, from the first (or the second) half.
inline __m512i interleave_index(int half) {
  alignas(64) uint16_t index[32];
  for (int i = 0; i < 16; ++i) {
    index[2 * i] = static_cast<uint16_t>(16 * half + i);
    index[2 * i + 1] = static_cast<uint16_t>(32 + 16 * half + i);
  }
  return _mm512_load_si512(index);
}

template <Type type>
void pack_columns_of(const Rows& x, Side side, const Operand& to) {
  alignas(64) uint16_t index[32];
  for (int i = 0; i < 32; ++i) index[i] = static_cast<uint16_t>(i / 2 + 16 * (i % 2));
  const __m512i pairs = _mm512_load_si512(index);
  for (int t = 0; t < to.tiles; ++t) {
    const int rows = x.rows - t * 32;
    for (int p = 0; p < to.count; ++p) {
      const __mmask16 columns = columns_from(x, p * 16);
      __m512i r[16];
      fill(r, (rows + 1) / 2, [&](int i) {
        const int row = t * 32 + 2 * i;
        const __mmask16 second = row + 1 < x.rows ? columns : static_cast<__mmask16>(0);
        return _mm512_permutexvar_epi16(
            pairs, to_words(load_floats<type>(x, row, p * 16, columns), load_floats<type>(x, row + 1, p * 16, second)));
      });
      if (side == kLeft) transpose(r);
      store_tile(r, tile_of(to, p, t));
    }
  }
}

void pack_columns(const Rows& x, Side side, const Operand& to) {
  x.type == kFloat32 ? pack_columns_of<kFloat32>(x, side, to) : pack_columns_of<kFloat16>(x, side, to);
}

void turn(const Operand& left, const Operand& right) {
  const __m512i low = interleave_index(0), high = interleave_index(1);
  for (int p = 0; p < left.count; p += 2) {
    for (int t = 0; t < left.tiles; ++t) {
      for (int half = 0; half < 2; ++half) {
        const uint16_t* from = tile_of(left, p + half, t);
        uint16_t* first = tile_of(right, 2 * t, p / 2) + half * 256;
        uint16_t* second = tile_of(right, 2 * t + 1, p / 2) + half * 256;
        for (int i = 0; i < 8; ++i) {
          const __m512i a = _mm512_loadu_si512(from + i * 64), b = _mm512_loadu_si512(from + i * 64 + 32);
          _mm512_storeu_si512(first + i * 32, _mm512_permutex2var_epi16(a, low, b));
          _mm512_storeu_si512(second + i * 32, _mm512_permutex2var_epi16(a, high, b));
        }
      }
    }
  }
}

void mirror(const Operand& from, const Operand& to) {
  for (int p = 0; p < from.count; ++p) {
    for (int t = 0; t < from.tiles; ++t) {
      __m512i r[16];
      const uint16_t* tile = tile_of(from, p, t);
      for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(tile + i * 32);
      transpose(r);
      store_tile(r, tile_of(to, p, t));
    }
  }
}

inline void write(const float* block, int row, int column, const Results& to) {
  for (int half = 0; half < 2; ++half) {
    const int first = column + 16 * half, left = to.columns - first;
    if (left <= 0) return;
    const __mmask16 mask = left >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << left) - 1u);
    const __m512 bias = to.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, to.bias + first);
    const int rows = to.rows - row < kBlock ? to.rows - row : kBlock;
    for (int i = 0; i < rows; ++i) {
      const size_t at = static_cast<size_t>(row + i) * to.stride + static_cast<size_t>(first);
      __m512 sum = _mm512_load_ps(block + i * kBlock + 16 * half);
      sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(to.factor), bias);
      if (to.addend != nullptr) {
        sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, to.addend + at), _mm512_set1_ps(to.addend_factor), sum);
      }
      _mm512_mask_storeu_ps(to.out + at, mask, sum);
    }
  }
}

#include "mlx_od_moe/kernels/tile_config.inl"

// A pair of panels of each side; out, [32][32] on a cache line, is set or added to.
inline void multiply_block(const uint16_t* left, size_t left_stride, const uint16_t* right, size_t right_stride,
                           int tiles, bool add, float* out) {
  constexpr int kStride = kBlock * static_cast<int>(sizeof(float));
  if (add) {
    _tile_loadd(0, out, kStride);
    _tile_loadd(1, out + 16, kStride);
    _tile_loadd(2, out + 16 * kBlock, kStride);
    _tile_loadd(3, out + 16 * kBlock + 16, kStride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int t = 0; t < tiles; ++t, left += kTileNumbers, right += kTileNumbers) {
    _tile_loadd(4, left, 64);
    _tile_loadd(6, right, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + right_stride, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, left + left_stride, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, kStride);
  _tile_stored(1, out + 16, kStride);
  _tile_stored(2, out + 16 * kBlock, kStride);
  _tile_stored(3, out + 16 * kBlock + 16, kStride);
}

// Calls with each block of the result: a pair of panels of the left times one of the right.
//
// A part of the right pair's depth stays in the first cache while many pairs of the left, which lie in the second,
// pass by; their blocks are put together part by part.
template <class Use>
void for_each_block(const Product* products, int count, const Use& use) {
  alignas(64) float blocks[kLeftPairs][kBlock * kBlock];
  const int rows = products[0].left.count / 2, columns = products[0].right.count / 2;
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int begin = 0; begin < rows; begin += kLeftPairs) {
    const int end = begin + kLeftPairs < rows ? begin + kLeftPairs : rows;
    for (int c = 0; c < columns; ++c) {
      for (int i = 0; i < count; ++i) {
        const Product& p = products[i];
        const int tiles = p.left.tiles, parts = (tiles + kDepthTiles - 1) / kDepthTiles;
        for (int part = 0; part < parts; ++part) {
          const int first = tiles * part / parts, last = tiles * (part + 1) / parts;
          const bool add = i + part > 0, done = i + 1 == count && part + 1 == parts;
          for (int r = begin; r < end; ++r) {
            float* block = blocks[r - begin];
            const size_t left = p.left.stride, right = p.right.stride;
            multiply_block(tile_of(p.left, 2 * r, first), left, tile_of(p.right, 2 * c, first), right, last - first,
                           add, block);
            if (done) use(r, c, block);
          }
        }
      }
    }
  }
  _tile_release();
}

void multiply_products(const Product* products, int count, const Results& results) {
  for_each_block(products, count,
                 [&](int r, int c, const float* block) { write(block, r * kBlock, c * kBlock, results); });
}

void relu_product(const Product& product, const float* bias, const Operand& to) {
  for_each_block(&product, 1, [&](int r, int c, const float* block) {
    const __m512 low = _mm512_loadu_ps(bias + c * kBlock), high = _mm512_loadu_ps(bias + c * kBlock + 16);
    const __m512 zero = _mm512_setzero_ps();  // first: NaN stays NaN
    for (int i = 0; i < kBlock; ++i) {
      const __m512 a = _mm512_max_ps(zero, _mm512_add_ps(_mm512_load_ps(block + i * kBlock), low));
      const __m512 b = _mm512_max_ps(zero, _mm512_add_ps(_mm512_load_ps(block + i * kBlock + 16), high));
      _mm512_storeu_si512(tile_of(to, 2 * r + i / 16, c) + i % 16 * 32, to_words(a, b));
    }
  });
}

void relu_product_gradient(const Product& product, const Operand& active, const Operand& to, const Operand& transposed,
                           float* sums) {
  const __m512i first = interleave_index(0), second = interleave_index(1);
  for_each_block(&product, 1, [&](int r, int c, const float* block) {
    __m512 low = _mm512_loadu_ps(sums + c * kBlock), high = _mm512_loadu_ps(sums + c * kBlock + 16);
    __m512i words[2], pairs[16], other[16];
    for (int i = 0; i < kBlock; ++i) {
      const int panel = 2 * r + i / 16, row = i % 16 * 32;
      const __mmask32 positive =
          _mm512_cmpgt_epi16_mask(_mm512_loadu_si512(tile_of(active, panel, c) + row), _mm512_setzero_si512());
      const __m512 a = _mm512_load_ps(block + i * kBlock), b = _mm512_load_ps(block + i * kBlock + 16);
      low = _mm512_mask_add_ps(low, static_cast<__mmask16>(positive), low, a);
      high = _mm512_mask_add_ps(high, static_cast<__mmask16>(positive >> 16), high, b);
      words[i % 2] = _mm512_maskz_mov_epi16(positive, to_words(a, b));
      _mm512_storeu_si512(tile_of(to, panel, c) + row, words[i % 2]);
      if (i % 2 == 1) {
        pairs[i / 2] = _mm512_permutex2var_epi16(words[0], first, words[1]);
        other[i / 2] = _mm512_permutex2var_epi16(words[0], second, words[1]);
      }
    }
    _mm512_storeu_ps(sums + c * kBlock, low);
    _mm512_storeu_ps(sums + c * kBlock + 16, high);
    transpose(pairs);
    transpose(other);
    store_tile(pairs, tile_of(transposed, 2 * c, r));
    store_tile(other, tile_of(transposed, 2 * c + 1, r));
  });
}

constexpr Bf16Products kTable = {pack_rows,    pack_columns,         turn, mirror, multiply_products,
                                 relu_product, relu_product_gradient};

}  // namespace

const Bf16Products kAmxProducts = kTable;

}  // namespace mlx_od_moe::kernels
