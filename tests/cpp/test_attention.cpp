#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <tuple>
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

  // To numbers that bfloat16 holds.
  void round() {
    for (Doubles* values : {&query, &memory, &cotangent}) {
      for (double& x : *values) x = std::round(x * 16) / 16;
    }
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

template <class T>
T* on_line(T* memory) {
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
}

std::vector<float> floats(const Doubles& values) { return {values.begin(), values.end()}; }

void check_near(const std::vector<float>& found, const Doubles& expected, double tolerance) {
  REQUIRE(found.size() == expected.size());
  for (size_t i = 0; i < found.size(); ++i) CHECK(std::abs(static_cast<double>(found[i]) - expected[i]) < tolerance);
}

struct Expected {
  Doubles attended, query, memory, bias;

  explicit Expected(Head& head)
      : attended(head.attended()),
        query(head.gradient(&Head::query)),
        memory(head.gradient(&Head::memory)),
        bias(head.gradient(&Head::bias)) {}
};

void check(const kernels::Bf16Attention& functions, const Head& head, const Expected& expected, double tolerance) {
  const std::vector<float> query = floats(head.query), memory = floats(head.memory), bias = floats(head.bias);
  const std::vector<float> cotangent = floats(head.cotangent);
  // Nothing may depend on what the memory held.
  std::vector<float> scratch(kernels::attention_scratch(head.window, head.key_size) + 16, NAN);
  std::vector<uint16_t> packed(kernels::attention_packed(head.window, head.key_size, head.tokens) + 32, 0x7fc0);
  const kernels::WindowAttention attention{head.window,
                                           head.key_size,
                                           head.tokens,
                                           query.data(),
                                           static_cast<size_t>(head.query_stride()),
                                           memory.data(),
                                           memory.data() + head.key_size,
                                           static_cast<size_t>(head.memory_stride()),
                                           head.sequence.data(),
                                           bias.data(),
                                           on_line(scratch.data()),
                                           on_line(packed.data())};
  const size_t stride = static_cast<size_t>(head.key_size);
  std::vector<float> out(expected.attended.size());
  functions.attend(attention, out.data(), stride);
  check_near(out, expected.attended, tolerance);

  std::vector<float> to_query(query.size()), to_memory(memory.size()), to_bias(bias.size());
  functions.gradient(attention, cotangent.data(), stride,
                     {to_query.data(), to_memory.data(), to_memory.data() + head.key_size, to_bias.data()});
  check_near(to_query, expected.query, tolerance);
  check_near(to_memory, expected.memory, tolerance);
  check_near(to_bias, expected.bias, tolerance);
}

}  // namespace

TEST_CASE("attention over a window and its gradients are their definitions") {
  for (const auto& [window, key_size, tokens] :
       {std::tuple(5, 7, 1), {1, 3, 20}, {8, 16, 35}, {24, 65, 16}, {17, 32, 33}}) {
    CAPTURE(window);
    Head head(window, key_size, tokens);
    Head rounded = head;  // the only products of rounded numbers are those of shares and their gradients
    rounded.round();
    const Expected expected(head), expected_rounded(rounded);
    for (const std::string& name : kernels::available_kernels()) {
      CAPTURE(name);
      const UseKernel use(name);
      const kernels::KernelSet& k = kernels::select_kernels();
      check({k.attend, k.attend_gradient}, head, expected, 2e-5);
      if (k.bf16_attention != nullptr) check(*k.bf16_attention, rounded, expected_rounded, 0.03);
    }
  }
}
