"""The losses and their gradients against float64 numpy."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_od_moe._ext import cross_entropy
from mlx_od_moe._ext import soft_labels as native_soft_labels

from mlx_od_moe.router import Router, RouterConfig
from mlx_od_moe.training import losses
from mlx_od_moe.training.losses import LOSSES, TEMPERATURE, bce, kl, soft, soft_labels, softmax

TOKENS, LOOKAHEAD, EXPERTS, TOP_K = 5, 3, 10, 4


def sample(seed: int = 0, spread: float = 3.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = spread * rng.standard_normal((TOKENS, LOOKAHEAD, EXPERTS))
    chosen = np.argsort(rng.random(logits.shape), axis=-1)[..., :TOP_K].astype(np.int16)
    chosen[0, 1, 2:] = -1
    chosen[3, 0] = -1
    return logits, chosen, log_softmax(rng.standard_normal(logits.shape))


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def target(chosen: np.ndarray) -> np.ndarray:
    hot = np.zeros((TOKENS, LOOKAHEAD, EXPERTS))
    for token, d, j in np.ndindex(*chosen.shape):
        if chosen[token, d, j] >= 0:
            hot[token, d, chosen[token, d, j]] = 1
    return hot


def reference(name: str, logits: np.ndarray, chosen: np.ndarray, log_probs: np.ndarray) -> float:
    own, hot = log_softmax(logits), target(chosen)
    if name in ("bce", "soft"):
        hot = hot if name == "bce" else log_probs  # any numbers do for labels here
        p = 1 / (1 + np.exp(-logits))
        return float(-(hot * np.log(p) + (1 - hot) * np.log(1 - p)).mean())
    if name == "kl":
        return float((np.exp(log_probs) * (log_probs - own)).sum(-1).mean())
    return float(-(hot * own).sum() / hot.sum())


def arrays(*values: np.ndarray) -> list[mx.array]:
    return [mx.array(v) if v.dtype == np.int16 else mx.array(v.astype(np.float32)) for v in values]


@pytest.fixture(params=[True, False], ids=["native", "composed"], autouse=True)
def native(request, monkeypatch) -> None:
    monkeypatch.setattr(losses, "on_cpu", lambda: request.param)


def test_all_losses_are_tested():
    assert set(LOSSES) == {"soft", "bce", "kl", "softmax"}


@pytest.mark.parametrize("name", [*LOSSES])
@pytest.mark.parametrize("seed", range(3))
def test_a_loss_is_its_definition(name, seed):
    values = sample(seed)
    assert LOSSES[name](*arrays(*values)).item() == pytest.approx(reference(name, *values), 1e-5)


@pytest.mark.parametrize("name", [*LOSSES])
def test_gradients_are_those_of_the_definition(name):
    logits, chosen, log_probs = sample()
    found = mx.grad(LOSSES[name])(*arrays(logits, chosen, log_probs))
    expected, step = np.zeros_like(logits), 1e-6
    for index in np.ndindex(*logits.shape):
        moved = [logits.copy(), logits.copy()]
        moved[0][index] += step
        moved[1][index] -= step
        up, down = (reference(name, m, chosen, log_probs) for m in moved)
        expected[index] = (up - down) / (2 * step)
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", [*LOSSES])
def test_extreme_logits_stay_finite(name):
    logits, chosen, log_probs = sample(spread=1e4)
    loss, gradient = mx.value_and_grad(LOSSES[name])(*arrays(logits, chosen, log_probs))
    assert mx.isfinite(loss).item()
    assert mx.isfinite(gradient).all().item()


def test_perfect_logits_cost_nothing():
    _, chosen, log_probs = sample()
    hot = target(chosen)
    assert bce(*arrays(40 * (2 * hot - 1), chosen, log_probs)).item() == pytest.approx(0, abs=1e-6)
    assert kl(*arrays(log_probs + 5, chosen, log_probs)).item() == pytest.approx(0, abs=1e-6)
    uniform = softmax(*arrays(100 * hot, np.abs(chosen), log_probs))
    assert uniform.item() >= 0


def labels_by_hand(scores: np.ndarray, k: int) -> np.ndarray:
    ordered = np.sort(scores, axis=-1)[..., ::-1]
    bar = (ordered[..., k - 1 : k] + ordered[..., k : k + 1]) / 2
    return 1 / (1 + np.exp(-(scores - bar) / (TEMPERATURE * scores.std(-1, keepdims=True))))


@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"scoring": "sigmoid", "correction": True},
        {"scoring": "sigmoid", "n_group": 5, "topk_group": 3},
    ],
)
def test_soft_labels_are_of_what_the_router_ranks_by(options):
    mx.random.seed(3)
    router = Router(RouterConfig(6, EXPERTS, **options))
    if router.config.correction:
        router.correction = mx.random.normal(router.correction.shape)
    h = mx.random.normal((7, 6))
    found = np.array(soft_labels(router, h, TOP_K))
    expected = labels_by_hand(np.array(router.scores(h)).astype(np.float64), TOP_K)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert ((found > 0.5).sum(-1) == TOP_K).all()


@pytest.mark.parametrize("k", [1, 31, 32, 69])
def test_labels_for_any_number_of_chosen(k):
    scores = np.random.default_rng(k).standard_normal((3, 70))
    found = np.array(native_soft_labels(mx.array(scores), k, TEMPERATURE))
    np.testing.assert_allclose(found, labels_by_hand(scores, k), atol=2e-5)


def test_labels_of_equal_scores_are_halves():
    found = np.array(native_soft_labels(mx.ones((2, 5)), 2, 0.3))
    np.testing.assert_array_equal(found, np.full((2, 5), 0.5, np.float32))


@pytest.mark.parametrize(("k", "temperature"), [(0, 0.3), (5, 0.3), (2, 0.0), (2, float("nan"))])
def test_soft_labels_refuse_what_has_no_bar(k, temperature):
    with pytest.raises(ValueError, match=r"\[soft_labels\] takes scores"):
        native_soft_labels(mx.zeros((2, 5)), k, temperature)


def test_hard_labels_are_soft_ones_of_0_and_1():
    logits, chosen, _ = sample()
    values = arrays(logits, chosen, target(chosen))
    for of in (lambda loss: loss(*values).item(), lambda loss: np.array(mx.grad(loss)(*values))):
        np.testing.assert_allclose(of(soft), of(bce), rtol=1e-5, atol=1e-7)


def test_bce_and_softmax_need_no_teacher():
    logits, chosen, _ = arrays(*sample())
    nothing = mx.zeros((TOKENS, 0, 0))
    assert mx.isfinite(bce(logits, chosen, nothing)).item()
    assert mx.isfinite(softmax(logits, chosen, nothing)).item()


def test_wrong_shapes_are_refused():
    for logits, chosen in (((2, 3, 4), (2, 3)), ((2, 3, 4), (2, 2, 4)), ((0, 4), (0, 2))):
        with pytest.raises(ValueError, match=r"\[cross_entropy\] takes logits"):
            cross_entropy(mx.zeros(logits), mx.zeros(chosen, mx.int32))
    with pytest.raises(ValueError, match=r"\[cross_entropy\] takes logits"):
        cross_entropy(mx.zeros((2, 3)), mx.zeros((2, 2)))
