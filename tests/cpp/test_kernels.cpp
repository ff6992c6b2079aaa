#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>

#include "mlx_od_moe/half.h"
#include "mlx_od_moe/kernels/select.h"
#include "reference.h"

using namespace mlx_od_moe;
using tests::UseKernel;

namespace {

template <class Test>
void for_each_kernel(const Test& test) {
  for (const std::string& name : kernels::available_kernels()) {
    CAPTURE(name);
    const UseKernel use(name);
    test(kernels::select_kernels());
  }
}

std::vector<int32_t> sorted_ids(const std::vector<float>& scores, int k) {
  std::vector<int32_t> ids(scores.size());
  std::iota(ids.begin(), ids.end(), 0);
  const auto rank = [&](int32_t i) {
    const float score = scores[static_cast<size_t>(i)];
    return std::isnan(score) ? std::pair(1, 0.0f) : std::pair(0, -score);
  };
  std::stable_sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) { return rank(a) < rank(b); });
  ids.resize(static_cast<size_t>(k));
  return ids;
}

}  // namespace

TEST_CASE("halves convert exactly, and round to nearest even") {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float value = half_to_float(half);
    if (std::isnan(value)) continue;
    CHECK(float_to_half(value) == half);
  }
  CHECK(float_to_half(1.0f + 0x1p-11f) == 0x3c00);  // a tie: to even
  CHECK(float_to_half(1.0f + 0x1.8p-10f) == 0x3c02);
  CHECK(float_to_half(65520.0f) == 0x7c00);
  CHECK(bfloat_to_float(float_to_bfloat(1.0f + 0x1p-8f)) == 1.0f);
  CHECK(std::isnan(bfloat_to_float(float_to_bfloat(std::numeric_limits<float>::quiet_NaN()))));
}

TEST_CASE("hidden states of every type are read exactly; only finite ones are accepted") {
  for_each_kernel([](const kernels::KernelSet& k) {
    std::vector<uint16_t> halves;
    std::vector<float> expected;
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
      const float value = half_to_float(static_cast<uint16_t>(bits));
      if (!std::isfinite(value)) continue;
      halves.push_back(static_cast<uint16_t>(bits));
      expected.push_back(value);
    }
    const int n = static_cast<int>(halves.size()) - 1;  // no multiple of a vector's width
    std::vector<float> out(halves.size());
    CHECK(k.to_float(halves.data(), kernels::kFloat16, n, out.data()));
    CHECK(std::memcmp(out.data(), expected.data(), static_cast<size_t>(n) * 4) == 0);

    const std::vector<uint16_t> bfloats = {0x3f80, 0xc000, 0x0001, 0x7f7f, 0x8000};
    CHECK(k.to_float(bfloats.data(), kernels::kBfloat16, 5, out.data()));
    for (size_t i = 0; i < 5; ++i) CHECK(out[i] == bfloat_to_float(bfloats[i]));

    for (const float bad : {NAN, INFINITY, -INFINITY}) {
      for (const int at : {0, 7, 32, 39}) {
        std::vector<float> x(40, 1.0f);
        x[static_cast<size_t>(at)] = bad;
        CHECK_FALSE(k.to_float(x.data(), kernels::kFloat32, 40, out.data()));
      }
    }
  });
}

TEST_CASE("top-k is the head of a stable sort, ties and NaN included") {
  for_each_kernel([](const kernels::KernelSet& k) {
    std::mt19937 generator(7);
    std::vector<int32_t> candidates(1000);
    for (int round = 0; round < 400; ++round) {
      const int n = 1 + static_cast<int>(generator() % 700);
      const int count = 1 + static_cast<int>(generator()) % std::min(n, kernels::kMaxTopK);
      std::vector<float> scores(static_cast<size_t>(n));
      const unsigned kinds = round % 4 == 0 ? 3 : 1000;  // many ties, or few
      for (float& s : scores) {
        s = static_cast<float>(generator() % kinds) - 1;
        if (round % 5 == 0 && generator() % 3 == 0) s = NAN;
        if (round % 7 == 0 && generator() % 9 == 0) s = generator() % 2 == 0 ? INFINITY : -INFINITY;
      }
      const int wanted = std::max(count, 1);
      std::vector<int32_t> ids(static_cast<size_t>(wanted));
      k.top_k(scores.data(), n, wanted, candidates.data(), ids.data());
      CAPTURE(n);
      CAPTURE(wanted);
      CHECK(ids == sorted_ids(scores, wanted));
    }
  });
}

TEST_CASE("activations and norms agree with float64") {
  for_each_kernel([](const kernels::KernelSet& k) {
    for (const int n : {1, 5, 31, 32, 33, 1000}) {
      std::mt19937 generator(static_cast<unsigned>(n));
      std::normal_distribution<float> distribution(0, 20);
      std::vector<float> x(static_cast<size_t>(n));
      for (float& v : x) v = distribution(generator);
      x[0] = n > 1 ? -200.0f : 200.0f;  // beyond the range of exp in float32
      std::vector<float> silu = x;
      std::vector<float> sigmoid = x;
      std::vector<float> norm = x;
      k.silu(silu.data(), n);
      k.sigmoid(sigmoid.data(), n);
      k.layer_norm(norm.data(), n, nullptr, nullptr, 1e-5f);
      const double mean = std::accumulate(x.begin(), x.end(), 0.0) / n;
      double variance = 0;
      for (const float v : x) variance += (v - mean) * (v - mean) / n;
      for (size_t i = 0; i < x.size(); ++i) {
        const double s = 1 / (1 + std::exp(-double{x[i]}));
        CHECK(sigmoid[i] == doctest::Approx(s).epsilon(1e-5));
        CHECK(std::abs(silu[i] - x[i] * s) <= 1e-5 * std::abs(x[i] * s) + 1e-30);
        CHECK(std::abs(norm[i] - (x[i] - mean) / std::sqrt(variance + 1e-5)) < 1e-4);
      }
    }
  });
}

TEST_CASE("softmax leaves a share to nothing, and none to what is unseen") {
  for_each_kernel([](const kernels::KernelSet& k) {
    for (const int n : {1, 5, 32, 33, 272}) {
      for (const float nothing : {-40.0f, 0.5f, 60.0f}) {
        std::mt19937 generator(static_cast<unsigned>(n));
        std::normal_distribution<float> distribution(0, 10);
        std::vector<float> x(static_cast<size_t>(n));
        for (float& v : x) v = generator() % 4 == 0 ? -1e9f : distribution(generator);
        double total = std::exp(double{nothing});
        for (const float v : x) total += std::exp(double{v});
        std::vector<float> found = x;
        k.softmax(found.data(), n, nothing);
        for (size_t i = 0; i < x.size(); ++i) {
          CHECK(std::abs(found[i] - std::exp(double{x[i]}) / total) <= 1e-5 * found[i] + 1e-37);
        }
      }
    }
  });
}

TEST_CASE("an unknown kernel is refused") {
  const UseKernel use("sse9");
  CHECK_THROWS_WITH_AS(kernels::select_kernels(), doctest::Contains("not 'sse9'"), std::invalid_argument);
}
