"""Confidence: calibration and thresholds, against what is planted and against counting."""

import numpy as np
import pytest

from mlx_od_moe.confidence import Confidence
from mlx_od_moe.metrics import Recall, hits, rank, reads


def planted(rng, tokens: int, experts: int, sharpness: float):
    """Logits whose sigmoid is the probability that an expert is chosen, and who was."""
    logits = rng.normal(-1.0, sharpness, (tokens, 1, experts))
    taken = rng.random(logits.shape) < 1 / (1 + np.exp(-logits))
    ids = np.where(taken, np.arange(experts), -1)
    return logits, ids


@pytest.mark.parametrize("batches", [1, 4])
def test_true_probabilities_have_no_error_and_others_have(batches):
    logits, chosen = planted(np.random.default_rng(0), 20_000, 8, 2.0)
    true, loud = Confidence(1), Confidence(1)
    for part in np.array_split(np.arange(len(logits)), batches):
        true.add(logits[part], chosen[part])
        loud.add(3 * logits[part], chosen[part])
    assert true.calibration_error()[0] < 0.005
    assert loud.calibration_error()[0] > 0.03
    assert true.report()["expected_over_chosen"][0] == pytest.approx(1, abs=0.01)


def test_a_threshold_finds_what_counting_finds():
    logits, chosen = planted(np.random.default_rng(1), 500, 12, 2.0)
    confidence = Confidence(1)
    confidence.add(logits, chosen)
    for width in (1, 3, 6):
        best = np.sort(logits.ravel())[::-1][: width * 500]
        found = (logits >= best[-1]) & (chosen >= 0)
        expected = found.sum() / (chosen >= 0).sum()
        assert confidence.recall_by_threshold(width)[0] == pytest.approx(expected, abs=0.01)


def test_a_threshold_beats_a_fixed_number_where_tokens_differ():
    """Half of the tokens choose two experts for sure, half any: the reads go where they count."""
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 0.1, (1000, 1, 10))
    logits[::2, 0, :2] = 6.0
    logits[::2, 0, 2:] = -6.0
    taken = rng.random(logits.shape) < 1 / (1 + np.exp(-logits))
    chosen = np.where(taken, np.arange(10), -1)
    confidence = Confidence(1)
    confidence.add(logits, chosen)
    order = np.argsort(-logits, axis=-1)[..., :4]
    fixed = np.take_along_axis(taken, order, axis=-1).sum() / taken.sum()
    assert confidence.recall_by_threshold(4)[0] > fixed + 0.1


def test_a_report_compares_both_ways_at_the_same_numbers_of_reads():
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(500, 2, 24)).astype(np.float32)
    chosen = rank(scores + rng.normal(size=scores.shape), 6)
    recall = Recall(2, 6, confidence=Confidence(2))
    recall.add_scores(scores, chosen)
    report = recall.report()
    assert reads(6) == [3, 6, 9, 12]
    for n in reads(6):
        expected = hits(rank(scores, n), chosen).sum(axis=(0, 2)) / (500 * 6)
        np.testing.assert_allclose(report[f"recall_at_{n}"], expected)
        assert report[f"threshold_recall_at_{n}"] == recall.confidence.recall_by_threshold(n)
    assert report["recall_at_6"] == report["recall_at_k"]
