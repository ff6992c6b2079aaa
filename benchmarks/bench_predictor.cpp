// Times the predictor against the time that merely reading its weights takes, in one process, in turns.
//
//   bench_predictor [--threads N] [--tokens N] [--layers N] [--format NAME] [--rounds N]
//
// --layers: rotate through that many copies of the predictor (60: each call finds its weights in DRAM).
// Prints microseconds min / p50 / p99 of a call with its four top-8s, of the read, and read / call.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "mlx_od_moe/arena.h"
#include "mlx_od_moe/predictor.h"

namespace {

using namespace mlx_od_moe;
using Clock = std::chrono::steady_clock;

struct Options {
  int threads = 1;
  int tokens = 1;
  int layers = 1;
  int rounds = 300;
  std::string format;
};

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string flag = argv[i];
    if (flag == "--threads") options.threads = std::atoi(argv[i + 1]);
    if (flag == "--tokens") options.tokens = std::atoi(argv[i + 1]);
    if (flag == "--layers") options.layers = std::atoi(argv[i + 1]);
    if (flag == "--rounds") options.rounds = std::atoi(argv[i + 1]);
    if (flag == "--format") options.format = argv[i + 1];
  }
  return options;
}

#if defined(__x86_64__)
using Block [[gnu::vector_size(64)]] = long long;
#define BENCH_TARGET __attribute__((target("avx512f")))
#else
using Block [[gnu::vector_size(16)]] = long long;
#define BENCH_TARGET
#endif

// Loads every byte once, as fast as the core can.
BENCH_TARGET void read_bytes(const std::byte* from, size_t bytes) {
  const auto* p = reinterpret_cast<const Block*>(from);
  const auto* end = p + bytes / sizeof(Block);
  Block a{}, b{}, c{}, d{};
  for (; p + 8 <= end; p += 8) {
    a ^= p[0] ^ p[1];
    b ^= p[2] ^ p[3];
    c ^= p[4] ^ p[5];
    d ^= p[6] ^ p[7];
  }
  a ^= b ^ c ^ d;
  asm volatile("" : : "m"(a));
}

// Reads a buffer with several threads that spin between reads.
class Reader {
 public:
  explicit Reader(int threads) : lanes_(static_cast<size_t>(threads)) {
    for (size_t lane = 1; lane < lanes_; ++lane) helpers_.emplace_back([this, lane] { help(lane); });
  }
  ~Reader() {
    stop_.store(true);
    for (std::thread& helper : helpers_) helper.join();
  }
  void read(const std::byte* from, size_t bytes) {
    from_ = from;
    share_ = bytes / lanes_ / 512 * 512;
    finished_.store(0);
    awake_.store(true);
    round_.fetch_add(1);
    read_bytes(from, share_);
    while (finished_.load() + 1 < lanes_) {
    }
  }
  // Helpers sleep, so that they leave the core to the predictor's.
  void rest() { awake_.store(false); }
  void wake() { awake_.store(true); }

 private:
  void help(size_t lane) {
    for (size_t seen = 0; !stop_.load();) {
      if (!awake_.load()) std::this_thread::sleep_for(std::chrono::microseconds(50));
      if (round_.load() == seen) continue;
      seen = round_.load();
      read_bytes(from_ + lane * share_, share_);
      finished_.fetch_add(1);
    }
  }
  size_t lanes_;
  const std::byte* from_ = nullptr;
  size_t share_ = 0;
  std::atomic<size_t> round_{0}, finished_{0};
  std::atomic<bool> stop_{false}, awake_{false};
  std::vector<std::thread> helpers_;
};

struct Times {
  std::vector<double> us;
  template <class Run>
  void add(const Run& run) {
    const auto start = Clock::now();
    run();
    us.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
  }
  double at(double share) {
    std::sort(us.begin(), us.end());
    return us[std::min(us.size() - 1, static_cast<size_t>(share * static_cast<double>(us.size())))];
  }
};

std::vector<float> gaussian(size_t n, float deviation) {
  static std::mt19937 generator(0);
  std::normal_distribution<float> distribution(0, deviation);
  std::vector<float> values(n);
  for (float& v : values) v = distribution(generator);
  return values;
}

void bench(const PredictorWeights& weights, Format format, const Options& options, const std::vector<float>& x) {
  const std::vector<Predictor> predictors = Predictor::pack(
      std::vector<PredictorWeights>(static_cast<size_t>(options.layers), weights), {format, options.threads, 64});
  const size_t bytes = predictors[0].weight_bytes();
  Arena arena(bytes * predictors.size());
  Reader reader(options.threads);
  const Query query{x.data(), DType::float32, options.tokens, nullptr, 0, nullptr};
  std::vector<int32_t> ids(static_cast<size_t>(options.tokens) * 4 * 8);
  Times call, read;
  size_t layer = 0;
  const std::byte* buffer = arena.take(bytes * predictors.size());
  for (int round = 0; round < options.rounds; ++round) {
    reader.rest();
    const int warm_up = options.layers > 1 ? 1 : 3;
    for (int i = 0; i < 12; ++i, layer = (layer + 1) % predictors.size()) {
      const auto run = [&] { predictors[layer].predict(query, 8, ids.data()); };
      i < warm_up ? run() : call.add(run);
    }
    reader.wake();
    if (options.threads > 1) std::this_thread::sleep_for(std::chrono::microseconds(200));
    for (int i = 0; i < 12; ++i, layer = (layer + 1) % predictors.size()) {
      const auto run = [&] { reader.read(buffer + layer * bytes, bytes); };
      i < warm_up ? run() : read.add(run);
    }
  }
  std::printf("%-5s %8.2f MB  call %7.1f %7.1f %8.1f   read %7.1f %7.1f %8.1f   read/call min %.2f p50 %.2f\n",
              format_name(format), static_cast<double>(bytes) / 1e6, call.at(0), call.at(0.5), call.at(0.99),
              read.at(0), read.at(0.5), read.at(0.99), read.at(0) / call.at(0), read.at(0.5) / call.at(0.5));
}

}  // namespace

int main(int argc, char** argv) {
  const Options options = parse(argc, argv);
  PredictorWeights weights;
  const std::vector<float> trunk = gaussian(size_t{1024} * 4096, 1.0f / 64);
  const std::vector<float> heads = gaussian(size_t{1536} * 1024, 1.0f / 32);
  const std::vector<float> x = gaussian(static_cast<size_t>(options.tokens) * 4096, 1.0f);
  weights.trunk.weight = {trunk.data(), DType::float32, 1024, 4096};
  weights.heads.weight = {heads.data(), DType::float32, 1536, 1024};
  std::printf("4096 -> 1024 -> 4 x 384, kernel %s, %d thread(s), %d token(s), %d layer(s); microseconds min p50 p99\n",
              available_kernels().front().c_str(), options.threads, options.tokens, options.layers);
  for (const Format format : {Format::f32, Format::f16, Format::bf16, Format::int8, Format::int4}) {
    if (options.format.empty() || options.format == format_name(format)) bench(weights, format, options, x);
  }
}
