// Loads bytes and does nothing with them: how fast this machine can read what a forward must read.
//
// Threads    One caller at a time. It reads with `threads` threads, its own among them; helpers spin for
//            kSpin after a read, then sleep.
// Ownership  The probe owns the memory that it reads, and its helpers.
// Ordering   round_ (release) -> helper: what to read. finished_ (release) -> the caller: that it is read.
// Errors     std::invalid_argument, "[ReadProbe] rule, value".
// Units      Bytes; read() returns microseconds.
// Costs      `bytes` of memory, written once. read() waits for its helpers, wherever the system has put them.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <thread>
#include <vector>

#include "mlx_od_moe/arena.h"
#include "mlx_od_moe/export.h"

namespace mlx_od_moe {

class MLX_OD_MOE_API ReadProbe {
 public:
  static constexpr std::chrono::microseconds kSpin{200};

  ReadProbe(size_t bytes, int threads);
  ~ReadProbe();
  ReadProbe(const ReadProbe&) = delete;
  ReadProbe& operator=(const ReadProbe&) = delete;

  // Loads each of the `bytes` from `offset` on once, but for what is left of 512 of each thread's share;
  // returns how long that took.
  double read(size_t offset, size_t bytes);

  size_t bytes() const { return bytes_; }
  int threads() const { return static_cast<int>(helpers_.size()) + 1; }

 private:
  void help(size_t lane);

  size_t bytes_;
  Arena arena_;
  const std::byte* memory_;
  const std::byte* from_ = nullptr;  // of this round
  size_t share_ = 0;                 // each thread's
  std::atomic<size_t> round_{0}, finished_{0};
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> helpers_;
};

}  // namespace mlx_od_moe
