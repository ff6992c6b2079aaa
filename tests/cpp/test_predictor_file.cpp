#include "mlx_od_moe/predictor_file.h"

#include <doctest/doctest.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>

#include "mlx_od_moe/forward.h"
#include "mlx_od_moe/json.h"
#include "mlx_od_moe/safetensors.h"

using namespace mlx_od_moe;

namespace {

// A file that is removed at the end of the test.
class File {
 public:
  explicit File(const std::string& bytes)
      : path_((std::filesystem::temp_directory_path() / ("mlx_od_moe_" + std::to_string(getpid()))).string()) {
    std::ofstream(path_, std::ios::binary) << bytes;
  }
  ~File() { std::remove(path_.c_str()); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

std::string safetensors(const std::string& header, size_t data_bytes) {
  std::string bytes;
  for (size_t i = 0; i < 8; ++i) bytes += static_cast<char>(header.size() >> (8 * i) & 255);
  return bytes + header + std::string(data_bytes, '\0');
}

constexpr const char* kConfig =
    R"({\"hidden_size\": 4, \"predictor_size\": 2, \"num_experts\": 3, \"lookahead\": 1, \"top_k\": 1, )"
    R"(\"activation\": \"relu\", \"layer_norm\": false, \"terms\": [\"mlp\"], \"previous_experts\": false})";

std::string predictor_file() {
  const std::string header =
      std::string(R"({"__metadata__": {"format": "mlx-od-moe-predictor", "version": "1", )") +
      R"("kind": "predictor", "quantization": "null", "routers": "[]", "config": ")" + kConfig +
      R"("}, "predictor.trunk.weight": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}, )" +
      R"("predictor.heads.weight": {"dtype": "F32", "shape": [3, 2], "data_offsets": [32, 56]}})";
  return safetensors(header, 56);
}

void check_refused(const std::string& bytes, const char* reason) {
  const File file(bytes);
  CHECK_THROWS_WITH_AS(load_predictor(file.path()), doctest::Contains(reason), std::invalid_argument);
  CHECK_THROWS_WITH_AS(load_predictor(file.path()), doctest::Contains(file.path().c_str()), std::invalid_argument);
}

}  // namespace

TEST_CASE("JSON values are read as they are written") {
  const Json json = Json::parse(R"( {"a": [1, -2.5e3, true, null], "b": {"\u00e9\n\ud83d\ude00": "x"}} )");
  CHECK(json.at("a").array()[0].integer() == 1);
  CHECK(json.at("a").array()[1].number() == -2500);
  CHECK(json.at("a").array()[2].boolean());
  CHECK(json.at("a").array()[3].is_null());
  CHECK(json.at("b").at("\xc3\xa9\n\xf0\x9f\x98\x80").string() == "x");
}

TEST_CASE("bad JSON is refused, not followed") {
  const std::string deep(100000, '[');
  for (const std::string& text :
       {std::string(""), std::string("{"), std::string("[1,]"), std::string("{\"a\":1,\"a\":2}"),
        std::string("\"\\ud800\""), std::string("\"\\q\""), std::string("\"\\u12"), std::string("1 2"),
        std::string("nul"), std::string("1e"), std::string("\"a"), deep}) {
    CAPTURE(text.substr(0, 20));
    CHECK_THROWS_AS(Json::parse(text), std::invalid_argument);
  }
  CHECK_THROWS_AS(Json::parse("1.5").integer(), std::invalid_argument);
  CHECK_THROWS_AS(Json::parse("1e300").integer(), std::invalid_argument);
  CHECK_THROWS_AS(Json::parse("[]").object(), std::invalid_argument);
}

TEST_CASE("a predictor file is loaded") {
  const File file(predictor_file());
  const Predictor predictor = load_predictor(file.path(), {Format::f32, 1, 64});
  CHECK(predictor.config().num_experts == 3);
  CHECK(predictor.config().activation == Activation::relu);
}

TEST_CASE("a predictor file may hold a calibration") {
  std::string header = predictor_file().substr(8);
  header.resize(header.size() - 57);  // without its data and the last brace
  const auto file = [&](const char* shape, float factor) {
    std::string bytes = safetensors(
        header + R"(, "predictor.calibration": {"dtype": "F32", "shape": )" + shape + R"(, "data_offsets": [56, 64]}})",
        64);
    std::memcpy(bytes.data() + bytes.size() - 8, &factor, sizeof factor);
    return bytes;
  };
  const File good(file("[1, 2]", 2.0f));
  CHECK(load_predictor(good.path(), {Format::f32, 1, 64}).packed().calibration);
  const File plain(predictor_file());
  CHECK_FALSE(load_predictor(plain.path(), {Format::f32, 1, 64}).packed().calibration);
  check_refused(file("[2, 1]", 2.0f), "calibration must be floats [1, 2], but is [2, 1]");
  check_refused(file("[1, 2]", -2.0f), "got -2.000000 and 0.000000 at distance 1");
}

TEST_CASE("files that contradict themselves are refused with their name and the rule") {
  const std::string good = predictor_file();
  const auto replaced = [&](const std::string& from, const std::string& to) {
    std::string header = good.substr(8, good.size() - 64);
    header.replace(header.find(from), from.size(), to);
    return safetensors(header, 56);
  };
  check_refused("", "too short");
  check_refused(good.substr(0, 100), "cut short");
  check_refused(good.substr(0, good.size() - 1), "its data lie at");
  check_refused(replaced("[32, 56]", "[31, 55]"), "overlap");
  check_refused(replaced("[32, 56]", "[56, 32]"), "its data lie at");
  check_refused(replaced("[2, 4]", "[2, 5]"), "its shape needs 40 bytes, but it has 32");
  check_refused(replaced("[2, 4]", "[4294967296, 4294967296]"), "larger than the file");
  check_refused(replaced("[2, 4]", "[4, 2]"), "trunk.weight must be [2, 4], but is [4, 2]");
  check_refused(replaced("\"version\": \"1\"", "\"version\": \"2\""), "version='1'");
  check_refused(replaced("\"kind\": \"predictor\"", "\"kind\": \"bundle\""), "kind='predictor'");
  check_refused(replaced("predictor.heads.weight", "predictor.heads.wight_"), "heads.weight is missing");
  check_refused(replaced("\\\"num_experts\\\": 3", "\\\"num_experts\\\": 0"), "num_experts must be");
  CHECK_THROWS_WITH_AS(load_predictor("/nonexistent/file"), doctest::Contains("no such"), std::invalid_argument);
}

TEST_CASE("a bundle's layers may share a projection; without one a trunk of low rank is refused") {
  const std::string config = std::string(R"({\"trunk_rank\": 3, )") + (kConfig + 1);
  const auto bundle = [&](const std::string& shared) {
    const auto layer = [&](const std::string& n, int at) {
      const auto offsets = [&](int from, int to) {
        return "[" + std::to_string(at + from) + ", " + std::to_string(at + to) + "]";
      };
      return R"(, "layers.)" + n + R"(.trunk.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": )" +
             offsets(0, 24) + R"(}, "layers.)" + n +
             R"(.heads.weight": {"dtype": "F32", "shape": [3, 2], "data_offsets": )" + offsets(24, 48) + "}";
    };
    return safetensors(
        std::string(R"({"__metadata__": {"format": "mlx-od-moe-predictor", "version": "1", "kind": "bundle", )") +
            R"("quantization": "null", "routers": "{}", "moe_layers": "[0, 1, 2]", "layers": "{\"0\": )" + config +
            R"(, \"1\": )" + config + R"(}"}, ")" + shared +
            R"(": {"dtype": "F32", "shape": [3, 4], "data_offsets": [96, 144]})" + layer("0", 0) + layer("1", 48) + "}",
        144);
  };
  const File file(bundle("projection.linear.weight"));
  const PredictorBundle loaded = PredictorBundle::load(file.path(), {Format::f32, 1, 64});
  CHECK(loaded.at(0).config().trunk_rank == 3);
  CHECK(loaded.at(0).packed().projection.panels.data == loaded.at(1).packed().projection.panels.data);
  CHECK(loaded.at(0).packed().trunk.panels.data != loaded.at(1).packed().trunk.panels.data);
  const File lacking(bundle("layers.0.projection.linear.weight"));
  CHECK_THROWS_WITH_AS(PredictorBundle::load(lacking.path()), doctest::Contains("projection.linear.weight is missing"),
                       std::invalid_argument);
}

TEST_CASE("no damaged file does worse than throw") {
  const std::string good = predictor_file();
  std::mt19937 generator(1);
  for (int round = 0; round < 500; ++round) {
    std::string bytes = good;
    for (int i = 0; i < 3; ++i) bytes[generator() % (bytes.size() - 56)] = static_cast<char>(generator() % 256);
    if (round % 3 == 0) bytes.resize(generator() % bytes.size());
    const File file(bytes);
    try {
      load_predictor(file.path());
    } catch (const std::invalid_argument&) {
    }
  }
}
