// Attention over a window of earlier rows and its gradient, 16 tokens at a time. Nothing but a tile's queries is ever
// transposed.
// Included after row_ops.inl, inside each instruction set's anonymous namespace.

#if defined(__AVX512F__)
using Lanes = __m512;
constexpr int kWideTile = 4;  // registers across, by 4 rows: as many sums as the registers hold
inline Lanes load_lanes(const float* from) { return _mm512_loadu_ps(from); }
inline void store_lanes(float* to, Lanes x) { _mm512_storeu_ps(to, x); }
inline Lanes no_lanes() { return _mm512_setzero_ps(); }
inline Lanes add_product(Lanes sum, float a, Lanes b) { return _mm512_fmadd_ps(_mm512_set1_ps(a), b, sum); }
#elif defined(__AVX2__)
using Lanes = __m256;
constexpr int kWideTile = 2;
inline Lanes load_lanes(const float* from) { return _mm256_loadu_ps(from); }
inline void store_lanes(float* to, Lanes x) { _mm256_storeu_ps(to, x); }
inline Lanes no_lanes() { return _mm256_setzero_ps(); }
inline Lanes add_product(Lanes sum, float a, Lanes b) { return _mm256_fmadd_ps(_mm256_set1_ps(a), b, sum); }
#elif defined(MLX_OD_MOE_NEON)
using Lanes = float32x4_t;
constexpr int kWideTile = 4;
inline Lanes load_lanes(const float* from) { return vld1q_f32(from); }
inline void store_lanes(float* to, Lanes x) { vst1q_f32(to, x); }
inline Lanes no_lanes() { return vdupq_n_f32(0); }
inline Lanes add_product(Lanes sum, float a, Lanes b) { return vfmaq_n_f32(sum, b, a); }
#else
using Lanes = float;
constexpr int kWideTile = 2;
inline Lanes load_lanes(const float* from) { return *from; }
inline void store_lanes(float* to, Lanes x) { *to = x; }
inline Lanes no_lanes() { return 0; }
inline Lanes add_product(Lanes sum, float a, Lanes b) { return sum + a * b; }
#endif

constexpr int kLaneCount = static_cast<int>(sizeof(Lanes) / sizeof(float));

// A matrix whose element (row, step of the sum) lies at data[row * row_stride + step * step_stride].
struct Left {
  const float* data;
  size_t row_stride, step_stride;
};

// out[R, V lanes] (+)= a[R, depth] * b[depth, V lanes].
template <int R, int V>
inline void product_tile(const Left& a, const float* b, size_t b_stride, int depth, bool add, float* out,
                         size_t out_stride) {
  Lanes sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      sum[r][v] = add ? load_lanes(out + static_cast<size_t>(r) * out_stride + v * kLaneCount) : no_lanes();
  const float* left = a.data;
  for (int k = 0; k < depth; ++k, left += a.step_stride, b += b_stride) {
    Lanes right[V];
    for (int v = 0; v < V; ++v) right[v] = load_lanes(b + v * kLaneCount);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v)
        sum[r][v] = add_product(sum[r][v], left[static_cast<size_t>(r) * a.row_stride], right[v]);
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store_lanes(out + static_cast<size_t>(r) * out_stride + v * kLaneCount, sum[r][v]);
}

template <int R, int V>
inline void product_strip(Left a, int rows, const float* b, size_t b_stride, int depth, bool add, float* out,
                          size_t out_stride) {
  int r = 0;
  for (; r + R <= rows; r += R, a.data += R * a.row_stride, out += R * out_stride)
    product_tile<R, V>(a, b, b_stride, depth, add, out, out_stride);
  for (; r < rows; ++r, a.data += a.row_stride, out += out_stride)
    product_tile<1, V>(a, b, b_stride, depth, add, out, out_stride);
}

// out[rows, columns] (+)= a[rows, depth] * b[depth, columns].
void product(const Left& a, int rows, const float* b, size_t b_stride, int columns, int depth, bool add, float* out,
             size_t out_stride) {
  int c = 0;
  for (; c + kWideTile * kLaneCount <= columns; c += kWideTile * kLaneCount)
    product_strip<4, kWideTile>(a, rows, b + c, b_stride, depth, add, out + c, out_stride);
  for (; c + kLaneCount <= columns; c += kLaneCount)
    product_strip<8, 1>(a, rows, b + c, b_stride, depth, add, out + c, out_stride);
  for (; c < columns; ++c) {
    for (int r = 0; r < rows; ++r) {
      float* to = out + static_cast<size_t>(r) * out_stride + c;
      float sum = add ? *to : 0.0f;
      const float* left = a.data + static_cast<size_t>(r) * a.row_stride;
      for (int k = 0; k < depth; ++k)
        sum += left[static_cast<size_t>(k) * a.step_stride] *
               b[static_cast<size_t>(k) * b_stride + static_cast<size_t>(c)];
      *to = sum;
    }
  }
}

#include "mlx_od_moe/kernels/attention_tile.inl"

// x[tokens, size] as [size][16], zeros where there is no token.
inline void turn(const AttentionTile& tile, const float* x, size_t stride) {
  for (int t = 0; t < kAttentionTile; ++t)
    for (int c = 0; c < tile.of.key_size; ++c)
      tile.turned[c * kAttentionTile + t] =
          t < tile.tokens ? x[static_cast<size_t>(t) * stride + static_cast<size_t>(c)] : 0.0f;
}

void weigh(AttentionTile& tile) {
  const WindowAttention& a = tile.of;
  turn(tile, a.query + static_cast<size_t>(tile.first) * a.query_stride, a.query_stride);
  const float* keys = a.key + static_cast<size_t>(tile.first) * a.memory_stride;
  product({keys, a.memory_stride, 1}, tile.rows, tile.turned, kAttentionTile, kAttentionTile, a.key_size, false,
          tile.weights, kAttentionTile);
  share(tile);
}

void attend(const WindowAttention& a, float* out, size_t out_stride) {
  AttentionTile tile = first_tile(a);
  for (int first = 0; first < a.tokens; first += kAttentionTile) {
    move_tile(tile, first);
    weigh(tile);
    product({tile.weights, 1, kAttentionTile}, tile.tokens, a.value + static_cast<size_t>(first) * a.memory_stride,
            a.memory_stride, a.key_size, tile.rows, false, out + static_cast<size_t>(first) * out_stride, out_stride);
  }
}

void attend_gradient(const WindowAttention& a, const float* cotangent, size_t cotangent_stride,
                     const WindowGradients& to) {
  AttentionTile tile = first_tile(a);
  float* bias = first_bias_gradient(tile);
  for (int first = 0; first < a.tokens; first += kAttentionTile) {
    move_tile(tile, first);
    weigh(tile);
    const size_t memory = static_cast<size_t>(first) * a.memory_stride;
    const size_t query = static_cast<size_t>(first) * a.query_stride;
    const float* own = cotangent + static_cast<size_t>(first) * cotangent_stride;
    turn(tile, own, cotangent_stride);
    product({a.value + memory, a.memory_stride, 1}, tile.rows, tile.turned, kAttentionTile, kAttentionTile, a.key_size,
            false, tile.gradients, kAttentionTile);
    product({tile.weights, kAttentionTile, 1}, tile.rows, own, cotangent_stride, a.key_size, tile.tokens, true,
            to.value + memory, a.memory_stride);
    score_gradients(tile, bias);
    product({tile.gradients, 1, kAttentionTile}, tile.tokens, a.key + memory, a.memory_stride, a.key_size, tile.rows,
            false, to.query + query, a.query_stride);
    product({tile.gradients, kAttentionTile, 1}, tile.rows, a.query + query, a.query_stride, a.key_size, tile.tokens,
            true, to.key + memory, a.memory_stride);
  }
  add_bias_gradient(tile, bias, to.bias);
}
