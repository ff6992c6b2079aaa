// Attention over a window of earlier rows and its gradient, 16 tokens at a time. Scores are kept as
// [row][token], so that nothing but a tile's queries is ever transposed and no sum runs across lanes.
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

constexpr float kUnseen = -1e9f;

// Some tokens of an attention, and its scratch memory: [rows][16] and [key_size][16], rows counted from the
// first that one of the tokens can see.
struct AttentionTile {
  const WindowAttention& of;
  int first;   // token
  int tokens;  // <= kAttentionTile
  int rows;
  float* weights;    // [rows][16]
  float* gradients;  // [rows][16], of the scores
  float* turned;     // [key_size][16]
  float* biases;     // by age, from 1 - 16 on
  float nothing[kAttentionTile];
};

// x[tokens, size] as [size][16], zeros where there is no token.
inline void turn(const AttentionTile& tile, const float* x, size_t stride) {
  for (int t = 0; t < kAttentionTile; ++t)
    for (int c = 0; c < tile.of.key_size; ++c)
      tile.turned[c * kAttentionTile + t] =
          t < tile.tokens ? x[static_cast<size_t>(t) * stride + static_cast<size_t>(c)] : 0.0f;
}

AttentionTile first_tile(const WindowAttention& a) {
  const size_t rows = static_cast<size_t>(a.window + kAttentionTile);
  AttentionTile tile{a, 0, 0, 0, a.scratch, nullptr, nullptr, nullptr, {}};
  tile.gradients = tile.weights + rows * kAttentionTile;
  tile.turned = tile.gradients + rows * kAttentionTile;
  tile.biases = tile.turned + static_cast<size_t>(a.key_size) * kAttentionTile;
  for (int age = 1 - kAttentionTile; age < a.window + kAttentionTile; ++age)
    tile.biases[age + kAttentionTile - 1] = age >= 1 && age <= a.window ? a.bias[age] : kUnseen;
  return tile;
}

void move_tile(AttentionTile& tile, int first) {
  const int left = tile.of.tokens - first;
  tile.first = first;
  tile.tokens = left < kAttentionTile ? left : kAttentionTile;
  tile.rows = tile.of.window + tile.tokens - 1;
}

// In place; exactly 0 where it is negligible, for rows that are not seen and against denormal numbers.
void exponentials(float* x, int n) {
  for (int i = 0; i < n; ++i) {
    const float power = exponential(x[i]);
    x[i] = power > 1e-34f ? power : 0.0f;  // a condition on x[i] would keep the loop scalar
  }
}

// `weights` and `nothing`, the share that goes to no row.
void weigh(AttentionTile& tile) {
  const WindowAttention& a = tile.of;
  turn(tile, a.query + static_cast<size_t>(tile.first) * a.query_stride, a.query_stride);
  const float* keys = a.key + static_cast<size_t>(tile.first) * a.memory_stride;
  product({keys, a.memory_stride, 1}, tile.rows, tile.turned, kAttentionTile, kAttentionTile, a.key_size, false,
          tile.weights, kAttentionTile);

  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(a.key_size));
  int32_t own[kAttentionTile];
  float largest[kAttentionTile], sum[kAttentionTile];
  for (int t = 0; t < kAttentionTile; ++t) {
    own[t] = a.sequence[a.window + tile.first + (t < tile.tokens ? t : 0)];
    largest[t] = a.bias[0];
  }
  for (int r = 0; r < tile.rows; ++r) {
    float* scores = tile.weights + r * kAttentionTile;
    const float* bias = tile.biases + (a.window - r + kAttentionTile - 1);
    const int32_t sequence = a.sequence[tile.first + r];
    for (int t = 0; t < kAttentionTile; ++t) {
      const float score = scores[t] * scale + bias[t];
      scores[t] = own[t] == sequence ? score : kUnseen;
      largest[t] = scores[t] > largest[t] ? scores[t] : largest[t];
    }
  }
  for (int t = 0; t < kAttentionTile; ++t) tile.nothing[t] = a.bias[0] - largest[t];
  for (int r = 0; r < tile.rows; ++r)
    for (int t = 0; t < kAttentionTile; ++t) tile.weights[r * kAttentionTile + t] -= largest[t];
  exponentials(tile.nothing, kAttentionTile);
  exponentials(tile.weights, tile.rows * kAttentionTile);
  for (int t = 0; t < kAttentionTile; ++t) sum[t] = tile.nothing[t];
  for (int r = 0; r < tile.rows; ++r)
    for (int t = 0; t < kAttentionTile; ++t) sum[t] += tile.weights[r * kAttentionTile + t];
  for (int t = 0; t < kAttentionTile; ++t) sum[t] = 1.0f / sum[t];
  for (int t = 0; t < kAttentionTile; ++t) tile.nothing[t] *= sum[t];
  for (int r = 0; r < tile.rows; ++r)
    for (int t = 0; t < kAttentionTile; ++t) tile.weights[r * kAttentionTile + t] *= sum[t];
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

// The gradients of the scores, from those of the weights; adds them to `bias`, by age as `biases` are.
void score_gradients(const AttentionTile& tile, float* bias) {
  const WindowAttention& a = tile.of;
  float mean[kAttentionTile] = {};
  for (int r = 0; r < tile.rows; ++r)
    for (int t = 0; t < kAttentionTile; ++t)
      mean[t] += tile.weights[r * kAttentionTile + t] * tile.gradients[r * kAttentionTile + t];
  for (int t = 0; t < kAttentionTile; ++t) bias[kAttentionTile - 1] -= tile.nothing[t] * mean[t];
  for (int r = 0; r < tile.rows; ++r)
    for (int t = 0; t < kAttentionTile; ++t) {
      float& gradient = tile.gradients[r * kAttentionTile + t];
      gradient = tile.weights[r * kAttentionTile + t] * (gradient - mean[t]);
    }
  // Rows 16 apart touch other biases: one after the other, no load waits for the store before it.
  for (int start = 0; start < kAttentionTile; ++start)
    for (int r = start; r < tile.rows; r += kAttentionTile) {
      float* to = bias + (a.window - r + kAttentionTile - 1);
      for (int t = 0; t < kAttentionTile; ++t) to[t] += tile.gradients[r * kAttentionTile + t];
    }
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(a.key_size));
  for (int i = 0; i < tile.rows * kAttentionTile; ++i) tile.gradients[i] *= scale;
}

void attend_gradient(const WindowAttention& a, const float* cotangent, size_t cotangent_stride,
                     const WindowGradients& to) {
  AttentionTile tile = first_tile(a);
  float* bias = tile.biases + a.window + 2 * kAttentionTile;
  for (int i = 0; i < a.window + 2 * kAttentionTile; ++i) bias[i] = 0;
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
  for (int age = 0; age <= a.window; ++age) to.bias[age] += bias[age + kAttentionTile - 1];
}
