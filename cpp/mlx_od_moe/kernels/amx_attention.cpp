// Attention over a window of earlier rows and its gradient, 16 tokens at a time, with AMX. Each operand of a head is
// packed once, for all of its tiles; the rows that a tile sees begin with a panel, or in the middle of a tile of depth.
#include <immintrin.h>
#include <string.h>

#include "mlx_od_moe/kernels/kernels.h"

namespace mlx_od_moe::kernels {
namespace {

#include "mlx_od_moe/kernels/exponential.inl"

#include "mlx_od_moe/kernels/attention_tile.inl"
#include "mlx_od_moe/kernels/tile_config.inl"

constexpr int kSide = 16;  // of a tile of results

// A matrix of a head, packed into the memory that is left.
struct Packing {
  uint16_t* free;

  Operand take(int panels, int tiles) {
    const Operand to{free, static_cast<size_t>(tiles) * kTileNumbers, panels, tiles};
    free += static_cast<size_t>(panels) * to.stride;
    return to;
  }

  // Rows are the operand's panels, columns its depth.
  Operand rows(const Rows& x, Side side) {
    const Operand to = take((x.rows + kSide - 1) / kSide, (x.columns + kTileDepth - 1) / kTileDepth);
    kAmxProducts.pack_rows(x, side, to);
    return to;
  }

  // Columns are the operand's panels, rows its depth; zeros follow, as far as the last tile of attention reads.
  Operand columns(const Rows& x) {
    const Operand to = take((x.columns + kSide - 1) / kSide, (x.rows + 3 * kTileDepth - 1) / kTileDepth);
    kAmxProducts.pack_columns(x, kRight, to);
    return to;
  }
};

inline const uint16_t* panel_of(const Operand& o, int panel) { return o.data + static_cast<size_t>(panel) * o.stride; }

// From a step of depth on, a multiple of 16: in a right operand, tiles of depth lie one after another.
inline const uint16_t* from_depth(const Operand& right, int panel, int step) {
  return panel_of(right, panel) + static_cast<size_t>(step) * kSide;
}

// Some rows and columns of results in memory.
struct Place {
  float* out;
  size_t stride;
  int rows, columns;
};

// Sets a tile of results, or adds to it.
inline void multiply_tile(const uint16_t* left, const uint16_t* right, int tiles, bool add, const Place& to) {
  alignas(64) float part[kSide * kSide];
  const bool whole = to.rows >= kSide && to.columns >= kSide;
  const size_t width = static_cast<size_t>(to.columns < kSide ? to.columns : kSide) * sizeof(float);
  const int rows = to.rows < kSide ? to.rows : kSide;
  float* out = whole ? to.out : part;
  const size_t stride = (whole ? to.stride : kSide) * sizeof(float);
  if (add && !whole) {
    memset(part, 0, sizeof(part));
    for (int i = 0; i < rows; ++i) memcpy(part + i * kSide, to.out + static_cast<size_t>(i) * to.stride, width);
  }
  if (add) {
    _tile_loadd(0, out, stride);
  } else {
    _tile_zero(0);
  }
  for (int t = 0; t < tiles; ++t, left += kTileNumbers, right += kTileNumbers) {
    _tile_loadd(1, left, 64);
    _tile_loadd(2, right, 64);
    _tile_dpbf16ps(0, 1, 2);
  }
  _tile_stored(0, out, stride);
  if (whole) return;
  for (int i = 0; i < rows; ++i) memcpy(to.out + static_cast<size_t>(i) * to.stride, part + i * kSide, width);
}

// out [row][token] = the products of what each row and each token of a tile has.
void of_rows_and_tokens(const AttentionTile& tile, const Operand& rows, const Operand& tokens, float* out) {
  const int first = tile.first / kSide;
  for (int p = 0; p * kSide < tile.rows; ++p) {
    multiply_tile(panel_of(rows, first + p), panel_of(tokens, first), rows.tiles, false,
                  {out + p * kSide * kSide, kSide, kSide, kSide});
  }
}

// What lies behind a tile's last row is zero afterwards.
inline void clear_rest(const AttentionTile& tile, float* x) {
  const size_t rows = static_cast<size_t>(tile.rows);
  memset(x + rows * kSide, 0, (attention_rows(tile.of.window) - rows) * kSide * sizeof(float));
}

// out [token, columns] = the rows, weighed by x [row][token].
void sum_of_rows(const AttentionTile& tile, float* x, Packing memory, const Operand& rows, Place to) {
  clear_rest(tile, x);
  const int depth = static_cast<int>(attention_rows(tile.of.window));
  const Operand left = memory.take(1, depth / kTileDepth);
  kAmxProducts.pack_columns({x, kFloat32, kSide, depth, kSide}, kLeft, left);
  for (int c = 0; c < rows.count; ++c, to.out += kSide, to.columns -= kSide) {
    multiply_tile(left.data, from_depth(rows, c, tile.first), left.tiles, false, to);
  }
}

// What two tiles in a row, from an even one on, give to the rows, as panels of a left operand whose depth is both's
// tokens; the second one's rows begin a panel later.
struct TilePair {
  uint16_t* words;  // [panel][16 rows][32 tokens]
  int panels;

  TilePair(Packing& memory, const WindowAttention& a) : panels((a.window + 3 * kSide - 2) / kSide) {
    const size_t size = (attention_rows(a.window) + kSide) * kTileDepth;
    words = memory.free;
    memory.free += size;
    memset(words, 0, size * sizeof(uint16_t));
  }

  // x [row][token] of a tile.
  void put(const AttentionTile& tile, float* x) {
    clear_rest(tile, x);
    const size_t rows = attention_rows(tile.of.window), half = static_cast<size_t>(tile.first / kSide % 2) * kSide;
    uint16_t* to = words + half * kTileDepth + half;
    for (size_t r = 0; r < rows; ++r) {
      const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + r * kSide));
      memcpy(to + r * kTileDepth, &rounded, sizeof(rounded));
    }
    if (half > 0 || tile.first + kSide < tile.of.tokens) return;
    for (size_t r = 0; r < rows; ++r) memset(to + (r + kSide) * kTileDepth + kSide, 0, kSide * sizeof(uint16_t));
  }

  // out [row, columns] += the tokens, weighed by what was put, after the last tile of a pair.
  void add_tokens(const AttentionTile& tile, const Operand& tokens, float* out, size_t stride) const {
    const WindowAttention& a = tile.of;
    const int first = tile.first / kTileDepth * kTileDepth;
    if (tile.first == first && tile.first + kSide < a.tokens) return;
    out += static_cast<size_t>(first) * stride;
    const int rows = a.window + a.tokens - first;
    for (int p = 0; p < panels && p * kSide < rows; ++p, out += kSide * stride) {
      for (int c = 0; c < tokens.count; ++c) {
        multiply_tile(words + p * kTileNumbers, from_depth(tokens, c, first), 1, true,
                      {out + c * kSide, stride, rows - p * kSide, a.key_size - c * kSide});
      }
    }
  }
};

Rows queries_of(const WindowAttention& a) { return {a.query, kFloat32, a.query_stride, a.tokens, a.key_size}; }

Rows memory_of(const WindowAttention& a, const float* x) {
  return {x, kFloat32, a.memory_stride, a.window + a.tokens, a.key_size};
}

// From a tile's first token on.
Place tokens_from(const AttentionTile& tile, float* x, size_t stride) {
  return {x + static_cast<size_t>(tile.first) * stride, stride, tile.tokens, tile.of.key_size};
}

void attend(const WindowAttention& a, float* out, size_t out_stride) {
  AttentionTile tile = first_tile(a);
  Packing memory{a.packed};
  const Operand keys = memory.rows(memory_of(a, a.key), kLeft), queries = memory.rows(queries_of(a), kRight);
  const Operand values = memory.columns(memory_of(a, a.value));
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int first = 0; first < a.tokens; first += kAttentionTile) {
    move_tile(tile, first);
    of_rows_and_tokens(tile, keys, queries, tile.weights);
    share(tile);
    sum_of_rows(tile, tile.weights, memory, values, tokens_from(tile, out, out_stride));
  }
  _tile_release();
}

void attend_gradient(const WindowAttention& a, const float* cotangent, size_t cotangent_stride,
                     const WindowGradients& to) {
  AttentionTile tile = first_tile(a);
  float* bias = first_bias_gradient(tile);
  Packing memory{a.packed};
  const Rows given{cotangent, kFloat32, cotangent_stride, a.tokens, a.key_size};
  const Operand keys = memory.rows(memory_of(a, a.key), kLeft), values = memory.rows(memory_of(a, a.value), kLeft);
  const Operand queries = memory.rows(queries_of(a), kRight), cotangents = memory.rows(given, kRight);
  const Operand key_sums = memory.columns(memory_of(a, a.key));
  const Operand query_sums = memory.columns(queries_of(a)), cotangent_sums = memory.columns(given);
  TilePair shares(memory, a), gradients(memory, a);
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int first = 0; first < a.tokens; first += kAttentionTile) {
    move_tile(tile, first);
    of_rows_and_tokens(tile, keys, queries, tile.weights);
    share(tile);
    of_rows_and_tokens(tile, values, cotangents, tile.gradients);
    shares.put(tile, tile.weights);
    shares.add_tokens(tile, cotangent_sums, to.value, a.memory_stride);
    score_gradients(tile, bias);
    sum_of_rows(tile, tile.gradients, memory, key_sums, tokens_from(tile, to.query, a.query_stride));
    gradients.put(tile, tile.gradients);
    gradients.add_tokens(tile, query_sums, to.key, a.memory_stride);
  }
  _tile_release();
  add_bias_gradient(tile, bias, to.bias);
}

}  // namespace

const Bf16Attention kAmxAttention = {attend, attend_gradient};

}  // namespace mlx_od_moe::kernels
