// Ways to read experts that lie one after the other in a file, in turns, in one process.
//
//   bench_disk_reads DIR [--rounds N] [--mib N] [--expert-kib N] [--direct 0]
//
// First so many reads in flight of one expert each, in random order: by as many threads with pread, and by one
// thread with io_uring (where liburing was found). Then neighbours: two threads that read runs of so many
// experts, each expert by itself or the run in one preadv, scattered over as many slots. DIR is where a file of
// that size is written, and removed again. Reads pass the page cache by, or find it empty (--direct 0).
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#if defined(MLX_OD_MOE_LIBURING)
#include <liburing.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

void require(bool holds, const char* what) {
  if (holds) return;
  std::perror(what);
  std::exit(1);
}

double cpu_seconds() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// A file of numbered blocks, and slots to read them into, in huge pages where the system has them.
class Disk {
 public:
  static constexpr size_t kSlots = 64;

  Disk(const std::string& parent, size_t count, size_t block_bytes, bool direct)
      : blocks(count),
        bytes(block_bytes),
        path_(std::filesystem::path(parent) / ("bench-disk-reads-" + std::to_string(getpid()))) {
    std::ofstream out(path_, std::ios::binary);
    std::vector<uint64_t> block(bytes / sizeof(uint64_t));
    std::mt19937_64 random(1);
    for (size_t i = 0; i < blocks; ++i) {
      for (uint64_t& word : block) word = random();
      block[0] = i;
      out.write(reinterpret_cast<const char*>(block.data()), static_cast<std::streamsize>(bytes));
    }
    out.close();
    sync();
    int flags = O_RDONLY;
#if defined(__linux__)
    if (direct) flags |= O_DIRECT;
#endif
    file = ::open(path_.c_str(), flags);
    require(file >= 0, "open");
#if defined(__APPLE__)
    if (direct) fcntl(file, F_NOCACHE, 1);
#endif
    constexpr size_t kHuge = size_t{2} << 20;
    size_ = (kSlots * bytes + kHuge - 1) / kHuge * kHuge;
    memory_ = static_cast<std::byte*>(std::aligned_alloc(kHuge, size_));
    require(memory_ != nullptr, "aligned_alloc");
#if defined(__linux__)
    madvise(memory_, size_, MADV_HUGEPAGE);
#endif
    std::fill_n(memory_, size_, std::byte{1});
  }
  ~Disk() {
    ::close(file);
    std::free(memory_);
    std::filesystem::remove(path_);
  }
  Disk(const Disk&) = delete;
  Disk& operator=(const Disk&) = delete;

  void drop_from_cache() const {
#if defined(__linux__)
    posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
#endif
  }
  // Slots of consecutive blocks do not lie together.
  std::byte* slot(size_t i) const { return memory_ + i * 7 % kSlots * bytes; }
  off_t offset(size_t block) const { return static_cast<off_t>(block * bytes); }
  void check(size_t i, size_t block) const {
    require(*reinterpret_cast<const uint64_t*>(slot(i)) == block, "wrong bytes");
  }

  const size_t blocks, bytes;
  int file = -1;

 private:
  const std::filesystem::path path_;
  std::byte* memory_ = nullptr;
  size_t size_ = 0;
};

using Order = std::vector<size_t>;  // first blocks of runs

// Each of the threads takes the next run, and reads `merged` blocks of it with one call.
void read_with_threads(const Disk& disk, const Order& order, size_t depth, size_t run, size_t merged) {
  std::atomic<size_t> next{0};
  std::vector<std::thread> threads;
  for (size_t t = 0; t < depth; ++t) {
    threads.emplace_back([&, t] {
      std::vector<iovec> parts(merged);
      for (size_t i = next++; i < order.size(); i = next++) {
        for (size_t from = 0; from < run; from += merged) {
          const size_t first = t * run + from;
          for (size_t k = 0; k < merged; ++k) parts[k] = {disk.slot(first + k), disk.bytes};
          const ssize_t got = ::preadv(disk.file, parts.data(), static_cast<int>(merged), disk.offset(order[i] + from));
          require(got == static_cast<ssize_t>(merged * disk.bytes), "preadv");
          disk.check(first, order[i] + from);
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

#if defined(MLX_OD_MOE_LIBURING)
// With registered file and memory, which is as cheap as it gets.
class Ring {
 public:
  Ring(const Disk& disk, size_t depth) : disk_(disk), depth_(depth) {
    require(io_uring_queue_init(static_cast<unsigned>(depth), &ring_, 0) == 0, "io_uring_queue_init");
    std::vector<iovec> slots;
    for (size_t i = 0; i < depth; ++i) slots.push_back({disk.slot(i), disk.bytes});
    require(io_uring_register_buffers(&ring_, slots.data(), static_cast<unsigned>(depth)) == 0, "register_buffers");
    require(io_uring_register_files(&ring_, &disk.file, 1) == 0, "register_files");
  }
  ~Ring() { io_uring_queue_exit(&ring_); }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  void read(const Order& order) {
    std::vector<size_t> block(depth_);
    size_t begun = 0;
    for (; begun < std::min(depth_, order.size()); ++begun) begin(begun, block[begun] = order[begun]);
    for (size_t ended = 0; ended < order.size(); ++ended) {
      io_uring_cqe* done = nullptr;
      require(io_uring_submit_and_wait(&ring_, 1) >= 0 && io_uring_peek_cqe(&ring_, &done) == 0, "io_uring");
      const auto slot = static_cast<size_t>(io_uring_cqe_get_data64(done));
      require(done->res == static_cast<int>(disk_.bytes), "io_uring read");
      io_uring_cqe_seen(&ring_, done);
      disk_.check(slot, block[slot]);
      if (begun < order.size()) begin(slot, block[slot] = order[begun]), ++begun;
    }
  }

 private:
  void begin(size_t slot, size_t block) {
    io_uring_sqe* entry = io_uring_get_sqe(&ring_);
    io_uring_prep_read_fixed(entry, 0, disk_.slot(slot), static_cast<unsigned>(disk_.bytes),
                             static_cast<uint64_t>(disk_.offset(block)), static_cast<int>(slot));
    entry->flags |= IOSQE_FIXED_FILE;
    io_uring_sqe_set_data64(entry, slot);
  }

  const Disk& disk_;
  const size_t depth_;
  io_uring ring_{};
};
#endif

struct Way {
  std::string name;
  std::function<void()> read;
  std::vector<double> rate, cpu;  // MB/s, and CPU seconds for each GB
};

// The ways in turns; ratios are to the first of them, round by round.
void compare(const Disk& disk, std::vector<Way>& ways, int rounds, size_t blocks) {
  const double megabytes = static_cast<double>(blocks * disk.bytes) / 1e6;
  for (int round = 0; round < rounds; ++round) {
    for (size_t i = 0; i < ways.size(); ++i) {
      Way& way = ways[(i + static_cast<size_t>(round)) % ways.size()];
      disk.drop_from_cache();
      const double cpu = cpu_seconds();
      const auto start = Clock::now();
      way.read();
      way.rate.push_back(megabytes / std::chrono::duration<double>(Clock::now() - start).count());
      way.cpu.push_back((cpu_seconds() - cpu) / megabytes * 1e3);
    }
  }
  for (const Way& way : ways) {
    std::vector<double> ratios;
    for (size_t r = 0; r < way.rate.size(); ++r) ratios.push_back(way.rate[r] / ways[0].rate[r]);
    std::printf("  %-34s MB/s %6.0f  CPU s/GB %.3f  ratio %.2f (%.2f ... %.2f)\n", way.name.c_str(), median(way.rate),
                median(way.cpu), median(ratios), *std::min_element(ratios.begin(), ratios.end()),
                *std::max_element(ratios.begin(), ratios.end()));
  }
  std::fflush(stdout);
}

Order runs(const Disk& disk, size_t run) {
  Order order(disk.blocks / run);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i * run;
  std::shuffle(order.begin(), order.end(), std::mt19937(2));
  return order;
}

}  // namespace

int main(int argc, char** argv) {
  std::map<std::string, std::string> given;
  for (int i = 2; i + 1 < argc; i += 2) given[argv[i]] = argv[i + 1];
  const auto number = [&](const char* name, int otherwise) {
    return static_cast<size_t>(given.count(name) > 0 ? std::atoi(given[name].c_str()) : otherwise);
  };
  if (argc < 2) return std::fprintf(stderr, "bench_disk_reads DIR [--option value] ...\n"), 1;
  const int rounds = static_cast<int>(number("--rounds", 9));
  const size_t bytes = number("--expert-kib", 2048) << 10;
  const Disk disk(argv[1], (number("--mib", 256) << 20) / bytes, bytes, number("--direct", 1) != 0);
  const Order order = runs(disk, 1);
  for (const size_t depth : {1, 2, 4, 8, 16}) {
    std::printf("%zu KiB, %zu in flight\n", bytes >> 10, depth);
    std::vector<Way> ways;
    ways.push_back({"pread, a thread for each", [&] { read_with_threads(disk, order, depth, 1, 1); }, {}, {}});
#if defined(MLX_OD_MOE_LIBURING)
    Ring ring(disk, depth);
    ways.push_back({"io_uring, one thread", [&] { ring.read(order); }, {}, {}});
#endif
    compare(disk, ways, rounds, order.size());
  }
  for (const size_t run : {2, 4, 8, 16}) {
    std::printf("%zu KiB, runs of %zu neighbours, 2 threads\n", bytes >> 10, run);
    const Order starts = runs(disk, run);
    std::vector<Way> ways;
    ways.push_back({"each by itself", [&] { read_with_threads(disk, starts, 2, run, 1); }, {}, {}});
    ways.push_back({"the run in one preadv", [&] { read_with_threads(disk, starts, 2, run, run); }, {}, {}});
    compare(disk, ways, rounds, starts.size() * run);
  }
}
