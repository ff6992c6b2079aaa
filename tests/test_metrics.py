"""The metrics against a brute-force reference that counts one id at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_od_moe.metrics import (
    Recall,
    absent,
    compute_top_k_accuracy,
    hits,
    mean_over_layers,
    rank,
)


@st.composite
def routings(draw: st.DrawFn, most_experts: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Scores [tokens, lookahead, experts] without ties, and chosen ids of which some are -1."""
    experts = draw(st.integers(2, most_experts))
    top_k = draw(st.integers(1, experts))
    tokens, lookahead = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scores = rng.permuted(np.broadcast_to(np.arange(experts), (tokens, lookahead, experts)), axis=2)
    chosen = np.argsort(rng.random((tokens, lookahead, experts)), axis=-1)[..., :top_k]
    if draw(st.booleans()):
        chosen = np.where(np.arange(top_k) >= draw(st.integers(0, top_k)), -1, chosen)
    return scores.astype(np.float32), chosen.astype(np.int16)


def count(scores: np.ndarray, chosen: np.ndarray, n: int) -> list[tuple[int, int, int]]:
    """Per distance: ids that are both predicted and chosen, chosen ids, and min(n, chosen)."""
    totals = []
    for d in range(scores.shape[1]):
        found = all_chosen = possible = 0
        for token in range(len(scores)):
            best = sorted(range(scores.shape[2]), key=lambda e: -scores[token, d, e])[:n]
            truth = {int(e) for e in chosen[token, d] if e >= 0}
            found += len(truth & set(best))
            all_chosen += len(truth)
            possible += min(n, len(truth))
        totals.append((found, all_chosen, possible))
    return totals


@settings(max_examples=150, deadline=None)
@given(routing=routings(), batch=st.integers(1, 4))
def test_a_report_equals_counting_by_hand(routing, batch):
    scores, chosen = routing
    top_k = chosen.shape[-1]
    recall = Recall(scores.shape[1], top_k)
    for i in range(0, len(scores), batch):
        recall.add(rank(scores[i : i + batch], recall.ranks), chosen[i : i + batch])
    report = recall.report()
    for name, n in (("recall_at_k", top_k), ("recall_at_2k", 2 * top_k)):
        expected = [found / max(1, every) for found, every, _ in count(scores, chosen, n)]
        assert report[name] == pytest.approx(expected)
    for n in (1, 4, 8):
        expected = [found / max(1, possible) for found, _, possible in count(scores, chosen, n)]
        assert report[f"top_{n}_accuracy"] == pytest.approx(expected)
    assert recall.tokens == len(scores)


@settings(max_examples=100, deadline=None)
@given(routing=routings(), data=st.data())
def test_top_k_accuracy_equals_counting_by_hand(routing, data):
    scores, chosen = routing
    k = data.draw(st.integers(1, scores.shape[-1]))
    totals = np.array(count(scores, chosen, k)).sum(axis=0)
    expected = totals[0] / max(1, totals[2])
    assert compute_top_k_accuracy(scores, chosen, k) == pytest.approx(expected)
    flat = scores.reshape(-1, scores.shape[-1]), chosen.reshape(-1, chosen.shape[-1])
    assert compute_top_k_accuracy(*flat, k) == pytest.approx(expected)


@pytest.mark.parametrize("top_k", [1, 2, 6, 8])
def test_perfect_scores_are_1_and_the_worst_are_0_at_every_n(top_k):
    rng = np.random.default_rng(0)
    perfect = rng.random((50, 4, 32))
    chosen = rank(perfect, top_k)
    recall, worst = Recall(4, top_k), Recall(4, top_k)
    recall.add(rank(perfect, recall.ranks), chosen)
    worst.add(rank(-perfect, worst.ranks), chosen)
    assert set(recall.report()) == set(worst.report())
    assert all(values == [1.0] * 4 for values in recall.report().values())
    assert all(values == [0.0] * 4 for values in worst.report().values())
    for k in (1, 4, 8):
        assert compute_top_k_accuracy(perfect, chosen, k) == 1.0


@pytest.mark.parametrize(("experts", "top_k"), [(64, 8), (16, 2)])
def test_random_scores_find_their_share(experts, top_k):
    rng = np.random.default_rng(1)
    chosen = rank(rng.random((20_000, 1, experts)), top_k)
    recall = Recall(1, top_k)
    recall.add(rank(rng.random((20_000, 1, experts)), recall.ranks), chosen)
    assert recall.at(top_k)[0] == pytest.approx(top_k / experts, abs=0.01)
    assert recall.at(2 * top_k)[0] == pytest.approx(2 * top_k / experts, abs=0.01)
    assert recall.top_n_accuracy(1)[0] == pytest.approx(top_k / experts, abs=0.01)


def test_absent_ids_are_neither_hits_nor_misses():
    scores = np.array([[4.0, 3.0, 2.0, 1.0]])
    assert compute_top_k_accuracy(scores, np.array([[0, -1]]), 2) == 1.0
    assert compute_top_k_accuracy(scores, np.array([[3, -1]]), 2) == 0.0
    recall = Recall(2, 2)
    recall.add(np.array([[[0, 1, 2, 3]] * 2]), np.array([[[0, -1], [-1, -1]]]))
    assert recall.at(2) == [1.0, 0.0]


@given(st.integers(0, 2**32), st.integers(1, 12))
def test_rank_is_best_first_and_stops_at_the_number_of_experts(seed, n):
    scores = np.random.default_rng(seed).permutation(8 * 5).reshape(5, 8).astype(np.float32)
    assert (rank(scores, n) == np.argsort(-scores, axis=-1)[:, :n]).all()


def test_hits_follow_the_predicted_order():
    assert hits(np.array([3, 1, 2]), np.array([2, 3])).tolist() == [True, False, True]


def test_shapes_that_disagree_and_k_out_of_range_are_errors():
    scores, chosen = np.zeros((5, 2, 8)), np.zeros((5, 3, 4), int)
    with pytest.raises(ValueError, match="agree"):
        compute_top_k_accuracy(scores, chosen)
    for k in (0, 9):
        with pytest.raises(ValueError, match=rf"1 … 8, got {k}"):
            compute_top_k_accuracy(scores, chosen[:, :2], k)


def test_the_mean_over_layers_counts_only_layers_that_reach_the_distance():
    reports = [{"recall_at_k": [0.2, 0.4]}, {"recall_at_k": [0.6]}]
    assert mean_over_layers(reports) == {"recall_at_k": [pytest.approx(0.4), pytest.approx(0.4)]}
    assert mean_over_layers([]) == {}


@settings(max_examples=100, deadline=None)
@given(routing=routings(), seed=st.integers(0, 2**32))
def test_exact_sets_and_shares_equal_counting_by_hand(routing, seed):
    scores, chosen = routing
    tokens, lookahead, top_k = chosen.shape
    weights = np.random.default_rng(seed).random(chosen.shape)
    recall = Recall(lookahead, top_k)
    recall.add(rank(scores, recall.ranks), chosen, {"some": weights})
    report = recall.report()
    for d in range(lookahead):
        exact, found, total = 0, {top_k: 0.0, 2 * top_k: 0.0}, 0.0
        for token in range(tokens):
            best = [int(e) for e in np.argsort(-scores[token, d])]
            truth = {int(e) for e in chosen[token, d] if e >= 0}
            exact += truth <= set(best[:top_k])
            for expert, weight in zip(chosen[token, d], weights[token, d], strict=True):
                total += weight * (expert >= 0)
                for n in found:
                    found[n] += weight * (expert >= 0 and int(expert) in best[:n])
        assert report["exact_set_rate"][d] == pytest.approx(exact / tokens)
        for name, n in (("k", top_k), ("2k", 2 * top_k)):
            expected = found[n] / max(total, 1e-30)
            assert report[f"some_recall_at_{name}"][d] == pytest.approx(expected)


@settings(max_examples=100, deadline=None)
@given(
    capacity=st.integers(3, 9),
    tokens=st.integers(1, 40),
    seed=st.integers(0, 2**32),
    blank=st.booleans(),
)
def test_absent_is_what_an_lru_cache_misses(capacity, tokens, seed, blank):
    rng = np.random.default_rng(seed)
    chosen = np.stack([rng.permutation(9)[:3] for _ in range(tokens)])
    if blank:
        chosen[rng.random(chosen.shape) < 0.3] = -1
    held: list[int] = []
    expected = []
    for ids in chosen:
        expected.append([e >= 0 and e not in held for e in ids])
        used = [int(e) for e in ids if e >= 0]
        held = ([e for e in held if e not in used] + used)[-capacity:]
    np.testing.assert_array_equal(absent(chosen, 9, capacity), expected)
