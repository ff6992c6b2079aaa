#include "mlx_od_moe/training_products.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <numeric>
#include <type_traits>
#include <utility>

namespace mlx_od_moe {
namespace {

using kernels::kBlock;
using kernels::kFloat32;
using kernels::kLeft;
using kernels::kRight;
using kernels::kTileDepth;
using kernels::kTileNumbers;
using kernels::Operand;
using kernels::Product;
using kernels::Results;

constexpr int kForwardTokens = 256;    // packed inputs and hidden values of so many stay in a second cache
constexpr int kGradientTokens = 1024;  // the weights' gradients are read and written once for so many

size_t size_of(int n) { return static_cast<size_t>(n); }
int blocks(int n) { return (n + kBlock - 1) / kBlock; }

struct FreeAligned {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};

// Memory that a thread keeps: giving it back to the system and taking it again costs more than the packing.
class Workspace {
 public:
  // Of the calling thread; what was taken before is free again.
  static Workspace& begin() {
    thread_local Workspace own;
    own.taken_ = 0;
    return own;
  }

  void* take(size_t bytes) {
    if (taken_ == pieces_.size()) pieces_.emplace_back();
    Piece& piece = pieces_[taken_++];
    if (piece.bytes < bytes) {
      piece.memory.reset(::operator new(bytes, std::align_val_t(64)));
      piece.bytes = bytes;
    }
    return piece.memory.get();
  }

  float* floats(size_t count) { return static_cast<float*>(take(count * sizeof(float))); }

  Operand operand(int rows, int tiles) {
    const size_t stride = size_of(tiles) * kTileNumbers;
    const int panels = 2 * blocks(rows);
    return {static_cast<uint16_t*>(take(size_of(panels) * stride * sizeof(uint16_t))), stride, panels, tiles};
  }

 private:
  struct Piece {
    std::unique_ptr<void, FreeAligned> memory;
    size_t bytes = 0;
  };
  std::vector<Piece> pieces_;
  size_t taken_ = 0;
};

int depth_tiles(int depth) { return (depth + kTileDepth - 1) / kTileDepth; }

Operand rows_packed(const Bf16Products& products, Workspace& memory, const Rows& x, kernels::Side side) {
  const Operand to = memory.operand(x.rows, depth_tiles(x.columns));
  products.pack_rows(x, side, to);
  return to;
}

Operand columns_packed(const Bf16Products& products, Workspace& memory, const Rows& x, kernels::Side side) {
  const Operand to = memory.operand(x.columns, depth_tiles(x.rows));
  products.pack_columns(x, side, to);
  return to;
}

Operand part_of_depth(const Operand& whole, int first, int tiles) {
  return {whole.data + size_of(first) * kTileNumbers, whole.stride, whole.count, tiles};
}

Rows some_rows(const Rows& x, int first, int count) {
  const size_t bytes = x.type == kFloat32 ? 4 : 2;
  return {static_cast<const char*>(x.data) + size_of(first) * x.stride * bytes, x.type, x.stride, count, x.columns};
}

Rows floats_of(const float* x, int rows, int columns) { return {x, kFloat32, size_of(columns), rows, columns}; }

Results plain(float* out, int rows, int columns) {
  return {out, size_of(columns), rows, columns, nullptr, 1.0f, nullptr, 0.0f};
}

Results added(float* out, int rows, int columns, bool add) {
  Results results = plain(out, rows, columns);
  if (add) {
    results.addend = out;
    results.addend_factor = 1.0f;
  }
  return results;
}

void multiply(const Bf16Products& products, const Operand& left, const Operand& right, const Results& results) {
  const Product product{left, right};
  products.multiply(&product, 1, results);
}

// out [rows of a, columns] = a times `right`; a is packed some rows at a time.
void multiply_in_parts(const Bf16Products& products, Workspace& memory, const Rows& a, const Operand& right,
                       int columns, float* out) {
  const Operand left = memory.operand(std::min(a.rows, kForwardTokens), right.tiles);
  for (int t = 0; t < a.rows; t += kForwardTokens) {
    const int count = std::min(kForwardTokens, a.rows - t);
    const Operand some{left.data, left.stride, 2 * blocks(count), left.tiles};
    products.pack_rows(some_rows(a, t, count), kLeft, some);
    multiply(products, some, right, plain(out + size_of(t) * size_of(columns), count, columns));
  }
}

// The tokens from `first` on of what run_layers keeps.
Operand active_of(uint16_t* active, int hidden, int first, int tokens) {
  const int tiles = depth_tiles(hidden);
  const size_t stride = size_of(tiles) * kTileNumbers;
  return {active + size_of(first / 16) * stride, stride, 2 * blocks(tokens), tiles};
}

// The tiles of depth that each input takes in the concatenation of all, and behind the last their number.
std::vector<int> places(const TwoLayers& layers) {
  std::vector<int> first{0};
  for (const Rows& x : layers.inputs) first.push_back(first.back() + depth_tiles(x.columns));
  return first;
}

constexpr size_t kPart = 16;

// Parts of what may be read and written in one place: compilers make vectors of loops over constant counts.
template <class Use>
void for_each_part(size_t size, const Use& use) {
  size_t begin = 0;
  for (; begin + kPart <= size; begin += kPart) use(begin, std::integral_constant<size_t, kPart>());
  if (begin < size) use(begin, size - begin);
}

// Newton-Schulz: x [rows, columns] towards the orthogonal matrix nearest to it, by polynomials of x x^T, or of
// x^T x where that is smaller.
void orthogonalize(const Bf16Products& products, Workspace& memory, const MuonStep& step, float* x, float* next) {
  constexpr float kA = 3.4445f, kB = -4.7750f, kC = 2.0315f;
  const bool tall = step.rows > step.columns;
  const int side = std::min(step.rows, step.columns);
  float* square = memory.floats(size_of(side) * size_of(side));
  float* polynomial = memory.floats(size_of(side) * size_of(side));
  // x, and x with its other dimension as depth: for one of x x^T and x^T x, and for the product with that.
  const Operand rows = memory.operand(step.rows, depth_tiles(step.columns));
  const Operand columns = memory.operand(step.columns, depth_tiles(step.rows));
  const Operand other = tall ? memory.operand(step.columns, columns.tiles) : memory.operand(step.rows, rows.tiles);
  const Operand left = memory.operand(side, depth_tiles(side)), right = memory.operand(side, depth_tiles(side));
  for (int i = 0; i < step.iterations; ++i) {
    products.pack_rows(floats_of(x, step.rows, step.columns), kLeft, rows);
    products.turn(rows, columns);  // a right operand
    products.mirror(tall ? columns : rows, other);
    multiply(products, tall ? other : rows, tall ? columns : other, plain(square, side, side));
    products.pack_rows(floats_of(square, side, side), kLeft, left);
    products.mirror(left, right);  // symmetric
    Results results = plain(polynomial, side, side);
    results.factor = kC;
    results.addend = square;
    results.addend_factor = kB;
    multiply(products, left, right, results);
    products.pack_rows(floats_of(polynomial, side, side), tall ? kRight : kLeft, tall ? right : left);
    results = plain(next, step.rows, step.columns);
    results.addend = x;
    results.addend_factor = kA;
    multiply(products, tall ? rows : left, tall ? right : columns, results);
    std::swap(x, next);
  }
}

}  // namespace

void multiply_rows(const Bf16Products& products, const Rows& a, const Rows& b, float* out) {
  Workspace& memory = Workspace::begin();
  multiply_in_parts(products, memory, a, rows_packed(products, memory, b, kRight), b.rows, out);
}

void multiply(const Bf16Products& products, const Rows& a, const Rows& b, float* out) {
  Workspace& memory = Workspace::begin();
  multiply_in_parts(products, memory, a, columns_packed(products, memory, b, kRight), b.columns, out);
}

void multiply_columns(const Bf16Products& products, const Rows& a, const Rows& b, float* out) {
  for (int t = 0; t < a.rows; t += kGradientTokens) {
    Workspace& memory = Workspace::begin();
    const int count = std::min(kGradientTokens, a.rows - t);
    const Operand left = columns_packed(products, memory, some_rows(a, t, count), kLeft);
    const Operand right = columns_packed(products, memory, some_rows(b, t, count), kRight);
    multiply(products, left, right, added(out, a.columns, b.columns, t > 0));
  }
}

size_t active_numbers(int tokens, int hidden) {
  return size_of(2 * blocks(tokens)) * size_of(depth_tiles(hidden)) * kTileNumbers;
}

void run_layers(const Bf16Products& products, const TwoLayers& layers, uint16_t* active, float* outputs) {
  Workspace& memory = Workspace::begin();
  const std::vector<int> place = places(layers);
  const int hidden = layers.hidden(), wide = layers.outputs();
  float* bias = memory.floats(size_of(blocks(hidden) * kBlock));
  std::fill_n(std::copy_n(layers.bias, hidden, bias), blocks(hidden) * kBlock - hidden, 0.0f);
  const Operand weights = memory.operand(hidden, place.back());
  for (size_t i = 0; i < layers.inputs.size(); ++i) {
    products.pack_rows(layers.weights[i], kRight, part_of_depth(weights, place[i], place[i + 1] - place[i]));
  }
  const Operand heads = rows_packed(products, memory, layers.heads, kRight);
  const bool skips = layers.skip.data != nullptr;
  const Operand skip = skips ? rows_packed(products, memory, layers.skip, kRight) : Operand{};
  const Operand inputs = memory.operand(kForwardTokens, place.back());
  for (int t = 0; t < layers.tokens(); t += kForwardTokens) {
    const int count = std::min(kForwardTokens, layers.tokens() - t);
    const Operand some{inputs.data, inputs.stride, 2 * blocks(count), inputs.tiles};
    for (size_t i = 0; i < layers.inputs.size(); ++i) {
      const Operand own = part_of_depth(some, place[i], place[i + 1] - place[i]);
      products.pack_rows(some_rows(layers.inputs[i], t, count), kLeft, own);
    }
    const Operand values = active_of(active, hidden, t, count);
    products.relu({some, weights}, bias, values);
    const Product sums[] = {{values, heads}, {part_of_depth(some, 0, place[1]), skip}};
    Results results = plain(outputs + size_of(t) * size_of(wide), count, wide);
    results.bias = layers.head_bias;
    products.multiply(sums, skips ? 2 : 1, results);
  }
}

void run_layers_gradient(const Bf16Products& products, const TwoLayers& layers, const uint16_t* active,
                         const float* cotangent, const LayerGradients& to) {
  Workspace& memory = Workspace::begin();
  const int hidden = layers.hidden(), wide = layers.outputs();
  const size_t inputs = layers.inputs.size();
  const bool skips = layers.skip.data != nullptr;
  const Operand heads = columns_packed(products, memory, layers.heads, kRight);
  std::vector<Operand> weights(inputs);
  for (size_t i = 0; i < inputs; ++i) {
    if (to.inputs[i]) weights[i] = columns_packed(products, memory, layers.weights[i], kRight);
  }
  const bool into_skip = skips && to.inputs[0];
  const Operand skip = into_skip ? columns_packed(products, memory, layers.skip, kRight) : Operand{};
  float* sums = memory.floats(size_of(blocks(hidden) * kBlock));
  std::fill_n(sums, blocks(hidden) * kBlock, 0.0f);
  std::fill_n(to.head_bias, wide, 0.0f);

  const int most = std::min(kGradientTokens, layers.tokens());
  const Operand outer = memory.operand(most, depth_tiles(wide)), inner = memory.operand(most, depth_tiles(hidden));
  const Operand outer_columns = memory.operand(wide, depth_tiles(most));
  const Operand inner_columns = memory.operand(hidden, depth_tiles(most));
  const Operand values = memory.operand(hidden, depth_tiles(most));
  std::vector<Operand> columns;
  for (const Rows& x : layers.inputs) columns.push_back(memory.operand(x.columns, depth_tiles(most)));

  for (int t = 0; t < layers.tokens(); t += kGradientTokens) {
    const int count = std::min(kGradientTokens, layers.tokens() - t);
    const auto of_rows = [count](Operand o) { return Operand{o.data, o.stride, 2 * blocks(count), o.tiles}; };
    const auto of_depth = [count](Operand o) { return part_of_depth(o, 0, depth_tiles(count)); };
    const Rows given = floats_of(cotangent + size_of(t) * size_of(wide), count, wide);
    const float* row = cotangent + size_of(t) * size_of(wide);
    for (int i = 0; i < count; ++i, row += wide) {
      for (int j = 0; j < wide; ++j) to.head_bias[j] += row[j];
    }
    products.pack_rows(given, kLeft, of_rows(outer));
    products.pack_columns(given, kLeft, of_depth(outer_columns));
    // Only read from.
    const Operand kept = active_of(const_cast<uint16_t*>(active), hidden, t, count);
    products.relu_gradient({of_rows(outer), heads}, kept, of_rows(inner), of_depth(inner_columns), sums);
    products.turn(kept, of_depth(values));
    const bool add = t > 0;
    multiply(products, of_depth(outer_columns), of_depth(values), added(to.heads, wide, hidden, add));
    for (size_t i = 0; i < inputs; ++i) {
      const int own = layers.inputs[i].columns;
      products.pack_columns(some_rows(layers.inputs[i], t, count), kRight, of_depth(columns[i]));
      multiply(products, of_depth(inner_columns), of_depth(columns[i]), added(to.weights[i], hidden, own, add));
      if (!to.inputs[i]) continue;
      const Product terms[] = {{of_rows(inner), weights[i]}, {of_rows(outer), skip}};
      const Results results = plain(to.inputs[i] + size_of(t) * size_of(own), count, own);
      products.multiply(terms, i == 0 && skips ? 2 : 1, results);
    }
    if (skips) {
      const Results results = added(to.skip, wide, layers.inputs[0].columns, add);
      multiply(products, of_depth(outer_columns), of_depth(columns[0]), results);
    }
  }
  std::copy_n(sums, hidden, to.bias);
}

void step_muon(const Bf16Products& products, const MuonStep& step, float rate, const float* gradient,
               const float* velocity, const float* weight, float* new_velocity, float* new_weight) {
  Workspace& memory = Workspace::begin();
  const size_t size = size_of(step.rows) * size_of(step.columns);
  float* update = memory.floats(size);
  float* next = memory.floats(size);
  const float kept = step.momentum, own = 1.0f - step.momentum;
  double squares = 0.0;
  for_each_part(size, [&](size_t begin, auto count) {
    float moved[kPart], squared[kPart];
    for (size_t i = 0; i < count; ++i) moved[i] = kept * velocity[begin + i] + own * gradient[begin + i];
    for (size_t i = 0; i < count; ++i) {
      new_velocity[begin + i] = moved[i];
      update[begin + i] = own * gradient[begin + i] + kept * moved[i];
      squared[i] = update[begin + i] * update[begin + i];
    }
    squares += static_cast<double>(std::accumulate(squared, squared + count, 0.0f));
  });
  const float scale = 1.0f / (static_cast<float>(std::sqrt(squares)) + 1e-7f);
  for (size_t i = 0; i < size; ++i) update[i] *= scale;
  orthogonalize(products, memory, step, update, next);
  const float* found = step.iterations % 2 == 0 ? update : next;
  const float tall = static_cast<float>(step.rows) / static_cast<float>(step.columns);
  const float factor = rate * std::sqrt(std::max(1.0f, tall));
  for_each_part(size, [&](size_t begin, auto count) {
    float moved[kPart];
    for (size_t i = 0; i < count; ++i) moved[i] = weight[begin + i] - factor * found[begin + i];
    std::copy_n(moved, count, new_weight + begin);
  });
}

}  // namespace mlx_od_moe
