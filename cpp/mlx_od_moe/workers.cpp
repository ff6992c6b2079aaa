#include "mlx_od_moe/workers.h"

#include <algorithm>
#include <utility>

namespace mlx_od_moe {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

// Long enough to bridge back-to-back calls, short enough not to burn a core between tokens.
constexpr microseconds kSpinForWork{100};
// The caller prepares the next phase within this; if not, the system has taken its core away.
constexpr microseconds kSpinForPhase{200};
constexpr microseconds kLeastPatience{5};

void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");  // yield returns at once on most cores
#endif
}

// Polls `ready` until it says true or `limit` has passed. Reads the clock rarely.
template <class Ready>
bool spin(Clock::duration limit, Ready ready) {
  if (ready()) return true;
  const auto end = Clock::now() + limit;
  do {
    for (int i = 0; i < 32; ++i) {
      pause_core();
      if (ready()) return true;
    }
  } while (Clock::now() < end);
  return false;
}

}  // namespace

void SharedWork::release() {
  if (references_.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
}

void SharedWork::restart() { opened_.store(0, std::memory_order_relaxed); }

void SharedWork::run_phase(int index, int blocks, int lanes) {
  Phase& phase = phases_[index];
  const auto count = static_cast<size_t>(blocks);
  if (phase.source.size() < count) phase.source.resize(count);
  std::fill_n(phase.source.begin(), count, 0);
  if (lanes == 1) {
    for (int b = 0; b < blocks; ++b) run_block(index, b, 0);
    return;
  }
  if (phase.capacity < count) {
    phase.done = std::make_unique<std::atomic<int>[]>(count);
    phase.capacity = count;
  }
  if (phase.shares == nullptr) phase.shares = std::make_unique<Share[]>(kMaxLanes);
  for (size_t b = 0; b < count; ++b) phase.done[b].store(0, std::memory_order_relaxed);
  for (int lane = 0; lane < lanes; ++lane) {
    Share& share = phase.shares[static_cast<size_t>(lane)];
    share.next.store(blocks * lane / lanes, std::memory_order_relaxed);
    share.end = blocks * (lane + 1) / lanes;
  }
  phase.blocks = blocks;
  phase.lanes = lanes;
  opened_.store(index + 1, std::memory_order_release);

  const auto start = Clock::now();
  int own = 0;
  for (int b; (b = claim(phase, 0)) >= 0; ++own) {
    run_block(index, b, 0);
    phase.done[static_cast<size_t>(b)].store(1, std::memory_order_relaxed);
  }
  await_helpers(index, std::max<Clock::duration>(kLeastPatience, 2 * (Clock::now() - start) / std::max(own, 1)));
}

int SharedWork::claim(Phase& phase, int lane) noexcept {
  for (int i = 0; i < phase.lanes; ++i) {
    Share& share = phase.shares[static_cast<size_t>((lane + i) % phase.lanes)];
    // Looked at first, so that an empty share's counter is not written again and again.
    if (share.next.load(std::memory_order_relaxed) >= share.end) continue;
    const int block = share.next.fetch_add(1, std::memory_order_relaxed);
    if (block < share.end) return block;
  }
  return -1;
}

// A helper's block is at most as long as one of ours, so twice that is patience enough.
void SharedWork::await_helpers(int index, Clock::duration patience) {
  Phase& phase = phases_[index];
  for (size_t b = 0; b < static_cast<size_t>(phase.blocks); ++b) {
    const auto finished = [&] { return phase.done[b].load(std::memory_order_acquire) != 0; };
    if (spin(patience, finished)) {
      phase.source[b] = phase.done[b].load(std::memory_order_acquire) - 1;
    } else {
      run_block(index, static_cast<int>(b), 0);
    }
  }
}

bool SharedWork::wait_until_open(int phase) const noexcept {
  int opened = 0;
  const auto ready = [&] { return (opened = opened_.load(std::memory_order_acquire)) > phase; };
  return spin(kSpinForPhase, ready) && opened != kClosed;
}

void SharedWork::join(int lane) noexcept {
  for (int index = 0; index < kPhases && wait_until_open(index); ++index) {
    Phase& phase = phases_[index];
    for (int b; (b = claim(phase, lane)) >= 0;) {
      run_block(index, b, lane);
      phase.done[static_cast<size_t>(b)].store(lane + 1, std::memory_order_release);
    }
  }
}

Workers::Workers(int threads) : slots_(static_cast<size_t>(threads) - 1) {
  for (int lane = 1; lane < threads; ++lane) helpers_.emplace_back([this, lane] { help(lane); });
}

Workers::~Workers() {
  stopping_.store(true);
  for (Slot& slot : slots_) {
    slot.parked.store(0);
    slot.parked.notify_one();
  }
  for (std::thread& helper : helpers_) helper.join();
}

void Workers::offer(SharedWork& work) {
  for (Slot& slot : slots_) {
    SharedWork* none = nullptr;
    work.add_reference();
    if (!slot.work.compare_exchange_strong(none, &work)) {
      work.release();
    } else if (slot.parked.load() != 0) {
      slot.placement.keep_clear();
      slot.parked.store(0);
      slot.parked.notify_one();
    }
  }
}

void Workers::withdraw(SharedWork& work) {
  for (Slot& slot : slots_) {
    SharedWork* mine = &work;
    if (slot.work.compare_exchange_strong(mine, nullptr)) work.release();
  }
}

SharedWork* Workers::wait_for_work(Slot& slot) const {
  SharedWork* work = nullptr;
  const auto ready = [&] {
    if (slot.work.load(std::memory_order_relaxed) != nullptr) work = slot.work.exchange(nullptr);
    return work != nullptr || stopping_.load(std::memory_order_relaxed);
  };
  while (!spin(kSpinForWork, ready)) {
    slot.placement.settle();
    slot.parked.store(1);
    if (slot.work.load() != nullptr || stopping_.load()) {
      slot.parked.store(0);
    } else {
      slot.parked.wait(1);
    }
  }
  return work;
}

void Workers::help(int lane) {
  Slot& slot = slots_[static_cast<size_t>(lane) - 1];
  while (SharedWork* work = wait_for_work(slot)) {
    work->join(lane);
    work->release();
  }
}

}  // namespace mlx_od_moe
