"""/metrics: what the server and the store count, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Lock
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from ..runtime import Runtime
from ..store_metrics import store_metrics
from .runs import Run, Runs

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Numbers:
    """Counts requests and tokens, and reads the store's counts when asked."""

    def __init__(self, runtime: Runtime, runs: Runs, expected_recall: Sequence[float]):
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "mlx_od_moe_requests", "Answers.", ["path", "status"], registry=registry
        )
        self._seconds = Histogram(
            "mlx_od_moe_request_seconds",
            "Time to answer.",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._first = Histogram(
            "mlx_od_moe_first_token_seconds",
            "Time to the first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._lock = Lock()
        self._tokens = {"prompt": 0, "cached": 0, "generated": 0}
        registry.register(self)
        registry.register(_Stored(runtime, runs, expected_recall))

    @property
    def generated(self) -> int:
        """Tokens that were generated."""
        return self._tokens["generated"]

    def token(self) -> None:
        """A token was generated."""
        with self._lock:
            self._tokens["generated"] += 1

    def answered(self, path: str, status: int, seconds: float) -> None:
        """A connection was answered."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def ran(self, run: Run) -> None:
        """A completion has ended, whole or not."""
        with self._lock:
            self._tokens["prompt"] += run.prompt_tokens
            self._tokens["cached"] += run.cached_tokens
        if run.first_token_seconds is not None:
            self._first.observe(run.first_token_seconds)

    def collect(self) -> Iterator[Metric]:
        """The tokens, for the registry."""
        tokens = CounterMetricFamily(
            "mlx_od_moe_tokens",
            "Of prompts, of these held by the prompt cache, and generated.",
            labels=["kind"],
        )
        for kind, number in self._tokens.items():
            tokens.add_metric([kind], number)
        yield tokens

    def page(self, accept: str) -> tuple[bytes, str]:
        """(text, its type) in the format that the reader prefers."""
        encode, kind = choose_encoder(accept)
        return encode(self._registry), kind


class _Stored:
    """The runtime's counts as metrics."""

    def __init__(self, runtime: Runtime, runs: Runs, expected_recall: Sequence[float]):
        self._runtime, self._runs, self._expected = runtime, runs, expected_recall

    def collect(self) -> Iterator[Metric]:
        report = self._runtime.report()
        store, prediction = report["store"], report["prediction"]
        name = "mlx_od_moe"
        yield _gauge(f"{name}_requests_under_way", "Running and waiting.", len(self._runs))
        yield _gauge(f"{name}_capacity_bytes", "Memory for experts.", report["capacity_bytes"])
        yield _gauge(f"{name}_tokens_per_second", "Of decoding.", report["tokens_per_second"])
        yield from store_metrics(store["layers"])
        yield _hit_rates(store["layers"])
        yield _gauge(f"{name}_hit_rate", "Of all layers, since the start.", report["hit_rate"])
        yield from self._predictions(prediction)

    def _predictions(self, prediction: dict[str, Any]) -> Iterator[Metric]:
        name = "mlx_od_moe_prediction"
        recall = GaugeMetricFamily(
            f"{name}_recall", "Realised recall@k since the start.", labels=["distance"]
        )
        for distance, value in prediction["recall_at_k"].items():
            recall.add_metric([str(distance)], value)
        expected = GaugeMetricFamily(
            f"{name}_recall_expected", "Recall@k in validation.", labels=["distance"]
        )
        for distance, value in enumerate(self._expected, 1):
            expected.add_metric([str(distance)], value)
        yield recall
        yield expected
        labels = ["layer", "distance"]
        for key, text in (
            ("predictions", "Predictions that were judged."),
            ("chosen", "Experts chosen where a prediction was judged."),
            ("named", "Of these, predicted: named / chosen is recall@k."),
        ):
            family = CounterMetricFamily(f"{name}_{key}", text, labels=labels)
            for row in prediction["layers"]:
                family.add_metric(_labels(row), row[key])
            yield family
        on = GaugeMetricFamily(f"{name}_on", "Whether predictions cause reads.", labels=labels)
        for row in prediction["layers"]:
            on.add_metric(_labels(row), row["on"])
        yield on


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _hit_rates(layers: dict[int, dict[str, Any]]) -> Metric:
    hits = GaugeMetricFamily("mlx_od_moe_layer_hit_rate", "Since the start.", labels=["layer"])
    for layer, counts in layers.items():
        hits.add_metric([str(layer)], counts["hits"] / max(counts["lookups"], 1))
    return hits


def _labels(row: dict[str, Any]) -> list[str]:
    """Layer and distance of a prediction; "token" for one that the token alone made."""
    return [str(row["layer"]), "token" if row["by_token"] else str(row["distance"])]
