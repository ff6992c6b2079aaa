#include "mlx_od_moe/predictor.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <thread>

#include "mlx_od_moe/forward.h"
#include "reference.h"

using namespace mlx_od_moe;
using tests::RandomPredictor;
using tests::relative_error;
using tests::RouterOptions;
using tests::UseKernel;

namespace {

constexpr Format kFormats[] = {Format::f32, Format::f16, Format::bf16, Format::int8, Format::int4};

// What random weights lose at most, relative to the logits' norm.
double tolerance(Format format) {
  switch (format) {
    case Format::f32:
      return 1e-5;
    case Format::f16:
      return 2e-3;
    case Format::bf16:
      return 1e-2;
    case Format::int8:
      return 4e-2;
    default:
      return 0.3;
  }
}

PredictorConfig config(int hidden, int inner, int experts, int lookahead) {
  PredictorConfig c;
  c.hidden_size = hidden;
  c.predictor_size = inner;
  c.num_experts = experts;
  c.lookahead = lookahead;
  c.top_k = 1;
  return c;
}

Query query_of(const std::vector<float>& x, int tokens) {
  Query query;
  query.hidden = x.data();
  query.tokens = tokens;
  return query;
}

std::vector<float> logits(const Predictor& predictor, const Query& query) {
  const PredictorConfig& c = predictor.config();
  std::vector<float> out(static_cast<size_t>(query.tokens) * static_cast<size_t>(c.lookahead * c.num_experts));
  predictor.logits(query, out.data());
  return out;
}

// Every kernel and format against the reference.
void check_all(RandomPredictor& random, const Query& query) {
  const std::vector<double> expected = random.forward(query);
  for (const std::string& kernel : available_kernels()) {
    const UseKernel use(kernel);
    for (const Format format : kFormats) {
      const Predictor predictor(random.weights(), {format, 1, 64});
      CAPTURE(kernel);
      CAPTURE(format_name(format));
      CHECK(relative_error(logits(predictor, query), expected) < tolerance(format));
    }
  }
}

}  // namespace

TEST_CASE("every kernel and format computes the formula, at odd sizes and batches") {
  const int sizes[][4] = {{1, 1, 1, 1},     {3, 5, 7, 2},      {64, 16, 16, 1},
                          {100, 33, 60, 3}, {257, 129, 17, 4}, {512, 96, 40, 2}};
  for (const auto& s : sizes) {
    for (const int tokens : {1, 2, 3, 7, 65}) {
      RandomPredictor random(config(s[0], s[1], s[2], s[3]), static_cast<unsigned>(s[0] + tokens));
      const std::vector<float> x = random.values(static_cast<size_t>(s[0] * tokens), 1);
      CAPTURE(s[0]);
      CAPTURE(tokens);
      check_all(random, query_of(x, tokens));
    }
  }
}

TEST_CASE("a trunk of any rank takes part, beside routers, at odd sizes and batches") {
  const int sizes[][3] = {{1, 1, 1}, {100, 33, 5}, {64, 16, 64}, {257, 129, 70}, {300, 40, 513}};
  for (const auto& s : sizes) {
    for (const int tokens : {1, 3, 65}) {
      PredictorConfig c = config(s[0], s[1], 20, 2);
      c.trunk_rank = s[2];
      c.terms = {Term::mlp, Term::mlp_gate};
      RandomPredictor random(c, static_cast<unsigned>(s[2] + tokens));
      const std::vector<float> x = random.values(static_cast<size_t>(s[0] * tokens), 1);
      CAPTURE(s[2]);
      CAPTURE(tokens);
      check_all(random, query_of(x, tokens));
    }
  }
}

TEST_CASE("layer norm, relu, previous experts and context take part") {
  PredictorConfig c = config(96, 48, 20, 3);
  c.layer_norm = true;
  c.activation = Activation::relu;
  c.previous_experts = true;
  RandomPredictor random(c, 3);
  const std::vector<float> x = random.values(96 * 4, 1);
  const std::vector<float> context = random.values(48 * 4, 1);
  std::vector<int32_t> previous;
  for (int i = 0; i < 4 * 3 * 2; ++i) previous.push_back(i % 5 == 0 ? -1 : i * 7 % 20);
  Query query = query_of(x, 4);
  query.previous = previous.data();
  query.num_previous = 2;
  query.context = context.data();
  check_all(random, query);
}

TEST_CASE("routers look ahead, with every scoring") {
  const RouterOptions options[] = {{},
                                   {Scoring::softmax, true, false, 1, 1},
                                   {Scoring::sigmoid, false, true, 1, 1},
                                   {Scoring::sigmoid, true, true, 4, 2}};
  for (const RouterOptions& option : options) {
    PredictorConfig c = config(128, 32, 24, 3);
    c.terms = {Term::mlp, Term::mlp_gate, Term::gate};
    RandomPredictor random(c, 5, option);
    const std::vector<float> x = random.values(128 * 3, 1);
    check_all(random, query_of(x, 3));
    c.terms = {Term::gate, Term::gate, Term::gate};
    RandomPredictor gates(c, 6, option);
    check_all(gates, query_of(x, 3));
  }
}

TEST_CASE("a calibration moves the boundary to 0 and changes no ranking") {
  for (const int top_k : {1, 6, 8, 31, 33, 59}) {
    PredictorConfig c = config(100, 33, 60, 3);
    c.top_k = top_k;
    c.terms = {Term::mlp, Term::mlp_gate, Term::gate};
    RandomPredictor random(c, static_cast<unsigned>(top_k));
    const std::vector<float> numbers = {1.25f, -0.5f, 0.75f, 0.25f, 1.5f, 0.0f};
    PredictorWeights weights = random.weights();
    weights.calibration = {numbers.data(), DType::float32, 3, 2};
    const std::vector<float> x = random.values(100 * 67, 1);
    const Query query = query_of(x, 67);
    std::vector<double> expected = random.forward(query);
    const int half = std::min(std::max(1, top_k / 2), 60 - top_k);
    for (size_t row = 0; row < 67 * 3; ++row) {
      double* z = expected.data() + row * 60;
      std::vector<double> sorted(z, z + 60);
      std::sort(sorted.rbegin(), sorted.rend());
      const double sum = std::accumulate(sorted.begin() + top_k - half, sorted.begin() + top_k + half, 0.0);
      for (size_t e = 0; e < 60; ++e) {
        z[e] = numbers[row % 3 * 2] * (z[e] - sum / (2 * half)) + numbers[row % 3 * 2 + 1];
      }
    }
    for (const std::string& kernel : available_kernels()) {
      const UseKernel use(kernel);
      for (const Format format : kFormats) {
        const Predictor plain(random.weights(), {format, 1, 64});
        const Predictor predictor(weights, {format, 2, 64});
        CAPTURE(top_k);
        CAPTURE(kernel);
        CAPTURE(format_name(format));
        CHECK(relative_error(logits(predictor, query), expected) < tolerance(format));
        std::vector<int32_t> ids(67 * 3 * 20);
        std::vector<int32_t> same(ids.size());
        predictor.predict(query, 20, ids.data());
        plain.predict(query, 20, same.data());
        CHECK(ids == same);
      }
    }
  }
}

TEST_CASE("calibrations that are none are refused with the rule and the value") {
  PredictorConfig c = config(64, 16, 40, 2);
  c.top_k = 8;
  RandomPredictor random(c, 29);
  std::vector<float> numbers = {1, 0, 2, -1};
  PredictorWeights bad = random.weights();
  const auto refused = [&](const char* reason) {
    CHECK_THROWS_WITH_AS(Predictor{bad}, doctest::Contains(reason), std::invalid_argument);
  };
  bad.calibration = {numbers.data(), DType::float32, 1, 2};
  refused("calibration must be floats [2, 2], but is [1, 2]");
  bad.calibration = {numbers.data(), DType::uint32, 2, 2};
  refused("calibration must be floats [2, 2]");
  bad.calibration = {numbers.data(), DType::float32, 2, 2};
  numbers[2] = 0;
  refused("got 0.000000 and -1.000000 at distance 2");
  numbers[2] = INFINITY;
  refused("both finite, got inf");
  numbers = {1, NAN, 2, -1};
  refused("at distance 1");
  numbers[1] = 0;
  CHECK_NOTHROW(Predictor{bad});
  bad.config.top_k = 40;
  refused("top_k must be below num_experts (40), got 40");
}

TEST_CASE("int4 with groups of 32 and 128") {
  RandomPredictor random(config(200, 130, 12, 2), 9);
  const std::vector<float> x = random.values(200 * 5, 1);
  const Query query = query_of(x, 5);
  for (const std::string& kernel : available_kernels()) {
    const UseKernel use(kernel);
    for (const int group : {32, 128}) {
      const Predictor predictor(random.weights(), {Format::int4, 1, group});
      CHECK(relative_error(logits(predictor, query), random.forward(query)) < tolerance(Format::int4));
    }
  }
}

TEST_CASE("every thread count gives the same bits, to concurrent callers too") {
  PredictorConfig c = config(1024, 512, 96, 4);
  c.terms = {Term::mlp, Term::mlp_gate, Term::mlp, Term::gate};
  RandomPredictor random(c, 11);
  const std::vector<float> x = random.values(1024 * 9, 1);
  const Query query = query_of(x, 9);
  for (const Format format : {Format::f32, Format::int4}) {
    const std::vector<float> expected = logits(Predictor(random.weights(), {format, 1, 64}), query);
    for (const int threads : {2, 3, 5}) {
      const Predictor predictor(random.weights(), {format, threads, 64});
      std::vector<std::thread> callers;
      std::vector<int> wrong(3, 0);
      for (size_t caller = 0; caller < wrong.size(); ++caller) {
        callers.emplace_back([&, caller] {
          for (int i = 0; i < 20; ++i) wrong[caller] += logits(predictor, query) != expected;
        });
      }
      for (std::thread& caller : callers) caller.join();
      CHECK(wrong == std::vector<int>(3, 0));
    }
  }
}

TEST_CASE("a token's logits do not depend on its batch") {
  RandomPredictor random(config(320, 64, 30, 2), 13);
  const std::vector<float> x = random.values(320 * 70, 1);
  for (const Format format : kFormats) {
    const Predictor predictor(random.weights(), {format, 1, 64});
    const std::vector<float> all = logits(predictor, query_of(x, 70));
    for (const size_t token : {0, 3, 64, 69}) {
      Query one = query_of(x, 1);
      one.hidden = x.data() + token * 320;
      const std::vector<float> alone = logits(predictor, one);
      const std::vector<double> within(all.begin() + static_cast<std::ptrdiff_t>(token * 60),
                                       all.begin() + static_cast<std::ptrdiff_t>((token + 1) * 60));
      CHECK(relative_error(alone, within) < 1e-5);
    }
  }
}

TEST_CASE("predictors packed together share routers and give the same logits") {
  PredictorConfig c = config(128, 32, 24, 2);
  c.terms = {Term::mlp_gate, Term::gate};
  RandomPredictor first(c, 17);
  RandomPredictor second(c, 18);
  PredictorWeights sharing = second.weights();
  sharing.routers[0] = first.weights().routers[1];
  const std::vector<Predictor> packed = Predictor::pack({first.weights(), sharing}, {Format::int8, 2, 64});
  const std::vector<float> x = first.values(128, 1);
  CHECK(logits(packed[0], query_of(x, 1)) == logits(Predictor(first.weights(), {Format::int8, 1, 64}), query_of(x, 1)));
  CHECK(logits(packed[1], query_of(x, 1)) == logits(Predictor(sharing, {Format::int8, 1, 64}), query_of(x, 1)));
}

TEST_CASE("predictors packed together share a projection: one copy, the same logits") {
  PredictorConfig c = config(128, 32, 24, 2);
  c.trunk_rank = 48;
  RandomPredictor first(c, 31);
  RandomPredictor second(c, 32);
  PredictorWeights sharing = second.weights();
  sharing.projection = first.weights().projection;
  for (const Format format : kFormats) {
    const PredictorOptions options{format, 2, 64};
    const std::vector<Predictor> packed = Predictor::pack({first.weights(), sharing, second.weights()}, options);
    const auto projection = [&](size_t i) { return packed[i].packed().projection.panels.data; };
    CHECK(projection(0) == projection(1));
    CHECK(projection(0) != projection(2));
    CHECK(packed[1].projection_bytes() > 0);
    CHECK(packed[1].projection_bytes() < packed[1].weight_bytes());
    const std::vector<float> x = first.values(128, 1);
    CHECK(logits(packed[1], query_of(x, 1)) == logits(Predictor(sharing, options), query_of(x, 1)));
    CHECK(logits(packed[1], query_of(x, 1)) != logits(packed[2], query_of(x, 1)));
  }
}

TEST_CASE("bad queries and weights are refused with the rule and the value") {
  RandomPredictor random(config(64, 16, 40, 2), 19);
  const Predictor predictor(random.weights());
  std::vector<float> x(64, 1);
  std::vector<int32_t> ids(80);
  CHECK_THROWS_WITH_AS(predictor.predict(query_of(x, 1), 33, ids.data()),
                       doctest::Contains("k must be 1 ... 32, got 33"), std::invalid_argument);
  CHECK_THROWS_AS(predictor.predict(query_of(x, 1), 0, ids.data()), std::invalid_argument);
  x[5] = NAN;
  CHECK_THROWS_WITH_AS(predictor.predict(query_of(x, 1), 4, ids.data()), doctest::Contains("token 0 is not finite"),
                       std::invalid_argument);
  PredictorWeights bad = random.weights();
  bad.trunk.weight.columns = 63;
  CHECK_THROWS_WITH_AS(Predictor{bad}, doctest::Contains("trunk.weight must be [16, 64], but is [16, 63]"),
                       std::invalid_argument);
  bad = random.weights();
  bad.config.trunk_rank = 8;
  CHECK_THROWS_WITH_AS(Predictor{bad}, doctest::Contains("projection.linear.weight is missing"), std::invalid_argument);
  bad.projection = random.weights().trunk;
  CHECK_THROWS_WITH_AS(Predictor{bad}, doctest::Contains("projection.linear.weight must be [8, 64], but is [16, 64]"),
                       std::invalid_argument);
  bad.config.trunk_rank = -1;
  CHECK_THROWS_WITH_AS(Predictor{bad}, doctest::Contains("trunk_rank must be 0"), std::invalid_argument);
  CHECK_THROWS_AS(Predictor(random.weights(), {Format::int4, 0, 64}), std::invalid_argument);
  CHECK_THROWS_AS(Predictor(random.weights(), {Format::int4, 1, 48}), std::invalid_argument);
  CHECK_THROWS_WITH_AS(parse_format("int3"), doctest::Contains("not 'int3'"), std::invalid_argument);
}

TEST_CASE("huge but finite states give ids in range") {
  RandomPredictor random(config(64, 16, 40, 2), 23);
  const std::vector<float> x(64, 3e38f);
  for (const Format format : kFormats) {
    const Predictor predictor(random.weights(), {format, 1, 64});
    std::vector<int32_t> ids(16, -1);
    predictor.predict(query_of(x, 1), 8, ids.data());
    for (const int32_t id : ids) CHECK((id >= 0 && id < 40));
  }
}
