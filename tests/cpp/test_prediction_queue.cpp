#include "mlx_od_moe/prediction_queue.h"

#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <thread>
#include <vector>

using namespace mlx_od_moe;
using std::chrono::milliseconds;

namespace {

using Clock = PredictionQueue::Clock;

PredictionRecord record(uint64_t step, int id) {
  PredictionRecord r;
  r.step = step;
  r.count = 1;
  r.ids[0] = static_cast<int16_t>(id);
  return r;
}

// Every byte follows from `value`: a record put together from two is recognised.
PredictionRecord sealed(uint32_t value) {
  PredictionRecord r;
  r.ready_ns = static_cast<int64_t>(uint64_t{value} * 0x9e3779b97f4a7c15);
  for (int i = 0; i < PredictionRecord::kMaxIds; ++i) {
    r.ids[i] = static_cast<int16_t>(value * 31 + static_cast<uint32_t>(i));
    r.scores[i] = static_cast<float>(value % 4096) + static_cast<float>(i) / 16;
  }
  r.source_layer = static_cast<int16_t>(value >> 16);
  r.target_layer = static_cast<int16_t>(value);
  return r;
}

uint32_t value_of(const PredictionRecord& r) {
  return static_cast<uint32_t>(static_cast<uint16_t>(r.source_layer)) << 16 | static_cast<uint16_t>(r.target_layer);
}

bool intact(const PredictionRecord& r) {
  const PredictionRecord expected = sealed(value_of(r));
  return r.ready_ns == expected.ready_ns && std::equal(r.ids, r.ids + PredictionRecord::kMaxIds, expected.ids) &&
         std::equal(r.scores, r.scores + PredictionRecord::kMaxIds, expected.scores);
}

std::vector<int> drain(PredictionQueue& queue) {
  std::vector<int> ids;
  PredictionRecord out;
  while (queue.try_pop(out)) ids.push_back(out.ids[0]);
  return ids;
}

void check_identity(const QueueStatistics& s) { CHECK(s.pushed == s.popped + s.dropped + s.expired + s.waiting); }

}  // namespace

TEST_CASE("a full queue drops its oldest records and counts them") {
  PredictionQueue queue(4);
  for (int i = 0; i < 7; ++i) CHECK(queue.try_push(record(1, i)));
  CHECK(queue.statistics().dropped == 3);
  CHECK(drain(queue) == std::vector<int>{3, 4, 5, 6});
  const QueueStatistics s = queue.statistics();
  CHECK(s.pushed == 7);
  CHECK(s.popped == 4);
  CHECK(s.expired == 0);
  CHECK(s.waiting == 0);
}

TEST_CASE("a new step hides what the last one left, and counts it as expired") {
  PredictionQueue queue(8);
  queue.try_push(record(1, 10));
  queue.try_push(record(1, 11));
  SUBCASE("by a record") { CHECK(queue.try_push(record(2, 20))); }
  SUBCASE("by begin_step") {
    queue.begin_step(2);
    CHECK(queue.try_push(record(2, 20)));
  }
  CHECK(queue.step() == 2);
  CHECK(drain(queue) == std::vector<int>{20});
  CHECK(queue.statistics().expired == 2);
  CHECK(queue.statistics().popped == 1);
  check_identity(queue.statistics());
}

TEST_CASE("a record of an older step is refused, and steps never go back") {
  PredictionQueue queue(8);
  queue.begin_step(5);
  CHECK_FALSE(queue.try_push(record(4, 1)));
  queue.begin_step(3);
  CHECK(queue.step() == 5);
  CHECK(queue.try_push(record(5, 2)));
  CHECK(drain(queue) == std::vector<int>{2});
  CHECK(queue.statistics().expired == 1);
  CHECK(queue.statistics().pushed == 2);
  check_identity(queue.statistics());
}

TEST_CASE("an old record that is displaced counts as expired, not as dropped") {
  PredictionQueue queue(2);
  queue.try_push(record(1, 1));
  queue.try_push(record(1, 2));
  for (int i = 3; i < 6; ++i) queue.try_push(record(2, i));
  CHECK(queue.statistics().expired == 2);
  CHECK(queue.statistics().dropped == 1);
  CHECK(drain(queue) == std::vector<int>{4, 5});
  check_identity(queue.statistics());
}

TEST_CASE("a closed queue refuses records, gives out what it holds, then says that it is done") {
  PredictionQueue queue(4);
  queue.try_push(record(0, 1));
  queue.close();
  queue.close();
  CHECK_FALSE(queue.try_push(record(0, 2)));
  PredictionRecord out;
  CHECK(queue.wait_pop(out));
  CHECK(out.ids[0] == 1);
  CHECK_FALSE(queue.wait_pop(out));
  CHECK(queue.statistics().pushed == 1);
}

TEST_CASE("wait_pop gives up at its deadline, not before") {
  PredictionQueue queue(4);
  PredictionRecord out;
  for (const milliseconds patience : {milliseconds(0), milliseconds(30)}) {
    const auto deadline = Clock::now() + patience;
    CHECK_FALSE(queue.wait_pop(out, deadline));
    CHECK(Clock::now() >= deadline);
  }
}

TEST_CASE("a sleeping consumer is woken by a record and by close") {
  PredictionQueue queue(4);
  std::vector<int> ids;
  std::thread consumer([&] {
    PredictionRecord out;
    while (queue.wait_pop(out)) ids.push_back(out.ids[0]);
  });
  for (int i = 0; i < 3; ++i) {
    std::this_thread::sleep_for(milliseconds(5));  // long enough to fall asleep
    queue.try_push(record(0, i));
  }
  std::this_thread::sleep_for(milliseconds(5));
  queue.close();
  consumer.join();
  CHECK(ids == std::vector<int>{0, 1, 2});
}

TEST_CASE("close wakes every sleeping consumer") {
  PredictionQueue queue(4);
  std::atomic<int> done{0};
  std::vector<std::thread> consumers;
  for (int i = 0; i < 4; ++i) {
    consumers.emplace_back([&] {
      PredictionRecord out;
      while (queue.wait_pop(out)) continue;
      ++done;
    });
  }
  std::this_thread::sleep_for(milliseconds(5));
  queue.close();
  for (std::thread& consumer : consumers) consumer.join();
  CHECK(done == 4);
}

TEST_CASE("contending threads: no record is torn or repeated, and every one is accounted for") {
  constexpr uint32_t kEach = 20000;
  for (const size_t capacity : {size_t{2}, size_t{16}, size_t{1} << 17}) {
    PredictionQueue queue(capacity);
    std::vector<std::atomic<int>> seen(2 * kEach);
    std::atomic<uint64_t> torn{0}, popped{0}, pushed{0};
    std::vector<std::thread> consumers, producers;
    for (int c = 0; c < 2; ++c) {
      consumers.emplace_back([&] {
        PredictionRecord out;
        while (queue.wait_pop(out)) {
          ++popped;
          torn += !intact(out);
          if (value_of(out) < seen.size()) ++seen[value_of(out)];
        }
      });
    }
    for (uint32_t p = 0; p < 2; ++p) {
      producers.emplace_back([&, p] {
        for (uint32_t i = 0; i < kEach; ++i) pushed += queue.try_push(sealed(p * kEach + i));
      });
    }
    for (std::thread& thread : producers) thread.join();
    queue.close();
    for (std::thread& thread : consumers) thread.join();
    int repeated = 0;
    for (const auto& count : seen) repeated += count.load() > 1;
    CHECK(torn == 0);
    CHECK(repeated == 0);
    const QueueStatistics s = queue.statistics();
    CHECK(s.pushed == 2 * kEach);
    CHECK(s.popped == popped);
    CHECK(s.popped + s.dropped == s.pushed);
    if (capacity > 2 * kEach) CHECK(s.popped == 2 * kEach);
  }
}

TEST_CASE("steps that change while threads contend: nothing older than what a thread has seen comes out") {
  PredictionQueue queue(64);
  std::atomic<int> stale{0};
  std::vector<std::thread> consumers;
  for (int c = 0; c < 2; ++c) {
    consumers.emplace_back([&] {
      PredictionRecord out;
      for (;;) {
        const uint64_t before = queue.step();
        if (!queue.wait_pop(out)) break;
        stale += out.step < before;
      }
    });
  }
  for (uint64_t step = 0; step < 3000; ++step) {
    for (int i = 0; i < 5; ++i) queue.try_push(record(step, i));
  }
  queue.close();
  for (std::thread& consumer : consumers) consumer.join();
  CHECK(stale == 0);
  check_identity(queue.statistics());
}

TEST_CASE("a forked child uses and destroys the queue that a thread of its parent sleeps at") {
  auto queue = std::make_unique<PredictionQueue>(4);
  std::thread consumer([&] {
    PredictionRecord out;
    while (queue->wait_pop(out)) continue;
  });
  std::this_thread::sleep_for(milliseconds(5));
  const pid_t child = fork();
  if (child == 0) {
    alarm(10);  // a hang ends the child by a signal
    PredictionRecord out;
    bool right = queue->try_push(record(0, 9)) && queue->wait_pop(out) && out.ids[0] == 9;
    right = right && !queue->wait_pop(out, Clock::now() + milliseconds(1));
    queue->close();
    queue.reset();
    _exit(right ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
  queue->close();
  consumer.join();
}
