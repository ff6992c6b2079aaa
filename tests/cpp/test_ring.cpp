#include "mlx_od_moe/ring.h"

#include <doctest/doctest.h>

#include <functional>
#include <thread>
#include <vector>

using namespace mlx_od_moe;

namespace {

// Counts what is done to it. A value that was moved from is empty (-1).
struct Counted {
  static inline std::atomic<int> alive{0}, constructed{0}, copied{0};
  int value = -1;

  explicit Counted(int v = -1) : value(v) { born(); }
  Counted(const Counted& other) : value(other.value) {
    ++copied;
    born();
  }
  Counted(Counted&& other) noexcept : value(std::exchange(other.value, -1)) { born(); }
  Counted& operator=(const Counted& other) {
    value = other.value;
    ++copied;
    return *this;
  }
  Counted& operator=(Counted&& other) noexcept {
    value = std::exchange(other.value, -1);
    return *this;
  }
  ~Counted() { --alive; }

  static void born() {
    ++alive;
    ++constructed;
  }
  static void reset() { alive = constructed = copied = 0; }
};

int pop(Ring<Counted>& ring) {
  Counted out;
  return ring.try_pop(out) ? out.value : -1;
}

}  // namespace

TEST_CASE("a ring hands out in order what it was given, and is then empty") {
  Ring<Counted> ring(4);
  CHECK(ring.capacity() == 4);
  CHECK(pop(ring) == -1);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < 4; ++i) CHECK(ring.try_push(Counted(10 * round + i)));
    CHECK(ring.size_approx() == 4);
    for (int i = 0; i < 4; ++i) CHECK(pop(ring) == 10 * round + i);
    CHECK(pop(ring) == -1);
    CHECK(ring.size_approx() == 0);
  }
}

TEST_CASE("a push without room leaves the value with its owner") {
  Ring<Counted> ring(2);
  CHECK(ring.try_push(Counted(1)));
  CHECK(ring.try_push(Counted(2)));
  Counted third(3);
  CHECK_FALSE(ring.try_push(std::move(third)));
  CHECK(third.value == 3);
  CHECK(pop(ring) == 1);
  CHECK(ring.try_push(std::move(third)));
  CHECK(third.value == -1);
}

TEST_CASE("a displacing push drops the oldest, once, and hands it over") {
  Ring<Counted> ring(4);
  std::vector<int> displaced;
  const auto keep = [&](Counted&& old) { displaced.push_back(old.value); };
  for (int i = 0; i < 4; ++i) CHECK(ring.push(Counted(i), keep) == Pushed::yes);
  for (int i = 4; i < 7; ++i) CHECK(ring.push(Counted(i), keep) == Pushed::displaced_oldest);
  CHECK(displaced == std::vector<int>{0, 1, 2});
  for (int i = 3; i < 7; ++i) CHECK(pop(ring) == i);
  CHECK(pop(ring) == -1);
  CHECK(ring.accepted() == 7);
  CHECK(ring.removed() == 7);
}

TEST_CASE("a value is constructed in its slot by one move, never copied, and destroyed once") {
  Counted::reset();
  {
    Ring<Counted> ring(4);
    CHECK(Counted::constructed == 0);  // empty slots hold no value
    Counted value(7);
    ring.try_push(std::move(value));
    CHECK(Counted::constructed == 2);
    CHECK(Counted::alive == 2);
    Counted out;
    ring.try_pop(out);
    CHECK(out.value == 7);
    CHECK(Counted::constructed == 3);  // value, slot, out
    CHECK(Counted::alive == 2);        // value, out: the slot's is gone
    for (int i = 0; i < 9; ++i) ring.push(Counted(i), [](Counted&&) {});
    CHECK(Counted::alive == 2 + 4);
  }
  CHECK(Counted::alive == 0);  // the ring destroyed what was left in it
  CHECK(Counted::copied == 0);
}

TEST_CASE("a consumer that stalls makes its slot busy, and nothing waits for it") {
  // Moving out of the slot calls back in the midst of the pop.
  struct Stalls {
    std::function<void()>* during = nullptr;
    int value = 0;
    Stalls() = default;
    Stalls(std::function<void()>* d, int v) : during(d), value(v) {}
    Stalls(Stalls&&) noexcept = default;
    Stalls& operator=(Stalls&& other) noexcept {
      value = other.value;
      if (other.during != nullptr) (*other.during)();
      return *this;
    }
  };
  Ring<Stalls> ring(2);
  const auto ignore = [](Stalls&&) {};
  int stalled = 0;
  std::function<void()> during = [&] {
    ++stalled;
    // The other slot can still be pushed to and popped from, but not the one being read.
    Stalls next(nullptr, 3);
    CHECK(ring.push(std::move(next), ignore) == Pushed::slot_busy);
    CHECK(next.value == 3);
    CHECK_FALSE(ring.try_push(std::move(next)));
    Stalls second;
    CHECK(ring.try_pop(second));
    CHECK(second.value == 2);
  };
  CHECK(ring.try_push(Stalls(&during, 1)));
  CHECK(ring.try_push(Stalls(nullptr, 2)));
  Stalls out;
  CHECK(ring.try_pop(out));
  CHECK(out.value == 1);
  CHECK(stalled == 1);
  CHECK(ring.push(Stalls(nullptr, 4), ignore) == Pushed::yes);
  CHECK(ring.try_pop(out));
  CHECK(out.value == 4);
}

TEST_CASE("capacities are rounded up to powers of two; impossible ones are refused with the value") {
  CHECK(Ring<int>(1).capacity() == 2);
  CHECK(Ring<int>(5).capacity() == 8);
  CHECK(Ring<int>(64).capacity() == 64);
  CHECK_THROWS_WITH_AS(Ring<int>(0), doctest::Contains("got 0"), std::invalid_argument);
  CHECK_THROWS_AS(Ring<int>((size_t{1} << 31) + 1), std::invalid_argument);
}

TEST_CASE("contending threads lose, repeat and reorder nothing") {
  constexpr int kEach = 20000;
  for (const auto& [producers, consumers] : {std::pair{1, 1}, {2, 2}, {3, 1}, {1, 3}}) {
    Ring<Counted> ring(8);
    const int total = producers * kEach;
    std::vector<std::atomic<int>> seen(static_cast<size_t>(total));
    std::atomic<int> popped{0}, disordered{0};
    std::vector<std::thread> threads;
    for (int p = 0; p < producers; ++p) {
      threads.emplace_back([&, p] {
        for (int i = 0; i < kEach; ++i) {
          while (!ring.try_push(Counted(p * kEach + i))) std::this_thread::yield();
        }
      });
    }
    for (int c = 0; c < consumers; ++c) {
      threads.emplace_back([&, n = producers] {
        std::vector<int> last(static_cast<size_t>(n), -1);
        while (popped.load() < total) {
          Counted out;
          if (!ring.try_pop(out)) {
            std::this_thread::yield();
            continue;
          }
          ++popped;
          ++seen[static_cast<size_t>(out.value)];
          int& before = last[static_cast<size_t>(out.value / kEach)];
          disordered += out.value <= before;
          before = out.value;
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    int wrong = 0;
    for (const auto& count : seen) wrong += count.load() != 1;
    CHECK(wrong == 0);
    CHECK(disordered == 0);
  }
}
