"""The simulator again, plainly, and random cases for both."""

import itertools

import numpy as np
from hypothesis import strategies as st

from mlx_od_moe.routing_trace import Predictions, RoutingTrace
from mlx_od_moe.simulate import Machine, Prefetching, simulate


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
