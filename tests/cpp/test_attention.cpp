#include <doctest/doctest.h>

#include <cmath>
#include <random>
#include <vector>

#include "mlx_od_moe/kernels/select.h"
#include "reference.h"

using namespace mlx_od_moe;
using tests::UseKernel;

namespace {

using Doubles = std::vector<double>;

// One head's inputs in strides wider than its own, with the definition in float64.
struct Head {
  int window, key_size, tokens;
  Doubles query, memory, bias, cotangent;
  std::vector<int32_t> sequence;

  Head(int window_, int key_size_, int tokens_) : window(window_), key_size(key_size_), tokens(tokens_) {
    std::mt19937 generator(1);
    std::normal_distribution<float> normal;
    const auto fill = [&](Doubles& values, int n) {
      for (int i = 0; i < n; ++i) values.push_back(static_cast<double>(normal(generator)));
    };
    fill(query, tokens * query_stride());
    fill(memory, (window + tokens) * memory_stride());
    fill(bias, window + 1);
    fill(cotangent, tokens * key_size);
    for (int row = 0; row < window + tokens; ++row) sequence.push_back(row < window / 2 ? -1 : row / 9);
  }

  int query_stride() const { return key_size + 3; }
  int memory_stride() const { return 2 * key_size + 5; }

  Doubles attended() const {
    Doubles out;
    for (int t = 0; t < tokens; ++t) {
      Doubles values(static_cast<size_t>(key_size));
      double sum = std::exp(bias[0]);
      for (int age = 1; age <= window; ++age) {
        const int row = window + t - age;
        if (sequence[static_cast<size_t>(row)] != sequence[static_cast<size_t>(window + t)]) continue;
        double score = 0;
        const double* key = &memory[static_cast<size_t>(row * memory_stride())];
        for (int c = 0; c < key_size; ++c) score += query[static_cast<size_t>(t * query_stride() + c)] * key[c];
        const double weight = std::exp(score / std::sqrt(key_size) + bias[static_cast<size_t>(age)]);
        sum += weight;
        for (int c = 0; c < key_size; ++c) values[static_cast<size_t>(c)] += weight * key[key_size + c];
      }
      for (const double value : values) out.push_back(value / sum);
    }
    return out;
  }

  double loss() const {
    const Doubles out = attended();
    double sum = 0;
    for (size_t i = 0; i < out.size(); ++i) sum += out[i] * cotangent[i];
    return sum;
  }

  // By central differences.
  Doubles gradient(Doubles Head::* of) {
    Doubles found;
    for (double& x : this->*of) {
      const double before = x, step = 1e-6;
      x = before + step;
      const double up = loss();
      x = before - step;
      found.push_back((up - loss()) / (2 * step));
      x = before;
    }
    return found;
  }
};

std::vector<float> floats(const Doubles& values) { return {values.begin(), values.end()}; }

void check_near(const std::vector<float>& found, const Doubles& expected) {
  REQUIRE(found.size() == expected.size());
  for (size_t i = 0; i < found.size(); ++i) CHECK(std::abs(static_cast<double>(found[i]) - expected[i]) < 2e-5);
}

}  // namespace

TEST_CASE("attention over a window and its gradients are their definitions") {
  for (const auto& [window, key_size, tokens] : {std::tuple(5, 7, 1), {1, 3, 20}, {8, 16, 35}, {24, 65, 16}}) {
    CAPTURE(window);
    Head head(window, key_size, tokens);
    const std::vector<float> query = floats(head.query), memory = floats(head.memory), bias = floats(head.bias);
    const std::vector<float> cotangent = floats(head.cotangent);
    const Doubles expected = head.attended(), query_gradient = head.gradient(&Head::query),
                  memory_gradient = head.gradient(&Head::memory), bias_gradient = head.gradient(&Head::bias);
    for (const std::string& name : kernels::available_kernels()) {
      CAPTURE(name);
      const UseKernel use(name);
      const kernels::KernelSet& k = kernels::select_kernels();
      std::vector<float> scratch(kernels::attention_scratch(window, key_size));
      const kernels::WindowAttention attention{window,
                                               key_size,
                                               tokens,
                                               query.data(),
                                               static_cast<size_t>(head.query_stride()),
                                               memory.data(),
                                               memory.data() + key_size,
                                               static_cast<size_t>(head.memory_stride()),
                                               head.sequence.data(),
                                               bias.data(),
                                               scratch.data()};
      std::vector<float> out(expected.size());
      k.attend(attention, out.data(), static_cast<size_t>(key_size));
      check_near(out, expected);

      std::vector<float> to_query(query.size()), to_memory(memory.size()), to_bias(bias.size());
      k.attend_gradient(attention, cotangent.data(), static_cast<size_t>(key_size),
                        {to_query.data(), to_memory.data(), to_memory.data() + key_size, to_bias.data()});
      check_near(to_query, query_gradient);
      check_near(to_memory, memory_gradient);
      check_near(to_bias, bias_gradient);
    }
  }
}
