"""The replay simulator: its counts and its clock against plain models, and figures known before."""

import functools
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_od_moe.assumed_routing import assume_predictions, assume_routes
from mlx_od_moe.cli import main
from mlx_od_moe.routing_trace import Predictions, RoutingTrace, open_routing, predict_layers
from mlx_od_moe.simulate import (
    POLICIES,
    Machine,
    Prefetching,
    parse_capacity,
    plot,
    simulate,
    table,
)
from mlx_od_moe.token_table import TokenTable
from mlx_od_moe.training import FitOptions, TrainingOptions, train_shadow_model
from planted_traces import EXPERTS, TOP_K, plant

SHARED = Path(__file__).parents[2] / "shared" / "traces" / "small-routing.npz"


def random_trace(tokens, layers, num_experts, top_k, seed=0) -> RoutingTrace:
    rng = np.random.default_rng(seed)
    affinity = rng.random((tokens, layers, num_experts)) + rng.random((layers, num_experts))
    return RoutingTrace(np.argsort(-affinity)[..., :top_k].astype(np.int16), num_experts)


def replay(trace, capacity, policy="lru", method="none", machine=None, predictions=None, **options):
    """The one run of that policy and method."""
    machine = machine or Machine()
    result = simulate(
        trace, capacity, [policy], [machine], predictions, Prefetching(**options), oracles=True
    )
    return next(r for r in result["runs"] if (r["policy"], r["method"]) == (policy, method))


def predicted(trace, likely, lookahead=4, width=4) -> Predictions:
    """Predictions that `likely(token, source, distance)` lists as (expert, probability)."""
    out = Predictions.empty(trace, lookahead, width)
    for place in itertools.product(*map(range, out.ids.shape[:3])):
        for i, (expert, probability) in enumerate(likely(*place[:2], place[2] + 1)[:width]):
            out.ids[(*place, i)] = expert
            out.probabilities[(*place, i)] = probability
    return out


class PlainReplay:
    """The simulator again for LRU, as its header puts it, with lists and no regard to cost."""

    def __init__(self, trace, capacity, machine, predictions, prefetching):
        self.trace, self.capacity, self.machine = trace, capacity, machine
        self.predictions, self.prefetching = predictions, prefetching
        layers = trace.experts.shape[1]
        self.order = [[] for _ in range(layers)]  # held, least recently used first
        self.ready, self.unused, self.likely = {}, set(), [{} for _ in range(layers)]
        self.now = self.disk = self.stall = 0.0
        self.counts = dict.fromkeys(("hits", "late", "misses", "prefetched", "wasted"), 0)

    def run(self):
        tokens, layers, _ = self.trace.experts.shape
        self.learn(0, 0)
        for token, layer in itertools.product(range(tokens), range(layers)):
            self.demand(layer, self.trace.experts[token, layer].tolist())
            self.learn(token, layer + 1)
            m = self.machine
            if layer + 1 < layers:
                self.compute(layer, m.layer_time)
                continue
            known = m.layer_time * m.first_attention
            self.compute(layer, m.layer_time + m.token_time - known)
            if token + 1 < tokens:
                self.learn(token + 1, 0)
            self.compute(layer, known)
        return self

    def learn(self, token, source):
        ids, probabilities = self.predictions.ids, self.predictions.probabilities
        for d in range(min(ids.shape[2], len(self.order) - source)):
            row = zip(ids[token, source, d], probabilities[token, source, d], strict=True)
            if ids[token, source, d, 0] >= 0:
                self.likely[source + d] = {int(e): float(p) for e, p in row if e >= 0}

    def demand(self, layer, experts):
        ready, missing = self.now, []
        for expert in experts:
            if expert not in self.order[layer]:
                self.counts["misses"] += 1
                missing.append(expert)
                continue
            self.counts["late" if self.ready[layer, expert] > self.now else "hits"] += 1
            self.unused.discard((layer, expert))
            ready = max(ready, self.ready[layer, expert])
            self.order[layer].remove(expert)
            self.order[layer].append(expert)
        for expert in missing:
            free = [e for e in self.order[layer] if e not in experts]
            idle = [e for e in free if self.ready[layer, e] <= self.now]
            self.read(layer, expert, idle or free)
            ready = max(ready, self.ready[layer, expert])
        self.stall += ready - self.now
        self.now, self.likely[layer] = ready, {}

    def read(self, layer, expert, victims):
        if len(self.order[layer]) == self.capacity:
            self.order[layer].remove(victims[0])
            self.counts["wasted"] += (layer, victims[0]) in self.unused
            self.unused.discard((layer, victims[0]))
        self.order[layer].append(expert)
        self.disk = max(self.disk, self.now) + self.machine.read_time
        self.ready[layer, expert] = self.disk + self.machine.latency

    def compute(self, reached, duration):
        end, p, reads = self.now + duration, self.prefetching, []
        for distance in range(1, min(p.lookahead, len(self.order) - 1) + 1):
            layer = (reached + distance) % len(self.order)
            named = list(self.likely[layer].items())[: p.widths[distance - 1]]
            for expert, chance in named:
                if chance >= p.thresholds[distance - 1] and expert not in self.order[layer]:
                    reads.append((-chance * p.discount ** (distance - 1), distance, expert, layer))
        for _, _, expert, layer in sorted(reads):
            start = max(self.disk, self.now)
            if self.disk >= end:
                break
            likely = self.likely[layer]
            victims = [
                e
                for e in self.order[layer]
                if self.ready[layer, e] <= start and likely.get(e, 0) < p.margin * likely[expert]
            ]
            if len(self.order[layer]) == self.capacity and not victims:
                continue
            self.read(layer, expert, victims)
            self.unused.add((layer, expert))
            self.counts["prefetched"] += 1
        self.now = end


@st.composite
def replays(draw):
    """A small trace, its predictions (some right, some not), a machine and settings."""
    layers, top_k = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    num_experts = draw(st.integers(top_k, 8))
    seed = draw(st.integers(0, 10_000))
    trace = random_trace(draw(st.integers(1, 12)), layers, num_experts, top_k, seed)
    rng = np.random.default_rng(seed)

    def likely(token, source, distance):
        if source + distance > layers or rng.random() < 0.2:
            return []
        chosen = trace.experts[token, source + distance - 1]
        chances = rng.integers(1, 16, num_experts) / 32
        chances[chosen] += rng.choice([0, 0.5], len(chosen))
        return [(e, chances[e]) for e in np.argsort(-chances, kind="stable")]

    lookahead = draw(st.integers(1, 4))
    # Powers of two, so that both sides add times without rounding.
    machine = Machine(
        layer_time=1.0,
        read_time=draw(st.sampled_from([0, 1 / 16, 1 / 4, 1 / 2, 2])),
        latency=draw(st.sampled_from([0, 1 / 8, 1.5])),
        token_time=draw(st.sampled_from([0, 0.5])),
        first_attention=draw(st.sampled_from([0, 0.5, 1])),
    )
    prefetching = Prefetching(
        widths=tuple(draw(st.lists(st.integers(0, 8), min_size=lookahead, max_size=lookahead))),
        thresholds=(draw(st.sampled_from([0, 0.25])),) * lookahead,
        discount=draw(st.sampled_from([0.0, 0.5, 1.0])),
        margin=draw(st.sampled_from([0.0, 0.5, 1.0])),
    )
    capacity = draw(st.integers(top_k, num_experts))
    return trace, capacity, machine, predicted(trace, likely, lookahead, 8), prefetching


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


def test_assumed_predictions_have_the_recall_that_was_asked_for():
    trace = assume_routes(600, 6, 64, 8, seed=1)
    into = Predictions.empty(trace, 4, 64)
    asked = [0.99, 0.97, 0.95, 0.9]
    assume_predictions(into, trace, asked, range(6), lambda n: None)
    for d, recall in enumerate(asked):
        ids, p = into.ids[:, : 6 - d, d], into.probabilities[:, : 6 - d, d]
        right = (ids[..., None] == trace.experts[:, d:, None]).any(-1)
        assert right[..., :16].sum() / right.sum() == pytest.approx(recall, abs=0.01)
        assert p.sum() / right.sum() == pytest.approx(1, abs=0.02), "calibrated"
        sure = p > 0.8
        assert right[sure].mean() == pytest.approx(p[sure].mean(), abs=0.02)
    with pytest.raises(ValueError, match="recall: it lies in 0"):
        assume_predictions(into, trace, [1.5], range(6), lambda n: None)


def test_better_predictions_hit_more():
    trace = assume_routes(400, 8, 64, 8)
    rates = []
    for recall in (0.6, 0.9, 0.99):
        into = Predictions.empty(trace, 4, 16)
        assume_predictions(into, trace, [recall] * 4, range(8), lambda n: None)
        run = replay(trace, 16, method="predicted", predictions=into)
        rates.append(run["hit_rate"])
    oracle = replay(trace, 16, method="oracle")["hit_rate"]
    none = replay(trace, 16)["hit_rate"]
    assert none < rates[0] < rates[1] < rates[2] < oracle


def test_token_table_counts():
    table = TokenTable(2, 4)
    assert table.predict(5).tolist() == [[0] * 4] * 2
    table.observe(np.array([5]), np.array([[[0, 1], [2, 3]]]))
    both = np.array([[[0, 2], [2, -1]], [[3, 1], [0, 1]]])
    table.observe(np.array([5, 6]), both)
    average = np.array([[2, 2, 1, 1], [1, 1, 2, 1]]) / 3
    counts = np.array([[2, 1, 1, 0], [0, 0, 2, 1]])
    assert table.predict(5) == pytest.approx((counts + average) / (2 + 1))
    assert table.predict(7) == pytest.approx(average)


@pytest.mark.parametrize(
    ("text", "experts"), [("25%", 16), ("20%", 12), ("100%", 64), ("18", 18), ("2.4GB", 25)]
)
def test_capacity_is_understood(text, experts):
    assert parse_capacity(text, layers=4, num_experts=64, expert_bytes=24_000_000) == experts


def test_the_first_layer_may_have_more_room(tmp_path):
    out = tmp_path / "result.json"
    arguments = ["simulate", "--assume-routes", "5x64x8", "--tokens", "200", "--json", str(out)]
    assert main([*arguments, "--first-capacity", "32"]) == 0
    result = json.loads(out.read_text())
    assert result["capacity"] == [32, 12, 12, 12, 12]
    first, *others = result["runs"][0]["hit_rate_per_layer"]
    assert first > max(others) + 0.1


def test_capacity_that_means_nothing_is_refused():
    for text, why in (("much", "give 25%"), ("8GB", "needs the bytes of one expert")):
        with pytest.raises(ValueError, match=why):
            parse_capacity(text, 4, 64)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Traces with a planted structure, and a predictor trained on them."""
    folder = tmp_path_factory.mktemp("recorded")
    traces, predictor = plant(folder / "traces").path, folder / "predictor.safetensors"
    options = TrainingOptions(
        predictor_size=24, candidates=("mlp+gate",), fit=FitOptions(epochs=5, learning_rate=5e-3)
    )
    train_shadow_model(traces, predictor, options, progress=False)
    return traces, predictor


def test_a_predictor_speaks_of_the_layers_that_follow(recorded):
    trace = open_routing(recorded[0])
    assert trace.experts.shape[1:] == (3, TOP_K)
    assert trace.num_experts == EXPERTS
    into = Predictions.empty(trace, 2, EXPERTS)
    predict_layers(into, trace, recorded[1], "f32", lambda n: None)
    assert (into.ids[:, 0] == -1).all(), "the token itself was not asked"
    assert (into.ids[:, 2, 1] == -1).all(), "there is no layer that far"
    for source, distance in ((1, 1), (1, 2), (2, 1)):
        likely = into.ids[:, source, distance - 1, :TOP_K, None, None]
        overlap = (likely == trace.experts[:, None]).sum((0, 1, 3))
        assert overlap.argmax() == source + distance - 1
    fewer = open_routing(recorded[0], tokens=200)
    less = Predictions.empty(fewer, 2, EXPERTS)
    predict_layers(less, fewer, recorded[1], "f32", lambda n: None)
    assert (less.ids == into.ids[:200]).all()


def test_the_command_replays_and_writes(recorded, tmp_path, capsys):
    out, figure = tmp_path / "result.json", tmp_path / "figure.png"
    arguments = ["simulate", "--trace", str(recorded[0]), "--predictor", str(recorded[1])]
    arguments += ["--capacity", "50%", "--policy", "lru", "belady", "--widths", "6", "6"]
    arguments += ["--thresholds", ".05", ".05", "--experts-per-layer-time", "2", "4"]
    assert main([*arguments, "--json", str(out), "--plot", str(figure)]) == 0
    result = json.loads(out.read_text())
    runs = {(r["policy"], r["method"], r["reads_per_layer"]): r for r in result["runs"]}
    assert len(runs) == 2 * 2 * 4
    assert result["hit_rate"] == runs["lru", "predicted", 2.0]["hit_rate"]
    ours, without = (runs["lru", method, 4.0]["hit_rate"] for method in ("predicted", "none"))
    assert ours > without + 0.1
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert f"{ours:.3f}" in capsys.readouterr().out


def test_the_command_plans_a_machine(tmp_path, capsys):
    out = tmp_path / "plan.json"
    arguments = ["simulate", "--assume-routes", "6x64x8", "--tokens", "200", "--capacity", "1.5GB"]
    arguments += ["--assume-recall", ".98", ".97", ".96", ".95", "--bandwidth", "6", "--layer-ms"]
    arguments += ["4", "--latency", "0.1", "--expert-bytes", "8e6", "--no-oracles"]
    assert main([*arguments, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    run = next(r for r in result["runs"] if r["method"] == "predicted")
    assert result["capacity"] == [31] * 6
    assert run["reads_per_layer"] == pytest.approx(3)
    seconds = 200 / run["tokens_per_second"]
    assert seconds == pytest.approx(200 * 6 * 0.004 * (1 + run["stall"]))
    assert run["demand_bytes"] == 8e6 * run["counts"]["misses"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --trace or --assume-routes"),
        (["--assume-routes", "60"], "give layers x experts x top_k"),
        (["--assume-routes", "2x4x8"], "1 to num_experts experts a token"),
        (["--assume-routes", "2x8x2", "--bandwidth", "6"], "go together"),
        (["--assume-routes", "2x8x2", "--experts-per-layer-time", "0"], "must be positive"),
        (["--assume-routes", "2x8x2", "--capacity", "10%"], "capacity"),
        (["--assume-routes", "2x8x2", "--predictor", "p.safetensors"], "needs hidden states"),
        (["--assume-routes", "2x8x2", "--first-capacity", "3"], "leaves 1 for each other layer"),
        (["--trace", "missing.npz"], "missing.npz"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message, capsys):
    assert main(["simulate", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("mlx-od-moe simulate: ")


def test_an_npz_that_is_no_trace_is_refused(tmp_path):
    path = tmp_path / "routes.npz"
    np.savez(path, experts=np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"experts must be integers \[tokens, layers, top_k\]"):
        open_routing(path)
    np.savez(path, experts=np.arange(6).reshape(1, 2, 3), tokens=np.array([7]))
    trace = open_routing(path)
    assert trace.num_experts == 6
    assert trace.token_ids.tolist() == [7]
    assert open_routing(path, num_experts=8).num_experts == 8


def test_table_and_plot_name_every_run(tmp_path):
    result = simulate(random_trace(30, 3, 8, 2), 4, ["lru", "lrfu"], [Machine(), Machine(1, 0.5)])
    text = table(result)
    assert text.count("no prefetch") == 2 * 3
    assert text.count("oracle") == 2 * 2 * 2
    plot(result, tmp_path / "figure.png")
