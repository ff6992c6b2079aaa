#include "mlx_od_moe/packed_matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "mlx_od_moe/half.h"

namespace mlx_od_moe {
namespace {

using kernels::kColumnStep;
using kernels::kInt8Block;
using kernels::kPanelRows;

constexpr int kRows = kPanelRows;

// One row of a group in int4: weight = scale * q + bias.
struct Group {
  float scale;
  float bias;
};

float code(float x, const Group& group) {
  return std::clamp(std::nearbyint((x - group.bias) / group.scale), 0.0f, 15.0f);
}

// The scale and bias that suit these codes best, by least squares; as it was where all codes are equal.
Group refit(const float* x, int n, const Group& group) {
  double sum_q = 0, sum_qq = 0, sum_x = 0, sum_qx = 0;
  for (int i = 0; i < n; ++i) {
    const double q = code(x[i], group);
    sum_q += q;
    sum_qq += q * q;
    sum_x += x[i];
    sum_qx += q * x[i];
  }
  const double determinant = n * sum_qq - sum_q * sum_q;
  if (determinant <= 0) return group;
  const double scale = (n * sum_qx - sum_q * sum_x) / determinant;
  if (scale <= 0) return group;
  return {static_cast<float>(scale), static_cast<float>((sum_x - scale * sum_q) / n)};
}

// Codes and scale in turns, from a range a little narrower than the values': an outlier that is cut
// off costs less than coarser steps for all others.
Group fit_group(const float* x, int n) {
  constexpr float kNarrower = 0.92f;
  const auto [low, high] = std::minmax_element(x, x + n);
  const float middle = (*low + *high) / 2;
  const float scale = std::max((*high - *low) / 15.0f * kNarrower, 1e-7f);
  Group group{scale, middle - 7.5f * scale};
  for (int i = 0; i < 4; ++i) group = refit(x, n, group);
  return group;
}

std::string shape(size_t rows, size_t columns) {
  return "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]";
}

float element(const Tensor& tensor, size_t index) {
  if (tensor.dtype == DType::float32) {
    float value;
    std::memcpy(&value, static_cast<const char*>(tensor.data) + index * 4, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, static_cast<const char*>(tensor.data) + index * 2, 2);
  return tensor.dtype == DType::float16 ? half_to_float(bits) : bfloat_to_float(bits);
}

// The q of MLX's affine format at (row, column).
unsigned quantized(const Linear& linear, size_t row, size_t column) {
  const auto bits = static_cast<size_t>(linear.bits);
  const size_t per_word = 32 / bits;
  uint32_t word;
  const size_t index = row * linear.weight.columns + column / per_word;
  std::memcpy(&word, static_cast<const char*>(linear.weight.data) + index * 4, 4);
  return (word >> (column % per_word * bits)) & ((1u << bits) - 1u);
}

void put_half(std::byte* to, float value) {
  const uint16_t bits = float_to_half(value);
  std::memcpy(to, &bits, 2);
}

using Rows = std::vector<float>;  // [16][padded columns] of one panel

void pack_floats(const Rows& rows, int columns, std::byte* to) {
  for (int c = 0; c < columns; ++c)
    for (int r = 0; r < kRows; ++r) {
      std::memcpy(to + (c * kRows + r) * 4, &rows[static_cast<size_t>(r * columns + c)], 4);
    }
}

void pack_halves(const Rows& rows, int columns, std::byte* to) {
  for (int c = 0; c < columns; ++c)
    for (int r = 0; r < kRows; ++r) put_half(to + (c * kRows + r) * 2, rows[static_cast<size_t>(r * columns + c)]);
}

void pack_bfloats(const Rows& rows, int columns, std::byte* to) {
  for (int c = 0; c < columns; ++c)
    for (int r = 0; r < kRows; ++r) {
      const uint16_t bits = float_to_bfloat(rows[static_cast<size_t>(r * columns + c)]);
      std::memcpy(to + ((c / 2 * kRows + r) * 2 + c % 2) * 2, &bits, 2);
    }
}

void pack_int8(const Rows& rows, int columns, int offset, std::byte* to) {
  for (int r = 0; r < kRows; ++r) {
    const float* row = rows.data() + static_cast<size_t>(r) * static_cast<size_t>(columns);
    float largest = 0;
    for (int c = 0; c < columns; ++c) largest = std::max(largest, std::abs(row[c]));
    const float scale = largest / 127.0f;
    for (int c = 0; c < columns; ++c) {
      // A scale this small would overflow its inverse; such weights are as good as zero.
      const long q = scale > 1e-30f ? std::lround(row[c] / scale) : 0;
      to[(c / 4 * kRows + r) * 4 + c % 4] = static_cast<std::byte>(std::clamp(q, -127L, 127L) + offset);
    }
    std::memcpy(to + columns * kRows + r * 4, &scale, 4);
  }
}

// Where the source is int4 with the same groups its values are kept; else each group is quantised.
void pack_int4(const Rows& rows, const Linear& linear, size_t first_row, int columns, int group, std::byte* to) {
  const bool keep = linear.bits == 4 && linear.group_size == group;
  for (int begin = 0; begin < columns; begin += group) {
    std::byte* tail = to + group * kRows / 2;
    for (int r = 0; r < kRows; ++r) {
      const size_t row = first_row + static_cast<size_t>(r);
      const float* x = rows.data() + static_cast<size_t>(r * columns + begin);
      const bool kept = keep && row < linear.rows() && static_cast<size_t>(begin) < linear.columns();
      Group fitted{};
      if (kept) {
        const size_t at = row * linear.scales.columns + static_cast<size_t>(begin / group);
        fitted = {element(linear.scales, at), element(linear.biases, at)};
      } else {
        fitted = fit_group(x, group);
      }
      put_half(tail + r * 2, fitted.scale);
      put_half(tail + 32 + r * 2, fitted.bias);
      // What the kernels will read back: quantise against that.
      const float scale = half_to_float(float_to_half(fitted.scale));
      const float bias = half_to_float(float_to_half(fitted.bias));
      for (int c = 0; c < group; ++c) {
        const auto column = static_cast<size_t>(begin + c);
        long q = 0;
        if (kept) {
          q = static_cast<long>(quantized(linear, row, column));
        } else if (scale != 0) {
          q = std::clamp(std::lround((x[c] - bias) / scale), 0L, 15L);
        }
        std::byte& byte = to[(c / 8 * kRows + r) * 4 + c % 4];
        byte |= static_cast<std::byte>(c % 8 < 4 ? q : q << 4);
      }
    }
    to = tail + 64;
  }
}

}  // namespace

int Packing::columns(size_t n) const {
  const int step = format == kernels::kInt4 ? std::lcm(kColumnStep, group) : kColumnStep;
  return (static_cast<int>(n) + step - 1) / step * step;
}

int Packing::groups(int padded_columns) const {
  const int block = format == kernels::kInt8 ? kInt8Block : format == kernels::kInt4 ? group : padded_columns;
  return (padded_columns + block - 1) / block;
}

size_t Packing::panel_bytes(int padded_columns) const {
  const auto values = static_cast<size_t>(padded_columns) * kRows;
  switch (format) {
    case kernels::kF32:
      return values * 4;
    case kernels::kF16:
    case kernels::kBf16:
      return values * 2;
    case kernels::kInt8:
      return values + kRows * 4;
    default:
      return values / 2 + static_cast<size_t>(groups(padded_columns)) * kRows * 4;
  }
}

size_t Packing::matrix_bytes(size_t rows, size_t n) const {
  return Arena::rounded((rows + kRows - 1) / kRows * panel_bytes(columns(n)));
}

size_t Packing::value_bytes(int padded_columns) const {
  return static_cast<size_t>(padded_columns) * static_cast<size_t>(kernels->value_bytes[format]);
}

void Activations::begin(const Packing& packing, size_t inputs, int columns, int tokens) {
  const auto reserve = [](auto& memory, size_t n) { memory.resize(std::max(memory.size(), n)); };
  packing_ = packing;
  columns_ = columns;
  tokens_ = tokens;
  const size_t rows = inputs * static_cast<size_t>(tokens);
  const size_t groups = rows * static_cast<size_t>(packing.groups(columns));
  reserve(values_, rows * (packing.value_bytes(columns) + kGapBytes));
  reserve(scales_, groups);
  reserve(sums_, groups);
  reserve(offsets_, groups);
}

kernels::Tokens Activations::prepare(size_t input, const float* x, size_t x_stride) {
  const size_t stride = packing_.value_bytes(columns_) + kGapBytes;
  const auto groups = static_cast<size_t>(packing_.groups(columns_));
  const size_t first = input * static_cast<size_t>(tokens_);
  unsigned char* values = values_.data() + first * stride;
  float* scales = scales_.data() + first * groups;
  float* sums = sums_.data() + first * groups;
  int32_t* offsets = offsets_.data() + first * groups;
  for (size_t t = 0; t < static_cast<size_t>(tokens_); ++t) {
    packing_.kernels->prepare[packing_.format](x + t * x_stride, columns_, packing_.group, values + t * stride,
                                               scales + t * groups, sums + t * groups, offsets + t * groups);
  }
  return {values, stride, scales, sums, offsets, static_cast<int>(groups), tokens_};
}

void check_vector(const Tensor& tensor, size_t n, const std::string& name) {
  if (!tensor) throw std::invalid_argument("[NativePredictor] " + name + " is missing");
  if (tensor.dtype == DType::uint32) throw std::invalid_argument("[NativePredictor] " + name + " must be floats");
  if (tensor.rows * tensor.columns != n) {
    throw std::invalid_argument("[NativePredictor] " + name + " must have " + std::to_string(n) + " values, but has " +
                                std::to_string(tensor.rows * tensor.columns));
  }
}

void check_linear(const Linear& linear, size_t rows, size_t columns, const std::string& name) {
  if (!linear) throw std::invalid_argument("[NativePredictor] " + name + ".weight is missing");
  const bool words = linear.weight.dtype == DType::uint32;
  if (words != (linear.bits != 0) || (words && linear.bits != 4 && linear.bits != 8)) {
    throw std::invalid_argument("[NativePredictor] " + name + ".weight must be floats, or 4 or 8 bits in uint32");
  }
  if (linear.rows() != rows || linear.columns() != columns) {
    throw std::invalid_argument("[NativePredictor] " + name + ".weight must be " + shape(rows, columns) + ", but is " +
                                shape(linear.rows(), linear.columns()));
  }
  if (words) {
    const auto group = static_cast<size_t>(linear.group_size);
    if (group == 0 || columns % group != 0) {
      throw std::invalid_argument("[NativePredictor] " + name + " has groups of " + std::to_string(group) +
                                  ", which do not divide " + std::to_string(columns) + " columns");
    }
    check_vector(linear.scales, rows * (columns / group), name + ".scales");
    check_vector(linear.biases, rows * (columns / group), name + ".biases");
  }
  if (linear.bias) check_vector(linear.bias, rows, name + ".bias");
}

void read_vector(const Tensor& tensor, float* out) {
  for (size_t i = 0; i < tensor.rows * tensor.columns; ++i) out[i] = element(tensor, i);
}

void read_row(const Linear& linear, size_t row, float* out) {
  const size_t columns = linear.columns();
  if (linear.bits == 0) {
    for (size_t c = 0; c < columns; ++c) out[c] = element(linear.weight, row * columns + c);
    return;
  }
  const auto group = static_cast<size_t>(linear.group_size);
  for (size_t c = 0; c < columns; ++c) {
    const size_t at = row * (columns / group) + c / group;
    out[c] = static_cast<float>(quantized(linear, row, c)) * element(linear.scales, at) + element(linear.biases, at);
  }
}

PackedMatrix pack_matrix(const Linear& linear, const Packing& packing, Arena& arena) {
  PackedMatrix packed;
  packed.rows = static_cast<int>(linear.rows());
  packed.columns = static_cast<int>(linear.columns());
  const int columns = packing.columns(linear.columns());
  const size_t stride = packing.panel_bytes(columns);
  const int count = (packed.rows + kRows - 1) / kRows;
  std::byte* to = arena.take(packing.matrix_bytes(linear.rows(), linear.columns()));
  packed.panels = {reinterpret_cast<unsigned char*>(to), stride, count, columns, packing.group};

  Rows rows(static_cast<size_t>(columns) * kRows);
  for (int p = 0; p < count; ++p, to += stride) {
    std::fill(rows.begin(), rows.end(), 0.0f);
    const size_t first = static_cast<size_t>(p) * kRows;
    for (size_t r = 0; r < kRows && first + r < linear.rows(); ++r) {
      read_row(linear, first + r, rows.data() + r * static_cast<size_t>(columns));
    }
    switch (packing.format) {
      case kernels::kF32:
        pack_floats(rows, columns, to);
        break;
      case kernels::kF16:
        pack_halves(rows, columns, to);
        break;
      case kernels::kBf16:
        pack_bfloats(rows, columns, to);
        break;
      case kernels::kInt8:
        pack_int8(rows, columns, packing.kernels->int8_offset, to);
        break;
      default:
        pack_int4(rows, linear, first, columns, packing.group, to);
    }
  }
  return packed;
}

}  // namespace mlx_od_moe
