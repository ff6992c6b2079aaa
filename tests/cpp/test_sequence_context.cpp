#include "mlx_od_moe/sequence_context.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <thread>

#include "mlx_od_moe/context_memory.h"
#include "random_bundle.h"

using namespace mlx_od_moe;
using tests::RandomBundle;
using tests::relative_error;
using tests::UseKernel;

namespace {

constexpr Format kFormats[] = {Format::f32, Format::f16, Format::bf16, Format::int8, Format::int4};

double tolerance(Format format) {
  constexpr double kTolerances[] = {1e-5, 4e-3, 2e-2, 5e-2, 0.3};
  return kTolerances[static_cast<int>(format)];
}

PredictorConfig config(int hidden, int inner, const ContextConfig& context) {
  PredictorConfig c;
  c.hidden_size = hidden;
  c.predictor_size = inner;
  c.context = context;
  return c;
}

Query part(const RandomBundle& bundle, const std::vector<float>& states, int first, int tokens) {
  Query query;
  query.hidden = states.data() + first * bundle.config().hidden_size;
  query.tokens = tokens;
  return query;
}

std::vector<float> logits(const Predictor& predictor, Query query, const SequenceContext& context) {
  const PredictorConfig& c = predictor.config();
  std::vector<float> out(static_cast<size_t>(query.tokens * c.lookahead * c.num_experts));
  query.sequence = &context;
  predictor.logits(query, out.data());
  return out;
}

void observe(const RandomBundle& bundle, const RandomBundle::States& states, int first, int tokens,
             SequenceContext& context) {
  for (int layer : bundle.layers) context.observe(layer, part(bundle, states.at(layer), first, tokens));
}

// Token by token through all layers; the error of each layer's logits over all tokens.
void check_decoding(const RandomBundle& bundle, const std::map<int, Predictor>& predictors,
                    const RandomBundle::States& states, int tokens, double largest) {
  SequenceContext context(predictors);
  const ContextConfig& sizes = bundle.config().context;
  const bool asks = sizes.window > 0 && sizes.early_query;
  for (const auto& [layer, predictor] : predictors) CHECK(context.remembers(layer) == (layer != 1 || asks));
  std::map<int, std::vector<float>> found;
  std::map<int, std::vector<double>> expected;
  for (int i = 0; i < tokens; ++i) {
    for (int layer : bundle.layers) {
      const Query query = part(bundle, states.at(layer), i, 1);
      if (const auto predictor = predictors.find(layer); predictor != predictors.end()) {
        const std::vector<float> out = logits(predictor->second, query, context);
        found[layer].insert(found[layer].end(), out.begin(), out.end());
        const std::vector<double> reference = bundle.logits(layer, states, i);
        expected[layer].insert(expected[layer].end(), reference.begin(), reference.end());
      }
      context.observe(layer, query);
    }
  }
  CHECK(context.length() == tokens);
  for (const auto& [layer, out] : found) {
    CAPTURE(layer);
    CHECK(relative_error(out, expected[layer]) < largest);
  }
}

}  // namespace

TEST_CASE("every kernel and format reads the context as the formula does, past the ring's end") {
  const ContextConfig sizes[] = {{5, 3, 0}, {0, 0, 2}, {20, 17, 7}, {20, 17, 7, false}, {48, 33, 64}};
  for (const ContextConfig& context : sizes) {
    RandomBundle bundle(config(70, 24, context), 2, 1);
    const RandomBundle::States states = bundle.states(80);
    for (const std::string& kernel : available_kernels()) {
      const UseKernel use(kernel);
      for (const Format format : kFormats) {
        CAPTURE(kernel);
        CAPTURE(format_name(format));
        CAPTURE(context.window);
        check_decoding(bundle, bundle.pack({format, 1, 64}), states, 80, tolerance(format));
      }
    }
  }
}

TEST_CASE("rows have each its own context, by every kernel and in every format") {
  RandomBundle bundle(config(70, 24, {20, 17, 7, false}), 2, 1);
  const RandomBundle::States states = bundle.states(100);
  constexpr int kSequences = 10;
  for (const std::string& kernel : available_kernels()) {
    const UseKernel use(kernel);
    for (const Format format : kFormats) {
      CAPTURE(kernel);
      CAPTURE(format_name(format));
      const std::map<int, Predictor> predictors = bundle.pack({format, 1, 64});
      // Texts of 0, 5, 10 ... tokens; the last ones are longer than a window.
      std::vector<SequenceContext> contexts(kSequences, SequenceContext(predictors));
      for (int s = 0; s < kSequences; ++s) observe(bundle, states, s, 5 * s, contexts[static_cast<size_t>(s)]);
      for (const auto& [layer, predictor] : predictors) {
        std::vector<QueryRow> rows;
        std::vector<float> alone;
        for (int t = 0; t < 100; ++t) {  // more than a pass over the weights takes
          const SequenceContext& context = contexts[static_cast<size_t>(t % kSequences)];
          const int64_t length = 5 * (t % kSequences);
          rows.push_back({t % 11 == 0 ? nullptr : &context, t % 3 == 0 ? -1 : length + t % 4});
          Query one = part(bundle, states.at(layer), t, 1);
          one.position = rows.back().position;
          std::vector<float> out(static_cast<size_t>(predictor.config().lookahead * predictor.config().num_experts));
          one.sequence = rows.back().sequence;
          predictor.logits(one, out.data());
          alone.insert(alone.end(), out.begin(), out.end());
        }
        Query batch = part(bundle, states.at(layer), 0, 100);
        batch.rows = rows.data();
        std::vector<float> together(alone.size());
        predictor.logits(batch, together.data());
        CHECK(relative_error(together, {alone.begin(), alone.end()}) < 1e-5);
      }
    }
  }
}

TEST_CASE("what no slot can say comes from nothing: zeros") {
  RandomBundle bundle(config(32, 16, {8, 4, 2}), 2, 3);
  const std::map<int, Predictor> predictors = bundle.pack({Format::f32, 1, 64});
  const RandomBundle::States states = bundle.states(3);
  const SequenceContext empty(predictors);
  for (const auto& [layer, predictor] : predictors) {
    const Query query = part(bundle, states.at(layer), 0, 1);
    std::vector<float> plain(static_cast<size_t>(predictor.config().lookahead * predictor.config().num_experts));
    predictor.logits(query, plain.data());
    CHECK(logits(predictor, query, empty) == plain);
  }
}

TEST_CASE("prefill, trim, fork and reset leave the tokens that they should") {
  for (ContextConfig sizes : {ContextConfig{12, 5, 3}, ContextConfig{0, 0, 3}, ContextConfig{12, 5, 0}}) {
    sizes.early_query = false;  // each layer is looked at by itself
    RandomBundle bundle(config(40, 16, sizes), 3, 2);
    const std::map<int, Predictor> predictors = bundle.pack({Format::f32, 1, 64});
    RandomBundle::States states = bundle.states(200);
    const auto check_next = [&](const SequenceContext& context, int at, int first = 0) {
      for (const auto& [layer, predictor] : predictors) {
        const Query query = part(bundle, states.at(layer), at, 1);
        CHECK(relative_error(logits(predictor, query, context), bundle.logits(layer, states, at, first)) < 1e-5);
      }
    };
    SequenceContext context(predictors);
    observe(bundle, states, 0, 130, context);  // more than a pass over the weights takes
    check_next(context, 130);
    SequenceContext fork = context;
    context.trim(ContextMemory::kSpare);
    CHECK(context.length() == 114);
    check_next(context, 114);
    observe(bundle, states, 114, 2, context);
    check_next(context, 116);
    check_next(fork, 130);
    observe(bundle, states, 130, 1, fork);
    check_next(fork, 131);
    fork.reset();
    CHECK(fork.length() == 0);
    observe(bundle, states, 150, 5, fork);
    check_next(fork, 155, 150);
    context.trim(1000);
    CHECK(context.length() == 0);
    check_next(context, 0);
  }
}

TEST_CASE("what an early query found is of one layer's tokens, and gone with them") {
  RandomBundle bundle(config(32, 16, {8, 4, 0}), 2, 3);
  const std::map<int, Predictor> predictors = bundle.pack({Format::f32, 1, 64});
  RandomBundle::States states = bundle.states(200);
  const auto with = [&](const SequenceContext& context, int at) {
    return logits(predictors.at(3), part(bundle, states.at(3), at, 1), context);
  };
  const SequenceContext none(predictors);
  SequenceContext context(predictors);
  observe(bundle, states, 0, 5, context);
  context.observe(1, part(bundle, states.at(1), 5, 1));  // asks for layer 3
  CHECK(relative_error(with(context, 5), bundle.logits(3, states, 5)) < 1e-5);
  SequenceContext fork = context;
  fork.trim(0);
  CHECK(with(fork, 5) == with(none, 5));
  CHECK(with(context, 5) != with(none, 5));
  context.observe(3, part(bundle, states.at(3), 5, 1));  // asks for layer 4
  CHECK(with(context, 5) == with(none, 5));
  context.observe(4, part(bundle, states.at(4), 5, 1));
  context.observe(6, part(bundle, states.at(6), 5, 1));
  // Of a call with too many tokens nothing is asked.
  for (const int tokens : {64, 65}) {
    SequenceContext many = context;
    many.observe(1, part(bundle, states.at(1), 6, tokens));
    CHECK((with(many, 6) == with(none, 6)) == (tokens > 64));
  }
  states.at(1)[7 * 32] = std::numeric_limits<float>::quiet_NaN();
  CHECK_THROWS_WITH_AS(context.observe(1, part(bundle, states.at(1), 7, 1)), doctest::Contains("not finite"),
                       std::invalid_argument);
  CHECK(with(context, 6) == with(none, 6));
}

TEST_CASE("a context's memory is what its header says, and grows no further") {
  for (const Format format : {Format::f32, Format::int4}) {
    RandomBundle bundle(config(32, 16, {20, 5, 3}), 2, 3);
    const std::map<int, Predictor> predictors = bundle.pack({format, 1, 64});
    SequenceContext context(predictors);
    const RandomBundle::States states = bundle.states(500);
    CHECK(context.bytes() == 3 * 16 * 4);
    observe(bundle, states, 0, 10, context);
    const size_t held = context.bytes();
    observe(bundle, states, 10, 490, context);
    CHECK(context.bytes() == held);
    // Keys: 3 panels of 16 slots by 64 columns. Values: 1 panel of 16 rows by 64 slots. 17 states.
    const size_t element = format == Format::f32 ? 4 : 2;
    CHECK(held == 3 * 16 * 4 + 3 * (4 * 16 * 64 * element + 17 * 3 * 4 + (36 + 17) * 8));
  }
}

TEST_CASE("contexts refuse what does not fit, and a state that is not finite leaves a gap") {
  RandomBundle bundle(config(32, 16, {4, 5, 3}), 2, 3);
  const std::map<int, Predictor> predictors = bundle.pack({Format::f32, 1, 64});
  SequenceContext context(predictors);
  RandomBundle::States states = bundle.states(4);
  observe(bundle, states, 0, 1, context);
  states.at(3)[32 + 7] = std::numeric_limits<float>::infinity();
  CHECK_THROWS_WITH_AS(context.observe(3, part(bundle, states.at(3), 1, 1)),
                       "[SequenceContext] the state of token 0 is not finite", std::invalid_argument);
  CHECK(context.length(3) == 2);
  CHECK(context.length(4) == 1);
  Query old = part(bundle, states.at(4), 0, 1);
  old.position = 0;
  CHECK_THROWS_WITH_AS(context.observe(4, old), doctest::Contains("position 0: trim first"), std::invalid_argument);
  CHECK_THROWS_WITH_AS(context.trim(-3), doctest::Contains("got -3"), std::invalid_argument);
  const std::map<int, Predictor> others = bundle.pack({Format::f32, 1, 64});
  CHECK_THROWS_WITH_AS(logits(others.at(1), part(bundle, states.at(1), 2, 1), context), doctest::Contains("made for"),
                       std::invalid_argument);
}

TEST_CASE("threads read one context at once, and helpers share its stages") {
  RandomBundle bundle(config(512, 512, {64, 64, 16, false}), 2, 5);
  const std::map<int, Predictor> predictors = bundle.pack({Format::int8, 2, 64});
  const RandomBundle::States states = bundle.states(90);
  SequenceContext context(predictors);
  observe(bundle, states, 0, 80, context);
  const Query query = part(bundle, states.at(1), 80, 10);
  const std::vector<float> expected = logits(predictors.at(1), query, context);
  std::atomic<int> different{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 2; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 20; ++i) different += logits(predictors.at(1), query, context) != expected;
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(different == 0);
}
