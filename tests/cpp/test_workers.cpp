#include "mlx_od_moe/workers.h"

#include <doctest/doctest.h>

#include <chrono>

using namespace mlx_od_moe;

namespace {

// Squares of 0 ... n - 1, one block each; helpers may be made slow.
class Squares : public SharedWork {
 public:
  Squares(int n, int lanes, int helper_delay_ms, int busy_us = 0)
      : n_(n), lanes_(lanes), delay_ms_(helper_delay_ms), busy_us_(busy_us) {
    results_.resize(static_cast<size_t>(kPhases * n * lanes));
  }
  void run_block(int phase, int block, int lane) noexcept override {
    if (lane > 0 && delay_ms_ > 0) std::this_thread::sleep_for(std::chrono::milliseconds(delay_ms_));
    if (lane > 0) ++helped_;
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(busy_us_);
    while (busy_us_ > 0 && std::chrono::steady_clock::now() < end) continue;
    at(phase, block, lane) = (phase + 1) * block * block;
  }
  bool right(int phase) {
    for (int b = 0; b < n_; ++b) {
      if (at(phase, b, lane_of(phase, b)) != (phase + 1) * b * b) return false;
    }
    return true;
  }
  int helped() const { return helped_.load(); }

 private:
  int& at(int phase, int block, int lane) {
    return results_[static_cast<size_t>((phase * lanes_ + lane) * n_ + block)];
  }
  int n_, lanes_, delay_ms_, busy_us_;
  std::atomic<int> helped_{0};
  std::vector<int> results_;
};

void run(Workers& workers, Squares& work, int n) {
  work.restart();
  workers.offer(work);
  for (int phase = 0; phase < SharedWork::kPhases; ++phase) {
    work.run_phase(phase, n, workers.threads());
    CHECK(work.right(phase));
  }
  work.close();
  workers.withdraw(work);
}

}  // namespace

TEST_CASE("every block is computed once, whoever comes") {
  for (const int threads : {1, 2, 4}) {
    Workers workers(threads);
    for (const int n : {1, 2, 7, 100}) {
      for (int round = 0; round < 30; ++round) {
        auto* work = new Squares(n, threads, 0);
        run(workers, *work, n);
        work->release();
      }
    }
  }
}

TEST_CASE("a helper that stalls is not waited for, and its late result does no harm") {
  Workers workers(2);
  for (int round = 0; round < 3; ++round) {
    auto* work = new Squares(40, 2, 100);
    const auto start = std::chrono::steady_clock::now();
    run(workers, *work, 40);
    const auto took = std::chrono::steady_clock::now() - start;
    CHECK(took < std::chrono::milliseconds(80));
    work->release();
    std::this_thread::sleep_for(std::chrono::milliseconds(120));
  }
}

TEST_CASE("a parked helper wakes for later work") {
  Workers workers(2);
  int helped = 0;
  for (int round = 0; round < 50 && helped == 0; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));  // long enough to park
    auto* work = new Squares(200, 2, 0, 20);
    run(workers, *work, 200);
    helped += work->helped();
    work->release();
  }
  CHECK(helped > 0);  // on a loaded machine a helper may miss some rounds, not all
}

#if defined(__linux__)
TEST_CASE("a helper is kept off the CPU of the one that wakes it, and only where there is another") {
  const auto cpus_of = [](pid_t thread) {
    cpu_set_t cpus;
    REQUIRE(sched_getaffinity(thread, sizeof(cpus), &cpus) == 0);
    return cpus;
  };
  const auto allow = [](pid_t thread, const cpu_set_t& cpus) {
    REQUIRE(sched_setaffinity(thread, sizeof(cpus), &cpus) == 0);
  };
  Placement placement;
  std::atomic<pid_t> id{0};
  std::atomic<int> turn{0};
  const auto await = [&](int wanted) {
    while (turn.load() != wanted) std::this_thread::yield();
  };
  std::thread helper([&] {
    id = gettid();
    await(1);
    placement.settle();
    turn = 2;
    await(3);
  });
  while (id == 0) std::this_thread::yield();
  const cpu_set_t all = cpus_of(0);
  const int here = sched_getcpu();
  cpu_set_t only;
  CPU_ZERO(&only);
  CPU_SET(here, &only);
  allow(0, only);
  allow(id, only);
  turn = 1;
  await(2);
  placement.keep_clear();  // its caller may use no other CPU
  cpu_set_t now = cpus_of(id);
  CHECK(CPU_EQUAL(&now, &only));

  allow(0, all);
  placement.keep_clear();
  now = cpus_of(id);
  if (sched_getcpu() == here && CPU_COUNT(&all) > 1) {  // we were not moved meanwhile
    CHECK_FALSE(CPU_ISSET(here, &now));
    CHECK(CPU_COUNT(&now) == CPU_COUNT(&all) - 1);
  }
  turn = 3;
  helper.join();
}
#endif

TEST_CASE("workers stop while idle, parked or never used") {
  for (int round = 0; round < 20; ++round) {
    Workers workers(3);
    if (round % 2 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}
