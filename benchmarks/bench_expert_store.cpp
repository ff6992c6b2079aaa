// The expert store: what a call costs its caller, and how much of the disk it gets. In turns, in one process.
//
//   bench_expert_store --calls 1 [--rounds N]       acquire of resident experts, prefetch, on the caller
//   bench_expert_store --read DIR [--rounds N] [--mib N] [--readers N] [--expert-kib N] [--direct 1]
//                                                   cold reads beside pread loops of the same depth and size
//   bench_expert_store --soak MINUTES [--dir DIR]   random use by several threads, every byte checked
//
// DIR is where a packed model of that size is written, and removed again. Without --direct the file is
// dropped from the page cache before each round. Who reads first changes from round to round.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "mlx_od_moe/expert_store.h"

namespace {

using namespace mlx_od_moe;
using Clock = std::chrono::steady_clock;
using Ids = std::vector<int32_t>;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// A packed model of one part an expert, whose words tell layer, expert and place.
class PackedModel {
 public:
  PackedModel(const std::string& parent, int layers, int experts, size_t expert_bytes)
      : folder_(std::filesystem::path(parent) / ("bench-expert-store-" + std::to_string(getpid()))),
        words_(expert_bytes / sizeof(uint32_t)) {
    std::filesystem::create_directories(folder_);
    std::string manifest = R"({"format": "mlx-od-moe-experts", "version": 1, "alignment": 4096, "layers": [)";
    for (int layer = 0; layer < layers; ++layer) {
      const std::string name = "layer" + std::to_string(layer);
      std::ofstream out(folder_ / name, std::ios::binary);
      std::string sums;
      for (int e = 0; e < experts; ++e) {
        std::vector<uint32_t> block(words_);
        for (size_t i = 0; i < words_; ++i) block[i] = word(layer, e, i);
        out.write(reinterpret_cast<const char*>(block.data()), static_cast<std::streamsize>(expert_bytes));
        sums += e > 0 ? ", 0" : "0";
      }
      manifest += (layer > 0 ? ", " : "") + (R"({"layer": )" + std::to_string(layer)) + R"(, "file": ")" + name +
                  R"(", "num_experts": )" + std::to_string(experts) + R"(, "block_bytes": )" +
                  std::to_string(expert_bytes) + R"(, "parts": [{"name": "w", "dtype": "U32", "shape": [)" +
                  std::to_string(words_) + R"(]}], "checksums": [)" + sums + "]}";
    }
    std::ofstream(folder_ / "experts.json") << manifest + "]}";
    sync();  // pages that are not written yet can't be dropped
  }
  ~PackedModel() {
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
  }

  static uint32_t word(int layer, int expert, size_t i) {
    return static_cast<uint32_t>(layer * 7919 + expert * 104729) + static_cast<uint32_t>(i) * 2654435761U;
  }
  bool holds(const std::byte* memory, int layer, int expert) const {
    for (size_t i = 0; i < words_; ++i) {
      uint32_t found = 0;
      std::memcpy(&found, memory + i * sizeof found, sizeof found);
      if (found != word(layer, expert, i)) return false;
    }
    return true;
  }
  std::shared_ptr<const ExpertFile> open() const { return ExpertFile::open(folder_.string()); }

 private:
  std::filesystem::path folder_;
  size_t words_;
};

void drop_from_cache(const ExpertFile& file) {
#if defined(__linux__)
  for (size_t i = 0; i < file.layout().files.size(); ++i) {
    posix_fadvise(file.descriptor(static_cast<int32_t>(i)), 0, 0, POSIX_FADV_DONTNEED);
  }
#else
  static_cast<void>(file);
#endif
}

struct Aligned {
  explicit Aligned(size_t bytes) : memory(::operator new(bytes, std::align_val_t(4096))) {}
  ~Aligned() { ::operator delete(memory, std::align_val_t(4096)); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  void* memory;
};

// Bytes a second of as many threads, each with one buffer, that take the next block in turn.
double read_raw(const ExpertFile& file, int readers, bool direct) {
  const ExpertLayout& layout = file.layout();
  std::vector<int> descriptors;
  for (size_t i = 0; i < layout.files.size(); ++i) {
    int flags = O_RDONLY;
#if defined(__linux__)
    if (direct) flags |= O_DIRECT;
#endif
    descriptors.push_back(::open(layout.files[i].c_str(), flags));
#if defined(__APPLE__)
    if (direct) fcntl(descriptors.back(), F_NOCACHE, 1);
#endif
  }
  const size_t experts = layout.layers[0].extents.size(), bytes = layout.layers[0].expert_bytes();
  std::vector<std::unique_ptr<Aligned>> buffers;
  for (int t = 0; t < readers; ++t) {
    buffers.push_back(std::make_unique<Aligned>(bytes));
    std::memset(buffers.back()->memory, 1, bytes);
  }
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};
  std::vector<std::thread> threads;
  const auto start = Clock::now();
  for (int t = 0; t < readers; ++t) {
    threads.emplace_back([&, buffer = buffers[static_cast<size_t>(t)]->memory] {
      for (size_t i = next++; i < experts * layout.layers.size(); i = next++) {
        const Extent& extent = layout.layers[i / experts].extents[i % experts][0];
        const int descriptor = descriptors[static_cast<size_t>(extent.file)];
        size_t got = 0;
        while (got < bytes) {
          const ssize_t n = ::pread(descriptor, static_cast<char*>(buffer) + got, bytes - got,
                                    static_cast<off_t>(extent.offset + got));
          if (n <= 0) failed = true;
          if (n <= 0) return;
          got += static_cast<size_t>(n);
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const double seconds = seconds_since(start);
  for (int descriptor : descriptors) ::close(descriptor);
  if (failed) std::fprintf(stderr, "raw reads failed\n"), std::exit(1);
  return static_cast<double>(experts * layout.layers.size() * bytes) / seconds;
}

// The same by a store that holds two layers' worth of slots in each: the next layer is asked for while one is read.
double read_store(ExpertStore& store, int32_t experts) {
  Ids ids(static_cast<size_t>(experts));
  for (int32_t e = 0; e < experts; ++e) ids[static_cast<size_t>(e)] = e;
  const auto start = Clock::now();
  std::vector<ExpertLease> leases;
  for (int layer : store.layers()) leases.push_back(store.request(layer, ids));
  for (ExpertLease& lease : leases) lease.wait();
  return static_cast<double>(store.capacity_bytes()) / seconds_since(start);
}

void bench_reads(const std::string& parent, int rounds, int mib, int readers, int expert_kib, bool direct) {
  constexpr int kExperts = 16;
  const size_t bytes = static_cast<size_t>(expert_kib) << 10;
  const int layers = std::max(1, static_cast<int>((static_cast<size_t>(mib) << 20) / bytes / kExperts));
  const PackedModel model(parent, layers, kExperts, bytes);
  const auto file = model.open();
  StoreOptions options;
  options.slots.assign(static_cast<size_t>(layers), kExperts);
  options.readers = readers;
  options.reader.direct_io = direct;
  // The pools outlive the stores, so that every round but the first finds their pages there.
  std::vector<Aligned*> memory;
  Pools pools;
  for (int layer = 0; layer < layers; ++layer) {
    memory.push_back(new Aligned(kExperts * bytes));
    pools.push_back({static_cast<std::byte*>(memory.back()->memory)});
  }
  read_store(*std::make_unique<ExpertStore>(file, options, pools), kExperts);
  std::vector<double> raw, ours, ratios;
  const auto read_ours = [&] {
    if (!direct) drop_from_cache(*file);
    ExpertStore store(file, options, pools);
    ours.push_back(read_store(store, kExperts));
    if (!model.holds(pools.back()[0], layers - 1, 0)) std::fprintf(stderr, "wrong bytes\n"), std::exit(1);
  };
  for (int round = 0; round < rounds; ++round) {
    if (round % 2 == 1) read_ours();
    if (!direct) drop_from_cache(*file);
    raw.push_back(read_raw(*file, readers, direct));
    if (round % 2 == 0) read_ours();
    ratios.push_back(ours.back() / raw.back());
  }
  for (Aligned* each : memory) delete each;
  std::printf("%s, %d readers, %d KiB an expert, %d MiB: MB/s pread %.0f, store %.0f; ratio %.2f (%.2f ... %.2f)\n",
              direct ? "direct" : "buffered, cold", readers, expert_kib, layers * kExperts * expert_kib >> 10,
              median(raw) / 1e6, median(ours) / 1e6, median(ratios), *std::min_element(ratios.begin(), ratios.end()),
              *std::max_element(ratios.begin(), ratios.end()));
}

void print_calls(const char* name, std::vector<double>& ns, double per) {
  std::sort(ns.begin(), ns.end());
  const auto at = [&](double share) {
    return ns[static_cast<size_t>(share * static_cast<double>(ns.size() - 1))] / per;
  };
  std::printf("%-44s ns min %6.0f  p50 %6.0f  p99 %6.0f\n", name, at(0), at(0.5), at(0.99));
}

template <class Call, class Between>
std::vector<double> timed(int rounds, Call call, Between between) {
  std::vector<double> ns;
  for (int i = 0; i < rounds; ++i) {
    const auto start = Clock::now();
    call(i);
    ns.push_back(seconds_since(start) * 1e9);
    between(i);
  }
  return ns;
}

void bench_calls(const std::string& parent, int rounds) {
  constexpr int32_t kExperts = 256, kTopK = 8;
  const PackedModel model(parent, 2, kExperts, 4096);
  StoreOptions options;
  options.slots = {64, 64};
  ExpertStore store(model.open(), options);
  Ids ids(kTopK), slots(kTopK);
  const std::vector<float> scores(kTopK, 0.5F);
  for (int32_t i = 0; i < kTopK; ++i) ids[static_cast<size_t>(i)] = 3 * i;
  store.acquire(0, ids, slots).release();
  const auto nothing = [](int) {};
  auto ns = timed(rounds, [&](int) { store.acquire(0, ids, slots).release(); }, nothing);
  print_calls("acquire + release of 8 residents, per expert", ns, kTopK);
  ns = timed(rounds, [&](int) { store.prefetch(0, ids, scores, 0); }, nothing);
  print_calls("prefetch of 8 residents, per call", ns, 1);
  uint64_t step = 0;
  const auto pass_by = [&](ExpertStore& of, int i) {
    of.cancel(++step);
    for (int32_t k = 0; k < kTopK; ++k) ids[static_cast<size_t>(k)] = (i * kTopK + k) % kExperts;
  };
  const auto prefetch_after = [&](const char* name, int calls, std::chrono::milliseconds rest) {
    ns = timed(
        calls, [&](int) { store.prefetch(1, ids, scores, step); },
        [&](int i) {
          while (store.counters().queued > 0) pause_cpu();
          store.acquire(1, Ids{i % kExperts}, std::span(slots).first(1)).release();  // a pass: the budget is free
          pass_by(store, i + 1);
          std::this_thread::sleep_for(rest);
        });
    print_calls(name, ns, 1);
  };
  const int some = std::min(rounds, 2000);
  prefetch_after("prefetch of 8 absent, readers watch", some, std::chrono::milliseconds(2));
  prefetch_after("prefetch of 8 absent, wakes a reader", std::max(some / 20, 1), 2 * Parking::kWatch);
  options.reader.disk = DiskModel{4096 * 0.2, {}};  // the first expert is in flight until the end
  ExpertStore busy(model.open(), options);
  busy.prefetch(0, Ids{0}, {}, step);
  while (busy.counters().prefetched == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  ns = timed(some, [&](int) { busy.prefetch(1, ids, scores, step); }, [&](int i) { pass_by(busy, i + 1); });
  print_calls("prefetch of 8 absent, one is being read", ns, 1);
}

// Random use until time is up: the process ends with 1 where a byte is wrong.
void soak(const std::string& parent, double minutes) {
  constexpr int kLayers = 4;
  constexpr int32_t kExperts = 64;
  const PackedModel model(parent, kLayers, kExperts, 64 << 10);
  StoreOptions options;
  options.slots.assign(kLayers, 16);
  options.readers = 3;
  ExpertStore store(model.open(), options);
  const auto end =
      Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(minutes * 60));
  std::atomic<uint64_t> acquired{0}, step{0};
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      while (Clock::now() < end) {
        for (int layer = 0; layer < kLayers; ++layer) {
          Ids ids(1 + random() % 5), slots(ids.size()), guess(ids.size());
          for (int32_t& id : ids) id = static_cast<int32_t>(std::min(random() % kExperts, random() % kExperts));
          for (int32_t& id : guess) id = static_cast<int32_t>(random() % kExperts);
          if (random() % 2 == 0) store.prefetch((layer + 1) % kLayers, guess, {}, step);
          if (random() % 8 == 0) store.cancel(++step);
          const ExpertLease lease = store.acquire(layer, ids, slots);
          for (size_t i = 0; i < ids.size(); ++i) {
            if (model.holds(store.address(layer, 0, slots[i]), layer, ids[i])) continue;
            std::fprintf(stderr, "wrong bytes: layer %d, expert %d\n", layer, ids[i]);
            std::exit(1);
          }
          acquired += ids.size();
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const StoreCounters c = store.counters();
  const bool agree = c.lookups == c.hits + c.late + c.misses &&
                     c.prefetched == c.useful + c.late + c.wasted + c.pending &&
                     c.accepted == c.prefetched + c.overtaken + c.cancelled + c.queued;
  std::printf("%llu experts acquired, %llu reads prefetched, all bytes right, counters %s\n",
              static_cast<unsigned long long>(acquired.load()), static_cast<unsigned long long>(c.prefetched),
              agree ? "agree" : "DISAGREE");
  if (!agree) std::exit(1);
}

}  // namespace

int main(int argc, char** argv) {
  std::map<std::string, std::string> given;
  for (int i = 1; i + 1 < argc; i += 2) given[argv[i]] = argv[i + 1];
  const auto number = [&](const char* name, double otherwise) {
    return given.count(name) > 0 ? std::atof(given[name].c_str()) : otherwise;
  };
  const std::string parent =
      given.count("--dir") > 0 ? given["--dir"] : std::filesystem::temp_directory_path().string();
  if (given.count("--calls") > 0) bench_calls(parent, static_cast<int>(number("--rounds", 20000)));
  if (given.count("--read") > 0) {
    bench_reads(given["--read"], static_cast<int>(number("--rounds", 7)), static_cast<int>(number("--mib", 512)),
                static_cast<int>(number("--readers", 2)), static_cast<int>(number("--expert-kib", 2048)),
                number("--direct", 0) != 0);
  }
  if (given.count("--soak") > 0) soak(parent, number("--soak", 30));
}
