#include "mlx_od_moe/prefetch_policy.h"

#include <doctest/doctest.h>

#include <cmath>
#include <set>
#include <stdexcept>
#include <utility>

using namespace mlx_od_moe;

namespace {

using Experts = std::vector<LikelyExpert>;
using Reads = std::vector<std::pair<int, int>>;

bool everything(int, int) { return true; }

Reads reads(PrefetchPolicy& policy, const std::function<bool(int, int)>& absent = everything) {
  Reads out;
  for (const PrefetchRead& read : policy.plan(absent)) out.push_back({read.layer, read.expert});
  return out;
}

PrefetchOptions options(float discount = .5f) { return {{3, 2}, {.1f, .2f}, discount, .5f}; }

}  // namespace

TEST_CASE("a plan orders reads by probability and distance") {
  PrefetchPolicy policy(5, 10, options());
  policy.reached(1);
  policy.predicted(2, Experts{{7, .9f}, {3, .35f}});
  policy.predicted(3, Experts{{5, .8f}, {6, .6f}});
  // .9, .8 / 2, .35, .6 / 2
  CHECK(reads(policy) == Reads{{2, 7}, {3, 5}, {2, 3}, {3, 6}});
  // Deadlines alone: 0 puts every nearer layer first.
  PrefetchPolicy nearest(5, 10, options(0));
  nearest.reached(1);
  nearest.predicted(3, Experts{{5, .8f}});
  nearest.predicted(2, Experts{{7, .1f}});
  CHECK(reads(nearest) == Reads{{2, 7}, {3, 5}});
}

TEST_CASE("a plan has what is absent, wide and likely enough, and within the lookahead") {
  PrefetchPolicy policy(5, 10, options());
  policy.reached(0);
  policy.predicted(1, Experts{{0, .9f}, {1, .8f}, {2, .7f}, {3, .6f}});
  policy.predicted(2, Experts{{0, .9f}, {1, .15f}});
  policy.predicted(3, Experts{{0, 1.f}});
  CHECK(reads(policy) == Reads{{1, 0}, {1, 1}, {1, 2}, {2, 0}});
  CHECK(reads(policy, [](int layer, int expert) { return layer == 1 && expert != 1; }) == Reads{{1, 0}, {1, 2}});
  CHECK(reads(policy, [](int, int) { return false; }).empty());
}

TEST_CASE("a fresher prediction cancels the one before, and a layer that is reached its own") {
  PrefetchPolicy policy(5, 10, options());
  policy.reached(0);
  policy.predicted(1, Experts{{4, .9f}, {5, .8f}});
  policy.predicted(1, Experts{{5, .7f}, {6, .6f}});
  CHECK(reads(policy) == Reads{{1, 5}, {1, 6}});
  CHECK(policy.probability(1, 4) == 0.f);
  CHECK(policy.probability(1, 5) == .7f);
  policy.predicted(2, Experts{{8, .9f}});
  policy.reached(1);
  CHECK(reads(policy) == Reads{{2, 8}});
  CHECK(policy.probability(1, 5) == 0.f);
}

TEST_CASE("layers follow each other across tokens, and never is the one at work read ahead") {
  PrefetchPolicy policy(2, 10, options());
  policy.reached(1);
  policy.predicted(0, Experts{{3, .9f}});
  policy.predicted(1, Experts{{3, .9f}});
  CHECK(reads(policy) == Reads{{0, 3}});
  PrefetchPolicy single(1, 10, options());
  single.reached(0);
  single.predicted(0, Experts{{3, .9f}});
  CHECK(reads(single).empty());
}

TEST_CASE("only what is predicted far less may be displaced") {
  PrefetchPolicy policy(3, 10, options());
  policy.reached(0);
  policy.predicted(1, Experts{{0, .9f}, {1, .44f}, {2, .4f}});
  policy.predicted(2, Experts{{3, .9f}});
  PrefetchRead first = policy.plan(everything)[0];
  REQUIRE(first.expert == 0);
  CHECK(policy.may_displace(first, 1));
  CHECK(policy.may_displace(first, 3));  // predicted, but of another layer
  CHECK_FALSE(policy.may_displace(first, 0));
  PrefetchRead last{1, 2, 1, .4f, .4f};
  CHECK_FALSE(policy.may_displace(last, 1));
}

TEST_CASE("what is no probability is no prediction, and bad options are refused") {
  PrefetchPolicy policy(3, 10, options());
  policy.reached(0);
  policy.predicted(1, Experts{{0, std::nanf("")}, {1, 0.f}, {2, .5f}});
  CHECK(reads(policy) == Reads{{1, 2}});
  policy.predicted(2, Experts{{4, .6f}, {4, .5f}});
  CHECK(reads(policy) == Reads{{1, 2}, {2, 4}});
  CHECK_THROWS_WITH_AS(policy.predicted(3, Experts{}), "[PrefetchPolicy] layer: it is one of 3, got 3",
                       std::invalid_argument);
  CHECK_THROWS_AS(policy.predicted(1, Experts{{3, .5f}, {10, .5f}}), std::invalid_argument);
  CHECK(policy.probability(1, 2) == .5f);  // a prediction that is refused changes nothing
  for (PrefetchOptions bad : {PrefetchOptions{{}, {}, .5f, .5f}, PrefetchOptions{{3}, {.1f, .1f}, .5f, .5f},
                              PrefetchOptions{{-1}, {.1f}, .5f, .5f}, PrefetchOptions{{3}, {1.1f}, .5f, .5f},
                              PrefetchOptions{{3}, {.1f}, -1.f, .5f}, PrefetchOptions{{3}, {.1f}, .5f, 2.f}}) {
    CHECK_THROWS_AS(PrefetchPolicy(3, 10, bad), std::invalid_argument);
  }
  CHECK_THROWS_AS(PrefetchPolicy(0, 10, options()), std::invalid_argument);
}
