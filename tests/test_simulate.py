"""The replay simulator: its counts and its clock against plain models, and figures known before."""

import functools
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_od_moe.assumed_routing import assume_predictions, assume_routes
from mlx_od_moe.routing_trace import Predictions, RoutingTrace, open_routing
from mlx_od_moe.simulate import POLICIES, Machine, parse_capacity, plot, simulate, table
from plain_replay import PlainReplay, predicted, random_trace, replay, replays

SHARED = Path(__file__).parents[2] / "shared" / "traces" / "small-routing.npz"


@given(replays())
@settings(max_examples=200, deadline=None)
def test_counts_and_clock_are_those_of_the_plain_model(case):
    trace, capacity, machine, predictions, prefetching = case
    result = simulate(trace, capacity, ["lru"], [machine], predictions, prefetching, oracles=False)
    run = next(r for r in result["runs"] if r["method"] == "predicted")
    plain = PlainReplay(trace, capacity, machine, predictions, prefetching).run()
    assert {name: run["counts"][name] for name in plain.counts} == plain.counts
    assert run["counts"]["stall"] == plain.stall
    assert run["counts"]["time"] == plain.now


@given(replays(), st.sampled_from(POLICIES))
@settings(max_examples=100, deadline=None)
def test_identities_hold(case, policy):
    trace, capacity, machine, predictions, prefetching = case
    result = simulate(trace, capacity, [policy], [machine], predictions, prefetching)
    assert len(result["runs"]) == 4 + (policy != "belady")
    for run in result["runs"]:
        c = run["counts"]
        assert c["lookups"] == trace.experts.size == c["hits"] + c["late"] + c["misses"]
        used = c["useful"] + c["late"]
        assert c["prefetched"] == used + c["wasted"] + c["pending"]
        assert c["named"] <= used + c["misses"]
        tokens, layers, _ = trace.experts.shape
        computing = tokens * (layers * machine.layer_time + machine.token_time)
        assert c["time"] == pytest.approx(computing + c["stall"])
        if run["method"] in ("none", "belady"):
            assert c["prefetched"] == 0


def fewest_misses(sets, capacity) -> int:
    """Over every possible choice of what to evict."""

    @functools.cache
    def after(i, resident):
        if i == len(sets):
            return 0
        missing = sets[i] - resident
        surplus = max(0, len(resident) + len(missing) - capacity)
        leaving = itertools.combinations(sorted(resident - sets[i]), surplus)
        return len(missing) + min(after(i + 1, resident - {*out} | sets[i]) for out in leaving)

    return after(0, frozenset())


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_nothing_misses_less_than_belady(data):
    top_k = data.draw(st.integers(1, 3))
    num_experts = data.draw(st.integers(top_k + 1, 6))
    capacity = data.draw(st.integers(top_k, num_experts - 1))
    chosen = st.permutations(range(num_experts)).map(lambda order: order[:top_k])
    sets = data.draw(st.lists(chosen, min_size=1, max_size=9))
    trace = RoutingTrace(np.array(sets, np.int16)[:, None], num_experts)
    run = replay(trace, capacity, "belady")
    assert run["counts"]["misses"] == fewest_misses([frozenset(s) for s in sets], capacity)


def test_the_clock_of_a_demand():
    """Two misses, one after the other, and the latency of the last; then hits cost nothing."""
    trace = RoutingTrace(np.array([[[0, 1]], [[1, 0]], [[1, 2]]], np.int16), 4)
    run = replay(trace, 2, machine=Machine(1.0, 0.25, 0.125))
    assert run["counts"]["stall"] == (2 * 0.25 + 0.125) + 0 + (0.25 + 0.125)
    assert run["counts"]["time"] == 3 + run["counts"]["stall"]
    assert run["hit_rate"] == 0.5


def test_a_read_under_way_is_late_and_is_waited_for():
    trace = RoutingTrace(np.array([[[0], [1]]], np.int16), 4)
    right = predicted(trace, lambda t, s, d: [(1, 0.9)] if (s, d) == (1, 1) else [])
    run = replay(trace, 2, "lru", "predicted", Machine(1.0, 1.5), right)
    # Layer 0 misses (1.5), then the prefetch has 1 of the 1.5 that it needs.
    assert (run["counts"]["late"], run["counts"]["misses"]) == (1, 1)
    assert run["counts"]["stall"] == 1.5 + 0.5


def test_wrong_predictions_cost_reads_but_push_out_nothing_that_is_predicted():
    experts = np.tile(np.array([[[0], [1]]], np.int16), (20, 1, 1))
    trace = RoutingTrace(experts, 8)
    wrong = predicted(trace, lambda t, s, d: [(1, 0.9), (2 + t % 6, 0.8)] if s + d == 2 else [])
    run = replay(trace, 2, "lru", "predicted", predictions=wrong)
    assert run["hit_rate_per_layer"][1] == 1.0, "expert 1 is predicted: it stays"
    assert run["counts"]["wasted"] > 10
    blind = predicted(trace, lambda t, s, d: [(2 + t % 6, 0.9)] if s + d == 2 else [])
    run = replay(trace, 1, "lru", "predicted", predictions=blind)
    assert run["hit_rate_per_layer"][1] == 0.0, "without place for both, it pays for being wrong"


def test_an_oracle_on_a_fast_disk_misses_only_what_nobody_could_know():
    trace = random_trace(50, 6, 16, 3)
    run = replay(trace, 8, method="oracle", machine=Machine(read_time=0))
    assert run["counts"]["misses"] == 3, "the first token's; the others are known before"
    late = Machine(read_time=1e-3, first_attention=0)
    run = replay(trace, 8, method="oracle", machine=late)
    assert run["hit_rate_per_layer"][1:] == [1.0] * 5
    assert run["hit_rate_per_layer"][0] < 0.9
    run = replay(trace, 8, method="oracle_next_token", machine=late)
    assert run["counts"]["misses"] == 3, "the first token's first layer"


def test_bad_input_is_refused_by_name():
    trace = random_trace(4, 2, 8, 3)
    for capacity in (2, 9):
        with pytest.raises(ValueError, match=r"\[simulate\] capacity: .* 3 to all of its 8 .*got"):
            simulate(trace, capacity, ["lru"], [Machine()])
    with pytest.raises(ValueError, match=r"\[eviction\] policy 'fifo'"):
        simulate(trace, 4, ["fifo"], [Machine()])
    with pytest.raises(ValueError, match=r"token 0, layer 0 chose expert \d of 2"):
        simulate(replace(trace, num_experts=2), 2, ["lru"], [Machine()])
    twice = trace.experts.copy()
    twice[3, 1] = 5
    with pytest.raises(ValueError, match="token 3, layer 1 chose expert 5 twice"):
        simulate(replace(trace, experts=twice), 4, ["lru"], [Machine()])
    with pytest.raises(ValueError, match=r"\[PrefetchPolicy\] thresholds: as many as widths"):
        replay(trace, 4, widths=(16,))
    other = Predictions.empty(random_trace(3, 2, 8, 3), 4, 8)
    with pytest.raises(ValueError, match="predictions: they are"):
        replay(trace, 4, method="predicted", predictions=other)


@pytest.mark.skipif(not SHARED.exists(), reason="the shared traces are not on this machine")
@pytest.mark.parametrize(
    ("policy", "known"),
    [
        ("lru", [0.336, 0.433, 0.579, 0.708, 0.903]),
        ("belady", [0.538, 0.651, 0.788, 0.873, 0.965]),
    ],
)
def test_known_hit_rates_come_out(policy, known):
    """Measured before by other code, on 6,144 tokens of which it is not known which: within .01.

    Its LRU went expert by expert; here each of a token's experts is then a set of its own.
    """
    trace = open_routing(SHARED, tokens=6144)
    if policy == "lru":
        layers = trace.experts.shape[1]
        one_by_one = trace.experts.transpose(0, 2, 1).reshape(-1, layers, 1)
        trace = replace(trace, experts=np.ascontiguousarray(one_by_one))
    for share, rate in zip((20, 25, 37.5, 50, 75), known, strict=True):
        capacity = parse_capacity(f"{share}%", 12, 64)
        assert replay(trace, capacity, policy)["hit_rate"] == pytest.approx(rate, abs=0.01)


def test_what_must_be_reached_is_reached():
    """At a quarter resident and six reads per layer: 90 % hits, less wasted than used.

    With the recall that predictors have, on routing that is assumed; on recorded routing and with
    their own errors see docs/planning.md.
    """
    trace = assume_routes(1500, 12, 64, 8)
    into = Predictions.empty(trace, 4, 16)
    assume_predictions(into, trace, [0.985, 0.968, 0.951, 0.935], range(12), lambda n: None)
    run = replay(trace, 16, method="predicted", predictions=into)
    assert run["hit_rate"] >= 0.9
    assert run["wasted_per_useful"] <= 1.0


def test_table_and_plot_name_every_run(tmp_path):
    result = simulate(random_trace(30, 3, 8, 2), 4, ["lru", "lrfu"], [Machine(), Machine(1, 0.5)])
    text = table(result)
    assert text.count("no prefetch") == 2 * 3
    assert text.count("oracle") == 2 * 2 * 2
    plot(result, tmp_path / "figure.png")
