// One head of attention over a ring of keys and values: see Attention in kernels.h. After row_ops.inl.
// GCC's and Clang's vector types, as wide as the registers of the file that includes this.

#if defined(__AVX512F__)
#define MLX_OD_MOE_VECTOR_BYTES 64
#elif defined(__AVX__)
#define MLX_OD_MOE_VECTOR_BYTES 32
#else
#define MLX_OD_MOE_VECTOR_BYTES 16
#endif

typedef float FloatVector __attribute__((vector_size(MLX_OD_MOE_VECTOR_BYTES)));
typedef uint32_t WordVector __attribute__((vector_size(MLX_OD_MOE_VECTOR_BYTES)));
typedef uint16_t BfloatVector __attribute__((vector_size(MLX_OD_MOE_VECTOR_BYTES / 2)));
constexpr int kVectorFloats = MLX_OD_MOE_VECTOR_BYTES / 4;

inline FloatVector load_vector(const float* from) {
  FloatVector vector;
  memcpy(&vector, from, sizeof(vector));
  return vector;
}

inline FloatVector load_vector(const uint16_t* from) {
  BfloatVector bfloats;
  memcpy(&bfloats, from, sizeof(bfloats));
  const WordVector words = __builtin_convertvector(bfloats, WordVector) << 16;
  FloatVector vector;
  memcpy(&vector, &words, sizeof(vector));
  return vector;
}

// N vectors of sum over i of factors[i] * rows[i * stride ...].
template <int N, class T>
inline void weighted_rows(const T* rows, size_t stride, const float* factors, int count, float* out) {
  FloatVector sum[N] = {};
  for (int i = 0; i < count; ++i, rows += stride) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) sum[j] += load_vector(rows + j * kVectorFloats) * factors[i];
  }
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) memcpy(out + j * kVectorFloats, &sum[j], sizeof(sum[j]));
}

// The same for `columns`, a multiple of 16.
template <class T>
inline void weighted_sum(const T* rows, size_t stride, const float* factors, int count, int columns, float* out) {
  int c = 0;
  for (; c + 8 * kVectorFloats <= columns; c += 8 * kVectorFloats) {
    weighted_rows<8>(rows + c, stride, factors, count, out + c);
  }
  for (; c + 4 * kVectorFloats <= columns; c += 4 * kVectorFloats) {
    weighted_rows<4>(rows + c, stride, factors, count, out + c);
  }
  for (; c < columns; c += kVectorFloats) weighted_rows<1>(rows + c, stride, factors, count, out + c);
}

template <class T>
inline void attend_to(const Attention& a, float* weights, float* out) {
  const T* keys = static_cast<const T*>(a.keys);
  const T* values = static_cast<const T*>(a.values);
  weighted_sum(keys, static_cast<size_t>(a.key_stride), a.query, a.key_size, a.slots, weights);
  float lanes[kLanes] = {};
  float largest = a.nothing;
  for (int i = 0; i < a.slots; ++i) {
    weights[i] += a.bias[i];
    largest = weights[i] > largest ? weights[i] : largest;
  }
  for (int i = 0; i < a.slots; ++i) weights[i] = exponential(weights[i] - largest);
  for (int i = 0; i < a.slots; i += kLanes / 2) {
    for (int j = 0; j < kLanes / 2; ++j) lanes[j] += weights[i + j];
  }
  const float factor = 1.0f / (exponential(a.nothing - largest) + lane_sum(lanes));
  weighted_sum(values, static_cast<size_t>(a.value_stride), weights, a.slots, a.value_stride, out);
  for (int i = 0; i < a.key_size; ++i) out[i] *= factor;
}

void attend(const Attention& a, float* weights, float* out) {
  if (a.type == kFloat32) {
    attend_to<float>(a, weights, out);
  } else {
    attend_to<uint16_t>(a, weights, out);
  }
}
