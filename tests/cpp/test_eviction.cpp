#include "mlx_od_moe/eviction.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>

using namespace mlx_od_moe;

namespace {

bool all(int) { return true; }

// Each policy again, as its source puts it, with no regard to cost.
struct Model {
  virtual ~Model() = default;
  virtual void access(int expert, bool resident) = 0;
  virtual void insert(int expert) = 0;
  virtual void evict(int expert) = 0;
  virtual void predict(int, float) {}
  virtual void next_step() {}
  virtual int victim(const std::set<int>& evictable) = 0;
};

// The lowest of (rank, time of the last use).
struct RankModel : Model {
  std::map<int, std::pair<double, int>> resident;
  int now = 0;

  virtual double rank(int) { return 0; }
  void access(int expert, bool is_resident) override {
    if (is_resident) resident[expert] = {rank(expert), ++now};
  }
  void insert(int expert) override { resident[expert] = {rank(expert), ++now}; }
  void evict(int expert) override { resident.erase(expert); }
  int victim(const std::set<int>& evictable) override {
    std::vector<std::pair<std::pair<double, int>, int>> order;
    for (auto [expert, place] : resident) {
      if (evictable.count(expert)) order.push_back({place, expert});
    }
    return order.empty() ? -1 : std::min_element(order.begin(), order.end())->second;
  }
};

struct LfudaModel : RankModel {
  std::map<int, double> count;
  double age = 0;

  double rank(int expert) override { return age + count[expert]; }
  void access(int expert, bool is_resident) override {
    count[expert] = std::min(12.0, count[expert] + 1);
    RankModel::access(expert, is_resident);
  }
  void evict(int expert) override {
    age = std::max(age, resident[expert].first);
    count[expert] /= 2;
    RankModel::evict(expert);
  }
};

struct LrfuModel : RankModel {
  std::map<int, std::vector<int>> uses;
  int step = 0;

  void next_step() override { ++step; }
  void access(int expert, bool is_resident) override {
    uses[expert].push_back(step);
    RankModel::access(expert, is_resident);
  }
  int victim(const std::set<int>& evictable) override {
    for (auto& [expert, place] : resident) {
      place.first = 0;
      for (int use : uses[expert]) place.first += std::pow(.97, step - use);
    }
    return RankModel::victim(evictable);
  }
};

struct ScoreModel : RankModel {
  std::map<int, float> scores;

  void predict(int expert, float score) override { scores[expert] = score; }
  void next_step() override { scores.clear(); }
  int victim(const std::set<int>& evictable) override {
    for (auto& [expert, place] : resident) place.first = scores.count(expert) ? double(scores[expert]) : -1.0;
    return RankModel::victim(evictable);
  }
};

// Algorithm 1 of the paper; where a cached object may not be evicted, it is passed over.
struct S3FifoModel : Model {
  std::deque<int> small, main, ghost;
  std::map<int, int> uses;
  size_t small_size, ghost_size;

  explicit S3FifoModel(int capacity)
      : small_size(size_t(std::max(1, capacity / 10))), ghost_size(size_t(std::max(1, capacity - int(small_size)))) {}

  static void erase(std::deque<int>& queue, int expert) {
    queue.erase(std::remove(queue.begin(), queue.end(), expert), queue.end());
  }
  void access(int expert, bool resident) override {
    if (resident) uses[expert] = std::min(uses[expert] + 1, 3);
  }
  void insert(int expert) override {
    auto remembered = std::find(ghost.begin(), ghost.end(), expert);
    (remembered != ghost.end() ? main : small).push_back(expert);
    if (remembered != ghost.end()) *remembered = -1;  // its place is freed in its turn
    uses[expert] = 0;
  }
  void evict(int expert) override {
    if (std::find(small.begin(), small.end(), expert) != small.end()) {
      ghost.push_back(expert);
      if (ghost.size() > ghost_size) ghost.pop_front();
    }
    erase(small, expert);
    erase(main, expert);
  }
  int victim(const std::set<int>& evictable) override {
    if (small.size() >= small_size) {
      for (int expert : std::deque<int>(small)) {
        if (uses[expert] > 1) {
          erase(small, expert);
          main.push_back(expert);
          uses[expert] = 0;
        } else if (evictable.count(expert)) {
          return expert;
        }
      }
    }
    for (int round = 0; round < 4; ++round) {
      for (int expert : std::deque<int>(main)) {
        if (!evictable.count(expert)) continue;
        if (uses[expert] == 0) return expert;
        --uses[expert];
        erase(main, expert);
        main.push_back(expert);
      }
    }
    for (int expert : small) {
      if (evictable.count(expert)) return expert;
    }
    return -1;
  }
};

std::unique_ptr<Model> make_model(const std::string& name, int capacity) {
  if (name == "lru") return std::make_unique<RankModel>();
  if (name == "lfuda") return std::make_unique<LfudaModel>();
  if (name == "lrfu") return std::make_unique<LrfuModel>();
  if (name == "score") return std::make_unique<ScoreModel>();
  return std::make_unique<S3FifoModel>(capacity);
}

// A layer in the hands of a policy and of its model: demands and prefetches come at random, some experts
// are leased, and now and then one leaves that nobody chose (a read that failed).
void check_against_model(const std::string& name, unsigned seed) {
  std::mt19937 random(seed);
  auto below = [&](int bound) { return int(random() % unsigned(bound)); };
  int experts = 1 + below(24), capacity = 1 + below(experts);
  auto policy = make_eviction_policy(name, experts, capacity);
  auto model = make_model(name, capacity);
  std::set<int> resident;
  auto evict = [&](int expert) {
    policy->evicted(expert);
    model->evict(expert);
    resident.erase(expert);
  };
  for (int i = 0; i < 400; ++i) {
    // Few experts are wanted often.
    int expert = std::min(below(experts), below(experts));
    int kind = below(20);
    if (kind == 0) {
      policy->next_step();
      model->next_step();
    } else if (kind == 1 && resident.count(expert)) {
      evict(expert);
    } else if (kind < 6) {
      float score = float(below(5)) / 4;
      policy->predicted(expert, score);
      model->predict(expert, score);
    } else {
      bool prefetch = below(4) == 0;
      if (!prefetch) {
        policy->accessed(expert);
        model->access(expert, resident.count(expert) > 0);
      }
      if (resident.count(expert)) continue;
      if (int(resident.size()) == capacity) {
        std::set<int> evictable;
        for (int e : resident) {
          if (below(4)) evictable.insert(e);
        }
        int expected = model->victim(evictable);
        CHECK((expected == -1) == evictable.empty());
        REQUIRE(policy->victim([&](int e) { return evictable.count(e) > 0; }) == expected);
        if (expected == -1) continue;
        evict(expected);
      }
      policy->inserted(expert, prefetch);
      model->insert(expert);
      resident.insert(expert);
    }
  }
}

// Demands in order, with room made when there is none; the number of those that were not resident.
int misses(EvictionPolicy& policy, int capacity, const std::vector<int>& demands) {
  std::set<int> resident;
  int missed = 0;
  for (int expert : demands) {
    policy.accessed(expert);
    if (resident.count(expert)) continue;
    ++missed;
    if (int(resident.size()) == capacity) {
      int victim = policy.victim(all);
      REQUIRE(resident.erase(victim) == 1);
      policy.evicted(victim);
    }
    policy.inserted(expert, false);
    resident.insert(expert);
  }
  return missed;
}

}  // namespace

TEST_CASE("every eviction policy chooses as its plain model does") {
  for (const std::string& name : eviction_policies()) {
    CAPTURE(name);
    for (unsigned seed = 0; seed < 300; ++seed) {
      CAPTURE(seed);
      check_against_model(name, seed);
    }
  }
}

TEST_CASE("what is in constant use survives a scan: under lfuda and s3fifo, not under lru") {
  std::vector<int> demands;
  for (int i = 0; i < 8; ++i) demands.insert(demands.end(), {0, 1});
  for (int expert = 2; expert < 30; ++expert) demands.push_back(expert);
  demands.insert(demands.end(), {0, 1});
  CHECK(misses(*make_eviction_policy("lru", 30, 4), 4, demands) == 2 + 28 + 2);
  CHECK(misses(*make_eviction_policy("s3fifo", 30, 4), 4, demands) == 2 + 28);
  // Ageing lets a scan that goes on win: a few newcomers do not.
  demands.erase(demands.begin() + 16 + 8, demands.end() - 2);
  CHECK(misses(*make_eviction_policy("lru", 30, 4), 4, demands) == 2 + 8 + 2);
  CHECK(misses(*make_eviction_policy("lfuda", 30, 4), 4, demands) == 2 + 8);
}

TEST_CASE("lfuda forgets what was wanted long ago") {
  auto policy = make_eviction_policy("lfuda", 40, 2);
  std::vector<int> demands(12, 0);
  for (int i = 0; i < 40; ++i) demands.push_back(1 + i % 30);
  demands.push_back(0);
  CHECK(misses(*policy, 2, demands) == 1 + 40 + 1);
}

TEST_CASE("lrfu keeps its order however long it runs") {
  auto policy = make_eviction_policy("lrfu", 8, 4);
  for (int expert = 0; expert < 4; ++expert) policy->inserted(expert, false);
  // Enough steps for what a use is worth to start at 1 again, several times.
  for (int step = 0; step < 30000; ++step) {
    policy->accessed(3);
    if (step % 2 == 0) policy->accessed(1);
    if (step % 3 == 0) policy->accessed(0);
    policy->next_step();
  }
  for (int expert : {2, 0, 1, 3}) {
    CHECK(policy->victim(all) == expert);
    policy->evicted(expert);
  }
}

TEST_CASE("score keeps what is predicted, until the step is over") {
  auto policy = make_eviction_policy("score", 8, 4);
  for (int expert = 0; expert < 4; ++expert) policy->inserted(expert, true);
  policy->predicted(0, .9f);
  policy->predicted(1, .5f);
  CHECK(policy->victim(all) == 2);
  CHECK(policy->victim([](int expert) { return expert < 2; }) == 1);
  policy->predicted(1, .95f);  // the newest prediction holds
  CHECK(policy->victim([](int expert) { return expert < 2; }) == 0);
  policy->next_step();
  CHECK(policy->victim(all) == 0);
}

TEST_CASE("eviction policies refuse what cannot be") {
  CHECK_THROWS_WITH_AS(make_eviction_policy("fifo", 8, 4),
                       "[eviction] policy 'fifo': it is lru, lfuda, lrfu, s3fifo or score", std::invalid_argument);
  for (int capacity : {-1, 0, 9}) CHECK_THROWS_AS(make_eviction_policy("lru", 8, capacity), std::invalid_argument);
  for (const std::string& name : eviction_policies()) {
    CAPTURE(name);
    auto policy = make_eviction_policy(name, 8, 4);
    CHECK(policy->victim(all) == -1);
    for (int expert : {-1, 8}) {
      CHECK_THROWS_AS(policy->accessed(expert), std::invalid_argument);
      CHECK_THROWS_AS(policy->predicted(expert, 1.f), std::invalid_argument);
    }
    CHECK_THROWS_AS(policy->evicted(3), std::logic_error);
    policy->inserted(3, false);
    CHECK_THROWS_WITH_AS(policy->inserted(3, true), "[eviction] inserting expert 3, which is resident",
                         std::logic_error);
    CHECK(policy->victim([](int) { return false; }) == -1);
    CHECK(policy->victim(all) == 3);
  }
}
