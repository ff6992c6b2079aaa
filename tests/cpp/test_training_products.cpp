#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "mlx_od_moe/kernels/select.h"
#include "mlx_od_moe/training_products.h"
#include "reference.h"

using namespace mlx_od_moe;
using tests::UseKernel;

namespace {

using Floats = std::vector<float>;

size_t size_of(int n) { return static_cast<size_t>(n); }

// Halves of small integers: bfloat16 and sums of them in float32 are exact.
Floats halves(int rows, int columns, unsigned seed) {
  std::mt19937 generator(seed);
  std::uniform_int_distribution<int> number(-2, 2);
  Floats values(size_of(rows) * size_of(columns));
  for (float& value : values) value = 0.5f * static_cast<float>(number(generator));
  return values;
}

Rows rows_of(const Floats& x, int rows, int columns) {
  return {x.data(), kernels::kFloat32, size_of(columns), rows, columns};
}

// a [n, k] b [m, k]^T
Floats product(const Floats& a, const Floats& b, int n, int m, int k) {
  Floats out(size_of(n) * size_of(m));
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < m; ++j) {
      float sum = 0.0f;
      for (int l = 0; l < k; ++l) sum += a[size_of(i * k + l)] * b[size_of(j * k + l)];
      out[size_of(i * m + j)] = sum;
    }
  }
  return out;
}

Floats transposed(const Floats& x, int rows, int columns) {
  Floats out(x.size());
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) out[size_of(j * rows + i)] = x[size_of(i * columns + j)];
  }
  return out;
}

template <class Use>
void with_each_products(const Use& use) {
  for (const std::string& name : kernels::available_kernels()) {
    const UseKernel kernel(name);
    const Bf16Products* products = kernels::select_kernels().products;
    CAPTURE(name);
    if (products != nullptr) use(*products);
  }
}

}  // namespace

TEST_CASE("three kinds of product are exact where bfloat16 is, for any size") {
  struct Sizes {
    int n, m, k;
  };
  for (const auto& [n, m, k] : {Sizes{1, 1, 1}, Sizes{5, 3, 7}, Sizes{33, 65, 31}, Sizes{300, 17, 100},
                                Sizes{16, 16, 32}, Sizes{1100, 40, 33}}) {
    CAPTURE(n);
    const Floats a = halves(n, k, 1), b = halves(m, k, 2), expected = product(a, b, n, m, k);
    with_each_products([&, n = n, m = m, k = k](const Bf16Products& products) {
      Floats found(expected.size(), NAN);
      multiply_rows(products, rows_of(a, n, k), rows_of(b, m, k), found.data());
      CHECK(found == expected);
      std::ranges::fill(found, NAN);
      const Floats across = transposed(b, m, k);
      multiply(products, rows_of(a, n, k), rows_of(across, k, m), found.data());
      CHECK(found == expected);
      std::ranges::fill(found, NAN);
      const Floats down = transposed(a, n, k);
      multiply_columns(products, rows_of(down, k, n), rows_of(across, k, m), found.data());
      CHECK(found == expected);
    });
  }
}

TEST_CASE("two layers and their gradient are exact where bfloat16 is, for any number of tokens") {
  constexpr int kHidden = 37, kOutputs = 19, kWide[] = {9, 33};
  for (const int tokens : {1, 31, 70, 1030}) {
    CAPTURE(tokens);
    const Floats x[] = {halves(tokens, kWide[0], 1), halves(tokens, kWide[1], 2)};
    const Floats weights[] = {halves(kHidden, kWide[0], 3), halves(kHidden, kWide[1], 4)};
    const Floats heads = halves(kOutputs, kHidden, 5), skip = halves(kOutputs, kWide[0], 6);
    const Floats head_bias = halves(1, kOutputs, 7), bias(kHidden, 0.125f);  // no value is zero
    const Floats cotangent = halves(tokens, kOutputs, 8);

    Floats hidden = product(x[0], weights[0], tokens, kHidden, kWide[0]);
    const Floats second = product(x[1], weights[1], tokens, kHidden, kWide[1]);
    for (size_t i = 0; i < hidden.size(); ++i) hidden[i] = std::max(0.0f, hidden[i] + second[i] + 0.125f);
    Floats outputs = product(hidden, heads, tokens, kOutputs, kHidden);
    const Floats skipped = product(x[0], skip, tokens, kOutputs, kWide[0]);
    for (size_t i = 0; i < outputs.size(); ++i) outputs[i] += skipped[i] + head_bias[i % kOutputs];
    Floats inner = product(cotangent, transposed(heads, kOutputs, kHidden), tokens, kHidden, kOutputs);
    for (size_t i = 0; i < inner.size(); ++i) inner[i] = hidden[i] > 0.0f ? inner[i] : 0.0f;

    TwoLayers layers{{rows_of(x[0], tokens, kWide[0]), rows_of(x[1], tokens, kWide[1])},
                     {rows_of(weights[0], kHidden, kWide[0]), rows_of(weights[1], kHidden, kWide[1])},
                     bias.data(),
                     rows_of(heads, kOutputs, kHidden),
                     head_bias.data(),
                     rows_of(skip, kOutputs, kWide[0])};
    with_each_products([&](const Bf16Products& products) {
      std::vector<uint16_t> active(active_numbers(tokens, kHidden));
      Floats found(outputs.size(), NAN);
      run_layers(products, layers, active.data(), found.data());
      CHECK(found == outputs);

      Floats dx(x[0].size(), NAN), dw0(weights[0].size(), NAN), dw1(weights[1].size(), NAN), dbias(kHidden, NAN);
      Floats dheads(heads.size(), NAN), dhead_bias(kOutputs, NAN), dskip(skip.size(), NAN);
      run_layers_gradient(products, layers, active.data(), cotangent.data(),
                          {{dx.data(), nullptr},
                           {dw0.data(), dw1.data()},
                           dbias.data(),
                           dheads.data(),
                           dhead_bias.data(),
                           dskip.data()});
      const Floats rows = transposed(inner, tokens, kHidden), given = transposed(cotangent, tokens, kOutputs);
      const Floats inputs = transposed(x[0], tokens, kWide[0]);
      CHECK(dw0 == product(rows, inputs, kHidden, kWide[0], tokens));
      CHECK(dw1 == product(rows, transposed(x[1], tokens, kWide[1]), kHidden, kWide[1], tokens));
      CHECK(dheads == product(given, transposed(hidden, tokens, kHidden), kOutputs, kHidden, tokens));
      CHECK(dskip == product(given, inputs, kOutputs, kWide[0], tokens));
      CHECK(dbias == product(rows, Floats(size_of(tokens), 1.0f), kHidden, 1, tokens));
      CHECK(dhead_bias == product(given, Floats(size_of(tokens), 1.0f), kOutputs, 1, tokens));
      Floats expected = product(inner, transposed(weights[0], kHidden, kWide[0]), tokens, kWide[0], kHidden);
      const Floats through = product(cotangent, transposed(skip, kOutputs, kWide[0]), tokens, kWide[0], kOutputs);
      for (size_t i = 0; i < expected.size(); ++i) expected[i] += through[i];
      CHECK(dx == expected);
    });
  }
}

TEST_CASE("Muon's step makes singular values alike, in place too") {
  for (const auto& [rows, columns] : {std::pair{40, 90}, {90, 40}, {33, 33}, {1, 7}}) {
    CAPTURE(rows);
    const size_t size = size_of(rows) * size_of(columns);
    Floats gradient(size);
    std::mt19937 generator(1);
    std::normal_distribution<float> normal;
    for (float& value : gradient) value = normal(generator);
    with_each_products([&, rows = rows, columns = columns](const Bf16Products& products) {
      Floats velocity(size, 0.0f), weight(size, 0.0f), new_velocity(size), new_weight(size);
      step_muon(products, {rows, columns, 0.95f, 5}, 1.0f, gradient.data(), velocity.data(), weight.data(),
                new_velocity.data(), new_weight.data());
      for (size_t i = 0; i < size; ++i) CHECK(new_velocity[i] == doctest::Approx(0.05 * gradient[i]));
      double squares = 0.0;
      for (const float value : new_weight) squares += static_cast<double>(value) * static_cast<double>(value);
      const double tall = std::max(1.0, static_cast<double>(rows) / columns);
      const double mean = std::sqrt(squares / tall / std::min(rows, columns));  // of the singular values
      CHECK(mean > 0.6);
      CHECK(mean < 1.25);
      step_muon(products, {rows, columns, 0.95f, 5}, 1.0f, gradient.data(), velocity.data(), weight.data(),
                velocity.data(), weight.data());
      CHECK(velocity == new_velocity);
      CHECK(weight == new_weight);
    });
  }
}
