// Products of matrices in bfloat16, summed in float32: what training spends most of its time on.
//
// Plain data and function pointers only, for the reasons in kernels.h.
//
// Layout     Operands are packed into tiles of 512 numbers, along the dimension that is summed over ("depth", padded
//            with zeros to a multiple of 32), in panels of 16 rows (the left operand) or columns (the right one).
//            Panels come in pairs: their number is even, what is missing is zero.
//              left     [panel][depth / 32][16 rows][32]
//              right    [panel][depth / 32][16 pairs of depth][16 columns][2]
//            A tile of one kind is the other's, transposed in words of 32 bits.
// Threads    All functions are pure: any thread.
// Errors     none; rounding: to the nearest bfloat16, and denormal numbers count as zero.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "mlx_od_moe/kernels/types.h"

namespace mlx_od_moe::kernels {

constexpr int kTileDepth = 32;
constexpr int kTileNumbers = 512;
constexpr int kBlock = 32;  // rows and columns of a result that are computed at once

enum Side { kLeft, kRight };

// A matrix in memory, row by row.
struct Rows {
  const void* data;
  Type type;  // float32 or float16
  size_t stride;
  int rows, columns;
};

// A packed operand: `count` panels (even), `stride` numbers apart.
struct Operand {
  uint16_t* data;
  size_t stride;
  int count;
  int tiles;  // of depth
};

struct Product {
  Operand left, right;
};

// Where results go: out = factor * sum + bias[column] + addend, for the rows and columns that there are.
struct Results {
  float* out;
  size_t stride;
  int rows, columns;
  const float* bias;  // null: none
  float factor;
  const float* addend;  // in the stride of `out`, may be `out`; null: none
  float addend_factor;
};

struct Bf16Products {
  // Rows of x are the operand's rows (or columns), its columns the depth.
  void (*pack_rows)(const Rows& x, Side side, const Operand& to);
  // The other way round: x's columns are the operand's, its rows the depth.
  void (*pack_columns)(const Rows& x, Side side, const Operand& to);
  // A left operand [rows, depth] to a right one whose depth is those rows and whose columns were the depth.
  void (*turn)(const Operand& left, const Operand& right);
  // The same matrix as an operand of the other side.
  void (*mirror)(const Operand& from, const Operand& to);
  // The sum of up to two products of the same shape.
  void (*multiply)(const Product* products, int count, const Results& results);
  // relu(product + bias) as a left operand, whose depth is the product's columns.
  void (*relu)(const Product& product, const float* bias, const Operand& to);
  // The product where `active`, what `relu` wrote, is positive, else 0: as a left operand, as one of its transpose
  // (depth is the product's rows), and its columns' sums, added to `sums`.
  void (*relu_gradient)(const Product& product, const Operand& active, const Operand& to, const Operand& transposed,
                        float* sums);
};

}  // namespace mlx_od_moe::kernels
