#include "mlx_od_moe/read_probe.h"

#include <stdexcept>
#include <string>

#include "mlx_od_moe/parking.h"

namespace mlx_od_moe {
namespace {

using Clock = std::chrono::steady_clock;

using Block [[gnu::vector_size(64)]] = long long;
constexpr size_t kStep = 8 * sizeof(Block);

[[gnu::always_inline]] inline void load(const std::byte* from, size_t bytes) {
  const auto* p = reinterpret_cast<const Block*>(from);
  Block a{}, b{}, c{}, d{};
  for (const Block* end = p + bytes / kStep * 8; p != end; p += 8) {
    a ^= p[0] ^ p[1];
    b ^= p[2] ^ p[3];
    c ^= p[4] ^ p[5];
    d ^= p[6] ^ p[7];
  }
  a ^= b ^ c ^ d;
  asm volatile("" : : "m"(a));  // or the compiler would leave it all out
}

#if defined(__x86_64__)
[[gnu::target("avx512f")]] void load_avx512(const std::byte* from, size_t bytes) { load(from, bytes); }
#endif

void load_all(const std::byte* from, size_t bytes) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return load_avx512(from, bytes);
#endif
  load(from, bytes);
}

size_t checked(size_t bytes, int threads) {
  if (threads < 1 || threads > 64) {
    throw std::invalid_argument("[ReadProbe] threads must be 1 ... 64, got " + std::to_string(threads));
  }
  if (bytes < kStep) {
    throw std::invalid_argument("[ReadProbe] bytes must be " + std::to_string(kStep) + " or more, got " +
                                std::to_string(bytes));
  }
  return bytes;
}

}  // namespace

ReadProbe::ReadProbe(size_t bytes, int threads)
    : bytes_(checked(bytes, threads)), arena_(bytes), memory_(arena_.take(bytes)) {
  for (size_t lane = 1; lane < static_cast<size_t>(threads); ++lane)
    helpers_.emplace_back([this, lane] { help(lane); });
}

ReadProbe::~ReadProbe() {
  stopping_.store(true, std::memory_order_relaxed);
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  for (std::thread& helper : helpers_) helper.join();
}

double ReadProbe::read(size_t offset, size_t bytes) {
  if (offset > bytes_ || bytes > bytes_ - offset) {
    throw std::invalid_argument("[ReadProbe] " + std::to_string(bytes) + " bytes from " + std::to_string(offset) +
                                " on are more than its " + std::to_string(bytes_));
  }
  const Clock::time_point start = Clock::now();
  const size_t lanes = helpers_.size() + 1;
  from_ = memory_ + offset / sizeof(Block) * sizeof(Block);
  share_ = bytes / lanes / kStep * kStep;
  finished_.store(0, std::memory_order_relaxed);
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  load_all(from_, share_);
  while (finished_.load(std::memory_order_acquire) + 1 < lanes) pause_cpu();
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

void ReadProbe::help(size_t lane) {
  for (size_t seen = 0;;) {
    const Clock::time_point end = Clock::now() + kSpin;
    while (round_.load(std::memory_order_acquire) == seen && Clock::now() < end) pause_cpu();
    round_.wait(seen, std::memory_order_acquire);
    ++seen;  // the caller begins no round before the last is finished
    if (stopping_.load(std::memory_order_relaxed)) return;
    load_all(from_ + lane * share_, share_);
    finished_.fetch_add(1, std::memory_order_release);
  }
}

}  // namespace mlx_od_moe
