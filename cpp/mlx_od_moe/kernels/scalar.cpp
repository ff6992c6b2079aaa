// The kernels in plain C++: the reference for the others, and the fallback on any CPU.
#include <string.h>

#include "mlx_od_moe/kernels/kernels.h"

namespace mlx_od_moe::kernels {
namespace {

#include "mlx_od_moe/kernels/row_ops.inl"
#include "mlx_od_moe/kernels/tiles.inl"
#include "mlx_od_moe/kernels/top_k.inl"

#include "mlx_od_moe/kernels/attention.inl"

inline uint16_t load16(const unsigned char* from) {
  uint16_t value;
  memcpy(&value, from, sizeof(value));
  return value;
}

inline float load_float(const unsigned char* from) {
  float value;
  memcpy(&value, from, sizeof(value));
  return value;
}

// One row at a time: Weight::at gives the weight of a column and a row of the panel.
template <class Weight>
struct Floats {
  static constexpr int kPanels = 1, kTokens = 1;
  template <int P, int T>
  static void tile(const Panels& w, int p, const Tokens& x, int t, float* out, size_t out_stride) {
    const unsigned char* panel = panel_of(w, p);
    const unsigned char* a = values_of(x, t);
    float sum[kPanelRows] = {};
    for (int c = 0; c < w.columns; ++c) {
      const float value = load_float(a + c * 4);
      for (int r = 0; r < kPanelRows; ++r) sum[r] += value * Weight::at(panel, c, r);
    }
    float* to = out + static_cast<size_t>(t) * out_stride + p * kPanelRows;
    for (int r = 0; r < kPanelRows; ++r) to[r] = sum[r];
  }
};

struct F32 {
  static float at(const unsigned char* panel, int c, int r) { return load_float(panel + (c * kPanelRows + r) * 4); }
};
struct F16 {
  static float at(const unsigned char* panel, int c, int r) {
    return half_to_float(load16(panel + (c * kPanelRows + r) * 2));
  }
};
struct Bf16 {
  static float at(const unsigned char* panel, int c, int r) {
    const uint32_t bits = load16(panel + ((c / 2 * kPanelRows + r) * 2 + c % 2) * 2);
    return bits_to_float(bits << 16);
  }
};

struct Int8 {
  static constexpr int kPanels = 1, kTokens = 1;
  template <int P, int T>
  static void tile(const Panels& w, int p, const Tokens& x, int t, float* out, size_t out_stride) {
    const unsigned char* panel = panel_of(w, p);
    const unsigned char* scales = panel + w.columns * kPanelRows;
    const int8_t* a = reinterpret_cast<const int8_t*>(values_of(x, t));
    float* to = out + static_cast<size_t>(t) * out_stride + p * kPanelRows;
    for (int r = 0; r < kPanelRows; ++r) {
      float sum = 0;
      for (int begin = 0, block = 0; begin < w.columns; begin += kInt8Block, ++block) {
        const int end = begin + kInt8Block < w.columns ? begin + kInt8Block : w.columns;
        int32_t dot = 0;
        for (int c = begin; c < end; ++c) {
          dot += a[c] * static_cast<int8_t>(panel[(c / 4 * kPanelRows + r) * 4 + c % 4]);
        }
        sum += static_cast<float>(dot) * x.scales[group_of(x, t, block)];
      }
      to[r] = sum * load_float(scales + r * 4);
    }
  }
};

struct Int4 {
  static constexpr int kPanels = 1, kTokens = 1;
  template <int P, int T>
  static void tile(const Panels& w, int p, const Tokens& x, int t, float* out, size_t out_stride) {
    const int8_t* a = reinterpret_cast<const int8_t*>(values_of(x, t));
    float* to = out + static_cast<size_t>(t) * out_stride + p * kPanelRows;
    for (int r = 0; r < kPanelRows; ++r) to[r] = 0;
    const unsigned char* from = panel_of(w, p);
    for (int begin = 0, g = 0; begin < w.columns; begin += w.group, ++g) {
      int32_t dot[kPanelRows] = {};
      for (int c = 0; c < w.group; c += 8, from += 64) {
        for (int r = 0; r < kPanelRows; ++r) {
          for (int i = 0; i < 4; ++i) {
            const int byte = from[r * 4 + i];
            dot[r] += (byte & 15) * a[begin + c + i] + (byte >> 4) * a[begin + c + 4 + i];
          }
        }
      }
      for (int r = 0; r < kPanelRows; ++r) {
        const float scale = half_to_float(load16(from + r * 2)) * x.scales[group_of(x, t, g)];
        const float bias = half_to_float(load16(from + 32 + r * 2));
        to[r] += static_cast<float>(dot[r]) * scale + bias * x.sums[group_of(x, t, g)];
      }
      from += 64;
    }
  }
};

}  // namespace

const KernelSet kScalar = {
    "scalar",
    {multiply<Floats<F32>>, multiply<Floats<F16>>, multiply<Floats<Bf16>>, multiply<Int8>, multiply<Int4>},
    {prepare_float, prepare_float, prepare_float, prepare_int8, prepare_int4},
    {4, 4, 4, 1, 1},
    0,
    to_float,
    scale_row,
    add_row,
    layer_norm,
    silu,
    relu,
    sigmoid,
    top_k,
    softmax,
    adam,
    attend,
    attend_gradient,
    nullptr,
    nullptr,
};

}  // namespace mlx_od_moe::kernels
