// A weight matrix in the layout of kernels.h, and the activations to multiply it with.
//
// Threads    Packing by one thread; a packed matrix is immutable: any thread.
// Ownership  The packed bytes lie in the Arena that they were packed into.
// Errors     std::invalid_argument, naming the matrix, for tensors of wrong shape or type.
// Units      Bytes; shapes as [rows, columns].
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "mlx_od_moe/arena.h"
#include "mlx_od_moe/kernels/kernels.h"
#include "mlx_od_moe/weights.h"

namespace mlx_od_moe {

// Between the rows of several tokens: a multiple of 4 KiB apart they would share one set of the
// first-level cache.
constexpr size_t kGapBytes = 64;

// How matrices are packed: the format, the group of int4, and for which kernels.
struct Packing {
  kernels::Format format;
  int group;
  const kernels::KernelSet* kernels;

  int columns(size_t columns) const;  // padded
  int groups(int padded_columns) const;
  size_t panel_bytes(int padded_columns) const;
  size_t matrix_bytes(size_t rows, size_t columns) const;
  size_t value_bytes(int padded_columns) const;  // of one token's prepared activations
};

struct PackedMatrix {
  kernels::Panels panels{};
  int rows = 0;
  int columns = 0;  // not padded

  int padded_rows() const { return panels.count * kernels::kPanelRows; }
  size_t bytes() const { return static_cast<size_t>(panels.count) * panels.stride; }
};

// Inputs of products in the form that the kernels read; the memory stays from use to use.
class Activations {
 public:
  // Room for so many inputs of so many tokens and columns (padded).
  void begin(const Packing& packing, size_t inputs, int columns, int tokens);
  // Input number `input`: rows x[tokens, columns], x_stride floats apart, padded with zeros.
  kernels::Tokens prepare(size_t input, const float* x, size_t x_stride);

 private:
  Packing packing_{};
  int columns_ = 0;
  int tokens_ = 0;
  std::vector<unsigned char> values_;
  std::vector<float> scales_, sums_;
  std::vector<int32_t> offsets_;
};

// Checks shapes and types; `name` is for the error.
void check_linear(const Linear& linear, size_t rows, size_t columns, const std::string& name);
void check_vector(const Tensor& tensor, size_t n, const std::string& name);

PackedMatrix pack_matrix(const Linear& linear, const Packing& packing, Arena& arena);

// One row as float32, dequantised where it is quantised.
void read_row(const Linear& linear, size_t row, float* out);
// A vector as float32.
void read_vector(const Tensor& tensor, float* out);

}  // namespace mlx_od_moe
