// The per-row steps around the matrix products, in loops that compilers turn into vector code.
// Included once by each instruction set's file, inside its anonymous namespace.

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(h & 0x7fffu) << 13;
  uint32_t bits = rest + 0x38000000u;  // exponent bias 15 to 127
  if (rest >= 0x0f800000u) {           // infinity, NaN
    bits = rest + 0x70000000u;
  } else if (rest < 0x00800000u) {  // subnormal: place it behind 2^-14, then subtract that
    bits = rest + 0x38800000u;
    float value;
    memcpy(&value, &bits, sizeof(value));
    value -= 6.103515625e-05f;
    memcpy(&bits, &value, sizeof(bits));
  }
  bits |= sign;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

#include "mlx_od_moe/kernels/exponential.inl"

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Round to nearest, ties to even. For finite values.
inline uint16_t float_to_bfloat(float value) {
  const uint32_t bits = float_to_bits(value);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void halves_to_float(const uint16_t* x, int n, float* out) {
  int i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
  }
#elif defined(MLX_OD_MOE_NEON)
  for (; i + 4 <= n; i += 4) vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x + i))));
#endif
  for (; i < n; ++i) out[i] = half_to_float(x[i]);
}

bool to_float(const void* x, Type type, int n, float* out) {
  if (type == kFloat32) {
    memcpy(out, x, static_cast<size_t>(n) * sizeof(float));
  } else if (type == kFloat16) {
    halves_to_float(static_cast<const uint16_t*>(x), n, out);
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(x);
    for (int i = 0; i < n; ++i) out[i] = bits_to_float(static_cast<uint32_t>(from[i]) << 16);
  }
  uint32_t largest = 0;
  for (int i = 0; i < n; ++i) {
    const uint32_t magnitude = float_to_bits(out[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest < 0x7f800000u;
}

void scale_row(const float* x, const float* factors, int n, float* out) {
  for (int i = 0; i < n; ++i) out[i] = x[i] * factors[i];
}

void add_row(const void* x, Type type, int n, float* out) {
  if (type == kFloat32) {
    const float* from = static_cast<const float*>(x);
    for (int i = 0; i < n; ++i) out[i] += from[i];
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(x);
    for (int i = 0; i < n; ++i) out[i] += bits_to_float(static_cast<uint32_t>(from[i]) << 16);
  }
}

constexpr int kLanes = 32;  // running sums and maxima are kept per lane, so that loops need no fast-math

inline float lane_sum(const float* lanes) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

void layer_norm(float* x, int n, const float* weight, const float* bias, float epsilon) {
  float lanes[kLanes] = {};
  const int whole = n / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] += x[i + j];
  }
  float sum = lane_sum(lanes);
  for (int i = whole; i < n; ++i) sum += x[i];
  const float mean = sum / static_cast<float>(n);

  for (int j = 0; j < kLanes; ++j) lanes[j] = 0;
  for (int i = 0; i < whole; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] += (x[i + j] - mean) * (x[i + j] - mean);
  }
  float squares = lane_sum(lanes);
  for (int i = whole; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const float factor = 1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + epsilon);

  for (int i = 0; i < n; ++i) x[i] = (x[i] - mean) * factor;
  if (weight != nullptr) {
    for (int i = 0; i < n; ++i) x[i] *= weight[i];
  }
  if (bias != nullptr) {
    for (int i = 0; i < n; ++i) x[i] += bias[i];
  }
}

void silu(float* x, int n) {
  for (int i = 0; i < n; ++i) x[i] = x[i] / (1.0f + exponential(-x[i]));
}

void relu(float* x, int n) {
  for (int i = 0; i < n; ++i) x[i] = x[i] > 0 ? x[i] : 0.0f;
}

void sigmoid(float* x, int n) {
  for (int i = 0; i < n; ++i) x[i] = 1.0f / (1.0f + exponential(-x[i]));
}

void softmax(float* x, int n, float nothing) {
  float lanes[kLanes];
  for (int j = 0; j < kLanes; ++j) lanes[j] = nothing;
  const int whole = n / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  }
  float largest = nothing;
  for (int j = 0; j < kLanes; ++j) largest = lanes[j] > largest ? lanes[j] : largest;
  for (int i = whole; i < n; ++i) largest = x[i] > largest ? x[i] : largest;

  for (int i = 0; i < n; ++i) x[i] = exponential(x[i] - largest);
  for (int j = 0; j < kLanes; ++j) lanes[j] = 0;
  for (int i = 0; i < whole; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] += x[i + j];
  }
  float sum = lane_sum(lanes) + exponential(nothing - largest);
  for (int i = whole; i < n; ++i) sum += x[i];
  const float factor = 1.0f / sum;
  for (int i = 0; i < n; ++i) x[i] *= factor;
}

// Some numbers at a time: what is read may be what is written.
template <class Count>
inline void adam_part(const AdamStep& step, size_t begin, Count count, const AdamGiven& from, const AdamFound& to) {
  float first[16], second[16], weight[16];
  for (size_t i = 0; i < count; ++i) {
    const float g = from.gradient[begin + i];
    first[i] = step.first * from.first[begin + i] + step.own_first * g;
    second[i] = step.second * from.second[begin + i] + step.own_second * (g * g);
    const float kept = from.weight[begin + i] * (1.0f - step.rate * step.decay);
    weight[i] = kept - step.rate * first[i] / (__builtin_sqrtf(second[i]) + step.epsilon);
  }
  for (size_t i = 0; i < count; ++i) {
    to.first[begin + i] = first[i];
    to.second[begin + i] = second[i];
    to.weight[begin + i] = weight[i];
  }
}

struct Sixteen {
  constexpr operator size_t() const { return 16; }
};

void adam(const AdamStep& step, size_t n, const AdamGiven& from, const AdamFound& to) {
  size_t begin = 0;
  for (; begin + 16 <= n; begin += 16) adam_part(step, begin, Sixteen(), from, to);
  adam_part(step, begin, n - begin, from, to);
}

void prepare_float(const float* x, int columns, int, unsigned char* values, float*, float*, int32_t*) {
  memcpy(values, x, static_cast<size_t>(columns) * sizeof(float));
}

inline void prepare_bfloat(const float* x, int columns, int, unsigned char* values, float*, float*, int32_t*) {
  uint16_t* out = reinterpret_cast<uint16_t*>(values);
  for (int i = 0; i < columns; ++i) out[i] = float_to_bfloat(x[i]);
}

// Below this 127 / largest would overflow; nothing that small can matter beside a trained weight.
constexpr float kTiny = 1e-30f;

#ifndef MLX_OD_MOE_QUANTIZE
// Quantises x[n] to int8 with one scale, n a multiple of 32. Returns the scale; `sum` is the values'.
inline float quantize_block(const float* x, int n, int8_t* out, int32_t* sum) {
  float lanes[kLanes] = {};
  for (int i = 0; i < n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const float magnitude = x[i + j] < 0 ? -x[i + j] : x[i + j];
      lanes[j] = magnitude > lanes[j] ? magnitude : lanes[j];
    }
  }
  float largest = 0;
  for (int j = 0; j < kLanes; ++j) largest = lanes[j] > largest ? lanes[j] : largest;
  const float factor = largest > kTiny ? 127.0f / largest : 0.0f;
  int32_t total = 0;
  for (int i = 0; i < n; ++i) {
    float scaled = x[i] * factor;
    scaled = scaled < 127.0f ? scaled : 127.0f;  // also for infinite x, where it is NaN
    scaled = scaled > -127.0f ? scaled : -127.0f;
    const int32_t q = static_cast<int32_t>(scaled + (scaled < 0 ? -0.5f : 0.5f));
    out[i] = static_cast<int8_t>(q);
    total += q;
  }
  *sum = total;
  return largest * (1.0f / 127.0f);
}
#else
inline float quantize_block(const float* x, int n, int8_t* out, int32_t* sum);  // the including file's
#endif

void prepare_int8(const float* x, int columns, int, unsigned char* values, float* scales, float*, int32_t* offsets) {
  for (int begin = 0, block = 0; begin < columns; begin += kInt8Block, ++block) {
    const int n = columns - begin < kInt8Block ? columns - begin : kInt8Block;
    int32_t sum;
    scales[block] = quantize_block(x + begin, n, reinterpret_cast<int8_t*>(values) + begin, &sum);
    offsets[block] = -128 * sum;
  }
}

void prepare_int4(const float* x, int columns, int group, unsigned char* values, float* scales, float* sums, int32_t*) {
  for (int begin = 0, g = 0; begin < columns; begin += group, ++g) {
    int32_t sum;
    scales[g] = quantize_block(x + begin, group, reinterpret_cast<int8_t*>(values) + begin, &sum);
    sums[g] = scales[g] * static_cast<float>(sum);
  }
}
