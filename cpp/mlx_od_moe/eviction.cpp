#include "mlx_od_moe/eviction.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>

namespace mlx_od_moe {

namespace {

using Test = std::function<bool(int)>;

constexpr int kNone = -1;

// Some of the experts, in an order: a doubly linked list in two arrays, so that each is found by its id.
class Order {
 public:
  explicit Order(int experts) : next_(size_t(experts), kAbsent), previous_(size_t(experts), kNone) {}

  bool holds(int expert) const { return next_[size_t(expert)] != kAbsent; }
  int size() const { return size_; }
  // The oldest, and who came after an expert; -1: nobody.
  int front() const { return front_; }
  int after(int expert) const { return next_[size_t(expert)]; }

  void push_back(int expert) {
    next_[size_t(expert)] = kNone;
    previous_[size_t(expert)] = back_;
    (back_ == kNone ? front_ : next_[size_t(back_)]) = expert;
    back_ = expert;
    ++size_;
  }
  void remove(int expert) {
    int before = previous_[size_t(expert)], behind = next_[size_t(expert)];
    (before == kNone ? front_ : next_[size_t(before)]) = behind;
    (behind == kNone ? back_ : previous_[size_t(behind)]) = before;
    next_[size_t(expert)] = kAbsent;
    --size_;
  }
  void move_to_back(int expert) {
    remove(expert);
    push_back(expert);
  }
  int first(const Test& accepts) const {
    int expert = front_;
    while (expert != kNone && !accepts(expert)) expert = after(expert);
    return expert;
  }

 private:
  static constexpr int kAbsent = -2;
  std::vector<int> next_, previous_;
  int front_ = kNone, back_ = kNone, size_ = 0;
};

// What all policies share: the checks, and then calls of what differs.
class Checked : public EvictionPolicy {
 public:
  explicit Checked(int experts) : resident_(size_t(experts), 0) {}

  void accessed(int expert) final { on_access(expert, resident_[check(expert)]); }
  void inserted(int expert, bool prefetch) final {
    if (resident_[check(expert)]) fail("inserting", expert, "which is resident");
    resident_[size_t(expert)] = 1;
    on_insert(expert, prefetch);
  }
  void evicted(int expert) final {
    if (!resident_[check(expert)]) fail("evicting", expert, "which is not resident");
    resident_[size_t(expert)] = 0;
    on_evict(expert);
  }
  void predicted(int expert, float score) final {
    check(expert);
    on_prediction(expert, score);
  }
  void next_step() override {}

 protected:
  virtual void on_access(int expert, bool resident) = 0;
  virtual void on_insert(int expert, bool prefetch) = 0;
  virtual void on_evict(int expert) = 0;
  virtual void on_prediction(int, float) {}

 private:
  size_t check(int expert) const {
    if (expert >= 0 && size_t(expert) < resident_.size()) return size_t(expert);
    throw std::invalid_argument("[eviction] expert " + std::to_string(expert) + " of a layer of " +
                                std::to_string(resident_.size()) + " experts");
  }
  static void fail(const char* what, int expert, const char* why) {
    throw std::logic_error("[eviction] " + std::string(what) + " expert " + std::to_string(expert) + ", " + why);
  }
  std::vector<char> resident_;
};

class Lru final : public Checked {
 public:
  explicit Lru(int experts) : Checked(experts), used_(experts) {}
  int victim(const Test& evictable) override { return used_.first(evictable); }

 private:
  void on_access(int expert, bool resident) override {
    if (resident) used_.move_to_back(expert);
  }
  void on_insert(int expert, bool) override { used_.push_back(expert); }
  void on_evict(int expert) override { used_.remove(expert); }

  Order used_;
};

class Lfuda final : public Checked {
 public:
  explicit Lfuda(int experts)
      : Checked(experts), used_(experts), count_(size_t(experts), 0.f), rank_(size_t(experts), 0.0) {}

  int victim(const Test& evictable) override {
    int best = kNone;
    for (int expert = used_.front(); expert != kNone; expert = used_.after(expert)) {
      if ((best == kNone || rank_[size_t(expert)] < rank_[size_t(best)]) && evictable(expert)) best = expert;
    }
    return best;
  }

 private:
  static constexpr float kHighestCount = 12.f, kKeptOfCount = .5f;

  void on_access(int expert, bool resident) override {
    count_[size_t(expert)] = std::min(count_[size_t(expert)] + 1.f, kHighestCount);
    if (resident) {
      used_.move_to_back(expert);
      rank(expert);
    }
  }
  void on_insert(int expert, bool) override {
    used_.push_back(expert);
    rank(expert);
  }
  void on_evict(int expert) override {
    used_.remove(expert);
    // Leases may let a lower rank stay: the age never falls.
    age_ = std::max(age_, rank_[size_t(expert)]);
    count_[size_t(expert)] *= kKeptOfCount;
  }
  void rank(int expert) { rank_[size_t(expert)] = age_ + double(count_[size_t(expert)]); }

  Order used_;
  std::vector<float> count_;  // of those not resident too
  std::vector<double> rank_;
  double age_ = 0;
};

class Lrfu final : public Checked {
 public:
  explicit Lrfu(int experts) : Checked(experts), used_(experts), value_(size_t(experts), 0.0) {}

  int victim(const Test& evictable) override {
    int best = kNone;
    for (int expert = used_.front(); expert != kNone; expert = used_.after(expert)) {
      if ((best == kNone || value_[size_t(expert)] < value_[size_t(best)]) && evictable(expert)) best = expert;
    }
    return best;
  }
  // Instead of every value falling, what a use is worth rises.
  void next_step() override {
    use_ /= kDecay;
    if (use_ < kLargestUse) return;
    for (double& value : value_) value /= use_;
    use_ = 1;
  }

 private:
  static constexpr double kDecay = .97, kLargestUse = 1e100;

  void on_access(int expert, bool resident) override {
    value_[size_t(expert)] += use_;
    if (resident) used_.move_to_back(expert);
  }
  void on_insert(int expert, bool) override { used_.push_back(expert); }
  void on_evict(int expert) override { used_.remove(expert); }

  Order used_;
  std::vector<double> value_;  // of those not resident too
  double use_ = 1;
};

class S3Fifo final : public Checked {
 public:
  S3Fifo(int experts, int capacity)
      : Checked(experts),
        small_(experts),
        main_(experts),
        uses_(size_t(experts), 0),
        dropped_(size_t(experts), kNever),
        small_size_(std::max(1, capacity / 10)),
        remembered_(std::max(1, capacity - small_size_)) {}

  int victim(const Test& evictable) override {
    int expert = small_.size() >= small_size_ ? victim_of_small(evictable) : victim_of_main(evictable);
    if (expert == kNone) expert = victim_of_main(evictable);
    // The queue that should give has nothing that may go: any other, oldest first.
    if (expert == kNone) expert = small_.first(evictable);
    return expert;
  }

 private:
  static constexpr int kMostUses = 3;
  static constexpr int64_t kNever = -1;

  // Newcomers that were used again go to the main queue, on the way to one that was not.
  int victim_of_small(const Test& evictable) {
    for (int expert = small_.front(), behind; expert != kNone; expert = behind) {
      behind = small_.after(expert);
      if (uses_[size_t(expert)] > 1) {
        small_.remove(expert);
        main_.push_back(expert);
        uses_[size_t(expert)] = 0;
      } else if (evictable(expert)) {
        return expert;
      }
    }
    return kNone;
  }

  // Each use is worth one more round. What may not go keeps its place and its uses.
  int victim_of_main(const Test& evictable) {
    for (int round = 0; round <= kMostUses; ++round) {
      int last = main_.size();
      for (int i = 0, expert = main_.front(), behind; i < last; ++i, expert = behind) {
        behind = main_.after(expert);
        if (!evictable(expert)) continue;
        if (uses_[size_t(expert)] == 0) return expert;
        --uses_[size_t(expert)];
        main_.move_to_back(expert);
      }
    }
    return kNone;
  }

  void on_access(int expert, bool resident) override {
    if (resident) uses_[size_t(expert)] = char(std::min<int>(uses_[size_t(expert)] + 1, kMostUses));
  }
  void on_insert(int expert, bool) override {
    int64_t& dropped = dropped_[size_t(expert)];
    bool remembered = dropped != kNever && drops_ - dropped <= remembered_;
    (remembered ? main_ : small_).push_back(expert);
    dropped = kNever;
    uses_[size_t(expert)] = 0;
  }
  void on_evict(int expert) override {
    if (main_.holds(expert)) return main_.remove(expert);
    small_.remove(expert);
    dropped_[size_t(expert)] = drops_++;
  }

  Order small_, main_;
  std::vector<char> uses_;
  // The ghost queue, by what it decides: the number of drops before this one, if it is remembered at all.
  std::vector<int64_t> dropped_;
  int64_t drops_ = 0;
  int small_size_, remembered_;
};

class Score final : public Checked {
 public:
  explicit Score(int experts) : Checked(experts), used_(experts), score_(size_t(experts), kUnpredicted) {}

  int victim(const Test& evictable) override {
    int best = kNone;
    for (int expert = used_.front(); expert != kNone; expert = used_.after(expert)) {
      if ((best == kNone || score_[size_t(expert)] < score_[size_t(best)]) && evictable(expert)) best = expert;
      if (best == expert && score_[size_t(best)] == kUnpredicted) break;
    }
    return best;
  }
  void next_step() override {
    for (int expert : predicted_) score_[size_t(expert)] = kUnpredicted;
    predicted_.clear();
  }

 private:
  static constexpr float kUnpredicted = -1.f;

  void on_access(int expert, bool resident) override {
    if (resident) used_.move_to_back(expert);
  }
  void on_insert(int expert, bool) override { used_.push_back(expert); }
  void on_evict(int expert) override { used_.remove(expert); }
  void on_prediction(int expert, float score) override {
    if (score_[size_t(expert)] == kUnpredicted) predicted_.push_back(expert);
    score_[size_t(expert)] = std::isfinite(score) ? std::clamp(score, 0.f, 1.f) : 0.f;
  }

  Order used_;
  std::vector<float> score_;
  std::vector<int> predicted_;
};

}  // namespace

std::vector<std::string> eviction_policies() { return {"lru", "lfuda", "lrfu", "s3fifo", "score"}; }

std::unique_ptr<EvictionPolicy> make_eviction_policy(const std::string& name, int num_experts, int capacity) {
  if (capacity < 1 || capacity > num_experts) {
    throw std::invalid_argument("[eviction] room for 1 to all of the layer's " + std::to_string(num_experts) +
                                " experts is needed, not for " + std::to_string(capacity));
  }
  if (name == "lru") return std::make_unique<Lru>(num_experts);
  if (name == "lfuda") return std::make_unique<Lfuda>(num_experts);
  if (name == "lrfu") return std::make_unique<Lrfu>(num_experts);
  if (name == "s3fifo") return std::make_unique<S3Fifo>(num_experts, capacity);
  if (name == "score") return std::make_unique<Score>(num_experts);
  throw std::invalid_argument("[eviction] policy '" + name + "': it is lru, lfuda, lrfu, s3fifo or score");
}

}  // namespace mlx_od_moe
