// What one instruction set offers the predictor: a table of functions, chosen once per process.
//
// Plain data and function pointers only. Files compiled with -mavx512f and the like include this
// header, and an inline function of the standard library that the linker picked from such a file
// would crash an older CPU: so no standard C++ header may be included from here.
//
// Layout     A matrix [rows, columns] is stored as panels of 16 rows (one row per vector lane), zero
//            rows added to fill the last. Within a panel the columns run outermost, so a forward
//            reads it once, front to back:
//              f32, f16   [column][row]
//              bf16       [column / 2][row][2]
//              int8       [column / 4][row][4], then one f32 scale per row
//              int4       per group of columns: [column / 8][row][4] bytes whose low halves are
//                         columns 0-3 of the eight and high halves 4-7; then 16 f16 scales, 16 f16
//                         biases: weight = scale * q + bias with q in 0 ... 15
//            Columns are padded with zeros to a multiple of 64, for int4 also of the group.
// Threads    All functions are pure: any thread.
// Units      Shapes as [tokens, rows]; strides in bytes where named `stride`, else in elements.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "mlx_od_moe/kernels/bf16_products.h"
#include "mlx_od_moe/kernels/types.h"

namespace mlx_od_moe::kernels {

constexpr int kPanelRows = 16;
constexpr int kColumnStep = 64;
constexpr int kInt8Block = 256;  // columns that share one activation scale in int8

enum Format { kF32, kF16, kBf16, kInt8, kInt4, kNumFormats };

// Consecutive panels of one packed matrix.
struct Panels {
  const unsigned char* data;
  size_t stride;  // from panel to panel
  int count;
  int columns;  // padded
  int group;    // int4 only
};

// Prepared inputs of some tokens: what `prepare` wrote for each.
struct Tokens {
  const unsigned char* values;
  size_t stride;           // from token to token
  const float* scales;     // int8, int4: [tokens, groups], activation = scale * value
  const float* sums;       // int4: [tokens, groups], the activations' sum
  const int32_t* offsets;  // int8: [tokens, groups], -128 times the values' sum (see int8_offset)
  int groups;              // int8: blocks of kInt8Block columns; int4: groups
  int count;
};

// out[token * out_stride + row] = dot(matrix row, token), for all rows of the panels.
using Multiply = void (*)(const Panels&, const Tokens&, float* out, size_t out_stride);

// Writes one token's activations x[columns] (already padded with zeros) in the form that this
// format's Multiply reads; scales, sums and offsets have `groups` entries where the format has them.
using Prepare = void (*)(const float* x, int columns, int group, unsigned char* values, float* scales, float* sums,
                         int32_t* offsets);

constexpr int kAttentionTile = 16;  // tokens

// One head of attention of tokens in order, each over the `window` rows before its own; token t's own row
// is window + t. A row has a key, a value and the number of its sequence, and only that one's tokens see it.
// Softmax is over the rows' scores q k / sqrt(key_size) + bias[age], age 1 ... window, and over bias[0], the
// score of attending to nothing.
struct WindowAttention {
  int window, key_size, tokens;
  const float* query;  // [tokens, key_size]
  size_t query_stride;
  const float* key;  // [window + tokens, key_size]
  const float* value;
  size_t memory_stride;     // of both
  const int32_t* sequence;  // [window + tokens]
  const float* bias;        // [window + 1]
  float* scratch;           // attention_scratch(window, key_size) floats
  uint16_t* packed;         // attention_packed(window, key_size, tokens) numbers on a cache line: Bf16Attention's
};

// In the strides of what they are the gradients of. The query's is set, the others are added to.
struct WindowGradients {
  float* query;
  float* key;
  float* value;
  float* bias;
};

// That a tile can see, and so many more that they fill tiles of depth.
constexpr size_t attention_rows(int window) {
  return static_cast<size_t>((window + kAttentionTile + kTileDepth - 1) / kTileDepth * kTileDepth);
}

constexpr size_t attention_scratch(int window, int key_size) {
  return static_cast<size_t>(kAttentionTile) * (2 * attention_rows(window) + static_cast<size_t>(key_size)) +
         2 * static_cast<size_t>(window + 2 * kAttentionTile);
}

constexpr size_t attention_packed(int window, int key_size, int tokens) {
  const size_t rows = static_cast<size_t>(window + tokens + 6 * kTileDepth);
  const size_t size = static_cast<size_t>(key_size + kTileDepth);
  return 8 * rows * size + 4 * (attention_rows(window) + kAttentionTile) * static_cast<size_t>(kTileDepth);
}

using Attend = void (*)(const WindowAttention&, float* out, size_t out_stride);
using AttendGradient = void (*)(const WindowAttention&, const float* cotangent, size_t cotangent_stride,
                                const WindowGradients&);

// With products in bfloat16, summed in float32.
struct Bf16Attention {
  Attend attend;
  AttendGradient gradient;
};

// One step of AdamW without bias correction (Loshchilov and Hutter, 2019).
struct AdamStep {
  float first, second;          // what the moments keep
  float own_first, own_second;  // what the gradient adds: 1 less that, rounded once
  float rate, epsilon, decay;
};

// Arrays of one length.
struct AdamGiven {
  const float *gradient, *first, *second, *weight;
};
struct AdamFound {
  float *first, *second, *weight;  // may be what was given
};

struct KernelSet {
  const char* name;
  Multiply multiply[kNumFormats];
  Prepare prepare[kNumFormats];
  int value_bytes[kNumFormats];  // of one prepared activation
  int int8_offset;               // added to int8 weights when they are packed: 128 where they are read unsigned

  // x[n] to float32. False where a value is NaN or infinite.
  bool (*to_float)(const void* x, Type type, int n, float* out);
  void (*scale)(const float* x, const float* factors, int n, float* out);  // out = x * factors
  void (*add)(const void* x, Type type, int n, float* out);                // out += x; float32 or bfloat16
  // weight and bias may be null: (x - mean) / sqrt(variance + epsilon) * weight + bias, in place.
  void (*layer_norm)(float* x, int n, const float* weight, const float* bias, float epsilon);
  void (*silu)(float* x, int n);
  void (*relu)(float* x, int n);
  void (*sigmoid)(float* x, int n);
  // Ids of the k largest of scores[n], best first, of equals the lower id first. NaN counts as the
  // lowest. 1 <= k <= 32, k <= n. `candidates` is scratch for n ids.
  void (*top_k)(const float* scores, int n, int k, int32_t* candidates, int32_t* ids);
  // Softmax of x[n] and of one more score, `nothing`, whose share goes to none; in place. Scores of -1e9 and
  // less get a share below 1e-37 of the largest.
  void (*softmax)(float* x, int n, float nothing);
  void (*adam)(const AdamStep&, size_t n, const AdamGiven&, const AdamFound&);
  Attend attend;
  AttendGradient attend_gradient;
  const Bf16Products* products;         // null where the CPU's are no faster than float32's
  const Bf16Attention* bf16_attention;  // the same
};

extern const KernelSet kScalar;
#if defined(__x86_64__)
extern const KernelSet kAvx2;
extern const KernelSet kAvx512;
extern const Multiply kAvx512BatchF32, kAvx512BatchF16, kAvx512BatchBf16;
extern const Multiply kAvx512Bf16Multiply;  // for CPUs that have it beside AVX-512
extern const Prepare kAvx512Bf16Prepare;
extern const Bf16Products kAmxProducts;
extern const Bf16Attention kAmxAttention;
extern const Multiply kAmxBf16, kAmxInt8, kAmxInt4;  // Linux: needs the system's permission
#elif defined(__aarch64__)
extern const KernelSet kNeon;
extern const Multiply kNeonDotInt8, kNeonDotInt4;    // for CPUs with dotprod
extern const Multiply kNeonI8mmInt8, kNeonI8mmInt4;  // and i8mm
extern const Multiply kNeonBf16Multiply;             // with bf16
extern const Prepare kNeonBf16Prepare;
#endif

constexpr int kMaxTopK = 32;

}  // namespace mlx_od_moe::kernels
