// The prediction queue beside other queues, and the way from hidden state to record; in turns, in one process.
//
//   bench_prediction_queue [--rounds N]             push + pop, throughput, round trip; min / median of rounds
//   bench_prediction_queue --only NAME              those queues whose name holds NAME
//   bench_prediction_queue --path 1 [--rounds N]    hidden state ready -> its last record popped, against
//                                                   the predictor alone: 4096 -> 1024 -> 4 x 384, int4
//   bench_prediction_queue --soak N                 N records through 2 producers and 2 consumers, checked
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

#include "mlx_od_moe/shadow_runner.h"
#include "queue_peers.h"

namespace {

using namespace mlx_od_moe;
using Clock = std::chrono::steady_clock;
using peers::Record;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Spins, and leaves the core from time to time: the other side may need it.
template <class Try>
void until(Try try_it) {
  for (int i = 1; !try_it(); ++i) {
    pause_cpu();
    if (i % 2000 == 0) std::this_thread::yield();
  }
}

struct Samples {
  std::vector<double> values;
  double at(double share) {
    std::sort(values.begin(), values.end());
    return values[std::min(values.size() - 1, static_cast<size_t>(share * static_cast<double>(values.size())))];
  }
};

// Puts the calling thread on a CPU of its own. Left to the system both sides may share one for a whole
// round, and then fill and empty the queue in turns, at another speed.
void use_cpu(int number) {
#if defined(__linux__)
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  CPU_SET(number, &cpus);
  sched_setaffinity(0, sizeof(cpus), &cpus);
#else
  static_cast<void>(number);
#endif
}

// ns of a push and a pop by one thread.
template <class Queue>
double push_pop_ns() {
  constexpr int kCount = 200000;
  auto queue = std::make_unique<Queue>();
  Record record;
  const auto start = Clock::now();
  for (int i = 0; i < kCount; ++i) {
    record.ready_ns = i;
    queue->try_push(record);
    queue->try_pop(record);
  }
  return seconds_since(start) / kCount * 1e9;
}

// Millions of records a second from one thread to another.
template <class Queue>
double throughput() {
  constexpr int kCount = 300000;
  auto queue = std::make_unique<Queue>();
  std::atomic<bool> ready{false};
  std::thread consumer([&] {
    use_cpu(1);
    Record record;
    ready.store(true);
    for (int i = 0; i < kCount; ++i) until([&] { return queue->try_pop(record); });
  });
  until([&] { return ready.load(); });
  Record record;
  const auto start = Clock::now();
  for (int i = 0; i < kCount; ++i) {
    record.ready_ns = i;
    until([&] { return queue->try_push(record); });
  }
  consumer.join();
  return kCount / seconds_since(start) / 1e6;
}

// ns there and back, the median of batches.
template <class Queue>
double round_trip_ns() {
  constexpr int kBatch = 500, kBatches = 60;
  auto there = std::make_unique<Queue>();
  auto back = std::make_unique<Queue>();
  std::thread echo([&] {
    use_cpu(1);
    Record record;
    for (int i = 0; i < kBatch * kBatches; ++i) {
      until([&] { return there->try_pop(record); });
      until([&] { return back->try_push(record); });
    }
  });
  Samples batches;
  Record record;
  for (int b = 0; b < kBatches; ++b) {
    const auto start = Clock::now();
    for (int i = 0; i < kBatch; ++i) {
      until([&] { return there->try_push(record); });
      until([&] { return back->try_pop(record); });
    }
    batches.values.push_back(seconds_since(start) / kBatch * 1e9);
  }
  echo.join();
  return batches.at(0.5);
}

struct Row {
  Samples push_pop, throughput, round_trip;
};

template <class Queue>
void measure(std::map<std::string, Row>& rows, const std::string& only) {
  if (std::string(Queue::kName).find(only) == std::string::npos) return;
  Row& row = rows[Queue::kName];
  row.push_pop.values.push_back(push_pop_ns<Queue>());
  row.throughput.values.push_back(throughput<Queue>());
  row.round_trip.values.push_back(round_trip_ns<Queue>());
}

void compare(int rounds, const std::string& only) {
  use_cpu(0);
  std::map<std::string, Row> rows;
  for (int round = 0; round < rounds; ++round) {
    measure<peers::Ring>(rows, only);
    measure<peers::Prediction>(rows, only);
    measure<peers::CachedIndexSpsc>(rows, only);
#if defined(MLX_OD_MOE_BOOST)
    measure<peers::BoostSpsc>(rows, only);
    measure<peers::BoostQueue>(rows, only);
#endif
    measure<peers::MutexDeque>(rows, only);
  }
  std::printf("%d rounds, records of %zu bytes; best / median of rounds\n", rounds, sizeof(Record));
  std::printf("%-36s %18s %22s %20s\n", "queue", "push + pop ns", "throughput Mrec/s", "round trip ns");
  for (auto& [name, row] : rows) {
    std::printf("%-36s %8.1f / %7.1f %10.2f / %9.2f %9.0f / %8.0f\n", name.c_str(), row.push_pop.at(0),
                row.push_pop.at(0.5), row.throughput.at(1), row.throughput.at(0.5), row.round_trip.at(0),
                row.round_trip.at(0.5));
  }
}

std::vector<float> gaussian(size_t n, float deviation) {
  static std::mt19937 generator(0);
  std::normal_distribution<float> distribution(0, deviation);
  std::vector<float> values(n);
  for (float& v : values) v = distribution(generator);
  return values;
}

Predictor make_predictor() {
  PredictorWeights weights;
  const std::vector<float> trunk = gaussian(size_t{1024} * 4096, 1.0f / 64);
  const std::vector<float> heads = gaussian(size_t{1536} * 1024, 1.0f / 32);
  weights.trunk.weight = {trunk.data(), DType::float32, 1024, 4096};
  weights.heads.weight = {heads.data(), DType::float32, 1536, 1024};
  return Predictor(weights, {Format::int4, 1, 64});
}

void print(const char* name, Samples& us, Samples& own) {
  std::printf("%-52s %7.1f %7.1f %8.1f %9.1f   %+6.1f %+6.1f\n", name, us.at(0), us.at(0.5), us.at(0.99), us.at(1),
              us.at(0) - own.at(0), us.at(0.5) - own.at(0.5));
}

// Hidden state ready -> the last of its four records popped by the thread that handed it in.
void path(int rounds) {
  const Predictor predictor = make_predictor();
  const std::vector<float> x = gaussian(4096, 1);
  const Query query{x.data(), DType::float32, 1, nullptr, 0, nullptr};
  ShadowRunner runner({{0, predictor, {1, 2, 3, 4}}}, {0, 1, 2, 3, 4});
  PredictionQueue& queue = *runner.queue();
  std::vector<int32_t> ids(32);
  Samples own, call, awake, asleep;
  uint64_t step = 0;
  const auto predict = [&](bool wait, Samples& to) {
    const auto start = Clock::now();
    runner.predict_async(0, query, nullptr, ++step);
    call.values.push_back(seconds_since(start) * 1e6);
    Record record;
    for (int i = 0; i < 4; ++i) {
      if (wait) {
        queue.wait_pop(record);
      } else {
        until([&] { return queue.try_pop(record); });
      }
    }
    to.values.push_back(seconds_since(start) * 1e6);
  };
  for (int round = 0; round < rounds; ++round) {
    for (int i = 0; i < 30; ++i) {
      const auto start = Clock::now();
      predictor.predict(query, 8, ids.data());
      if (i >= 5) own.values.push_back(seconds_since(start) * 1e6);
    }
    Samples warm_up;
    for (int i = 0; i < 30; ++i) predict(false, i < 5 ? warm_up : awake);
    for (int i = 0; i < 5; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));  // as between tokens
      predict(true, asleep);
    }
  }
  std::printf("microseconds: min p50 p99 max, and beyond the predictor alone: min p50\n");
  print("predictor alone, on the calling thread", own, own);
  print("state ready -> last record, the runner awake", awake, own);
  print("the same after 1 ms of sleep, with wait_pop", asleep, own);
  std::printf("%-52s %7.1f %7.1f %8.1f %9.1f\n", "predict_async itself", call.at(0), call.at(0.5), call.at(0.99),
              call.at(1));
}

// Every byte of a record follows from its number.
Record sealed(uint64_t number) {
  Record r;
  r.step = number;
  uint64_t mixed = number * 0x9e3779b97f4a7c15;
  r.ready_ns = static_cast<int64_t>(mixed);
  for (int i = 0; i < Record::kMaxIds; ++i) {
    mixed = mixed * 6364136223846793005 + 1442695040888963407;
    r.ids[i] = static_cast<int16_t>(mixed >> 48);
    r.scores[i] = static_cast<float>(mixed >> 40);
  }
  return r;
}

bool intact(const Record& r) {
  const Record expected = sealed(r.step);
  return r.ready_ns == expected.ready_ns && std::equal(r.ids, r.ids + Record::kMaxIds, expected.ids) &&
         std::equal(r.scores, r.scores + Record::kMaxIds, expected.scores);
}

int soak(uint64_t records) {
  constexpr size_t kThreads = 2;
  Ring<Record> ring(peers::kCapacity);
  std::vector<std::atomic<uint64_t>> seen((records + 63) / 64);  // a bit each
  std::atomic<uint64_t> popped{0}, torn{0}, repeated{0}, disordered{0};
  std::vector<std::thread> threads;
  const auto start = Clock::now();
  for (size_t p = 0; p < kThreads; ++p) {
    threads.emplace_back([&, p] {
      for (uint64_t n = p; n < records; n += kThreads) {
        const Record record = sealed(n);
        until([&] { return ring.try_push(record); });
      }
    });
  }
  for (size_t c = 0; c < kThreads; ++c) {
    threads.emplace_back([&] {
      uint64_t last[kThreads] = {};
      bool any[kThreads] = {};
      uint64_t unreported = 0;
      Record r;
      const auto done = [&] {
        popped.fetch_add(unreported);
        unreported = 0;
        return popped.load() >= records;
      };
      for (;;) {
        bool finished = false;
        until([&] { return ring.try_pop(r) || (finished = done()); });
        if (finished) return;
        ++unreported;
        torn += !intact(r);
        const uint64_t bit = uint64_t{1} << (r.step % 64);
        repeated += r.step >= records || (seen[r.step / 64].fetch_or(bit, std::memory_order_relaxed) & bit) != 0;
        const size_t producer = r.step % kThreads;
        disordered += any[producer] && r.step <= last[producer];
        any[producer] = true;
        last[producer] = r.step;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  uint64_t missing = 0;
  for (uint64_t n = 0; n < records; ++n) missing += (seen[n / 64].load() >> (n % 64) & 1) == 0;
  const auto print_count = [](const char* name, uint64_t n) {
    std::printf("%s %llu\n", name, static_cast<unsigned long long>(n));
  };
  std::printf("2 producers, 2 consumers, %.1f s\n", seconds_since(start));
  print_count("popped    ", popped);
  print_count("missing   ", missing);
  print_count("repeated  ", repeated);
  print_count("torn      ", torn);
  print_count("disordered", disordered);
  return popped == records && missing + repeated + torn + disordered == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  int rounds = 11;
  bool whole_path = false;
  uint64_t soak_records = 0;
  std::string only;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string flag = argv[i];
    if (flag == "--rounds") rounds = std::atoi(argv[i + 1]);
    if (flag == "--path") whole_path = std::atoi(argv[i + 1]) != 0;
    if (flag == "--soak") soak_records = static_cast<uint64_t>(std::atof(argv[i + 1]));
    if (flag == "--only") only = argv[i + 1];
  }
  if (soak_records > 0) return soak(soak_records);
  whole_path ? path(rounds) : compare(rounds, only);
  return 0;
}
