// Some tokens of an attention over a window: its softmax and that one's gradient. Scores are kept as [row][token],
// so that no sum runs across lanes.
// Included after exponential.inl, inside each instruction set's anonymous namespace.

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

inline AttentionTile first_tile(const WindowAttention& a) {
  const size_t rows = attention_rows(a.window);
  AttentionTile tile{a, 0, 0, 0, a.scratch, nullptr, nullptr, nullptr, {}};
  tile.gradients = tile.weights + rows * kAttentionTile;
  tile.turned = tile.gradients + rows * kAttentionTile;
  tile.biases = tile.turned + static_cast<size_t>(a.key_size) * kAttentionTile;
  for (int age = 1 - kAttentionTile; age < a.window + kAttentionTile; ++age)
    tile.biases[age + kAttentionTile - 1] = age >= 1 && age <= a.window ? a.bias[age] : kUnseen;
  return tile;
}

inline void move_tile(AttentionTile& tile, int first) {
  const int left = tile.of.tokens - first;
  tile.first = first;
  tile.tokens = left < kAttentionTile ? left : kAttentionTile;
  tile.rows = tile.of.window + tile.tokens - 1;
}

// In place; exactly 0 where it is negligible, for rows that are not seen and against denormal numbers.
inline void exponentials(float* x, int n) {
  for (int i = 0; i < n; ++i) {
    const float power = exponential(x[i]);
    x[i] = power > 1e-34f ? power : 0.0f;  // a condition on x[i] would keep the loop scalar
  }
}

// The shares `weights`, in place of the scores without scale and bias, and `nothing`, the share that goes to no row.
inline void share(AttentionTile& tile) {
  const WindowAttention& a = tile.of;
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

// The gradients of the scores, from those of the weights; adds them to `bias`, by age as `biases` are.
inline void score_gradients(const AttentionTile& tile, float* bias) {
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

// Zeros for `score_gradients` to add to, behind the biases.
inline float* first_bias_gradient(const AttentionTile& tile) {
  float* bias = tile.biases + tile.of.window + 2 * kAttentionTile;
  for (int i = 0; i < tile.of.window + 2 * kAttentionTile; ++i) bias[i] = 0;
  return bias;
}

inline void add_bias_gradient(const AttentionTile& tile, const float* bias, float* to) {
  for (int age = 0; age <= tile.of.window; ++age) to[age] += bias[age + kAttentionTile - 1];
}
