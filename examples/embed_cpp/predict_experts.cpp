// Prints which experts the next layers will need, from a trained predictor and recorded hidden states.
//
//   predict_experts BUNDLE LAYER STATES [K]
//
// BUNDLE: what PredictorBundle.save wrote. STATES: raw float32 values, [tokens, hidden_size].
// One line per token and distance: token, target layer, K expert ids, best first.
#include <mlx_od_moe/predictor_file.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

std::vector<float> read_floats(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": no such file");
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  std::vector<float> values(bytes.size() / sizeof(float));
  std::copy_n(bytes.begin(), values.size() * sizeof(float), reinterpret_cast<char*>(values.data()));
  return values;
}

void predict(const std::string& bundle_path, int layer, const std::string& states_path, int k) {
  const mlx_od_moe::PredictorOptions options{mlx_od_moe::Format::int8, /*threads=*/1};
  const auto bundle = mlx_od_moe::PredictorBundle::load(bundle_path, options);
  const mlx_od_moe::Predictor& predictor = bundle.at(layer);
  const mlx_od_moe::PredictorConfig& config = predictor.config();
  if (k == 0) k = config.top_k;

  const std::vector<float> states = read_floats(states_path);
  mlx_od_moe::Query query;
  query.hidden = states.data();
  query.tokens = static_cast<int>(states.size()) / config.hidden_size;
  std::vector<int32_t> ids(static_cast<size_t>(query.tokens * config.lookahead * k));
  predictor.predict(query, k, ids.data());

  const std::vector<int> targets = bundle.targets(layer);
  const int32_t* id = ids.data();
  for (int token = 0; token < query.tokens; ++token) {
    for (const int target : targets) {
      std::printf("%d %d", token, target);
      for (int i = 0; i < k; ++i) std::printf(" %d", *id++);
      std::printf("\n");
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: %s BUNDLE LAYER STATES [K]\n", argv[0]);
    return 2;
  }
  try {
    predict(argv[1], std::atoi(argv[2]), argv[3], argc > 4 ? std::atoi(argv[4]) : 0);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
