"""What the expert store counts, as Prometheus' metrics: the one list of their names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

_NAME = "mlx_od_moe_store"
# What is no plain count that only grows: what it is now, and what is told by cause or in seconds.
_GAUGES = ("queued", "pending", "non_resident_recall")
_CAUSES = {"demand_bytes": "demand", "prefetch_bytes": "prefetch"}
_SECONDS = "stall_ns"


def store_metrics(layers: Mapping[int, Mapping[str, float]]) -> Iterator[Metric]:
    """Each counter of ExpertStore.counters()["layers"], by layer."""
    for name in next(iter(layers.values())):
        if name in _CAUSES or name == _SECONDS:
            continue
        family = GaugeMetricFamily if name in _GAUGES else CounterMetricFamily
        metric = family(f"{_NAME}_{name}", "See store_counters.h.", labels=["layer"])
        for layer, counts in layers.items():
            metric.add_metric([str(layer)], counts[name])
        yield metric
    read = CounterMetricFamily(f"{_NAME}_read_bytes", "Read, by cause.", labels=["layer", "cause"])
    stall = CounterMetricFamily(f"{_NAME}_stall_seconds", "Waited for reads.", labels=["layer"])
    for layer, counts in layers.items():
        for name, cause in _CAUSES.items():
            read.add_metric([str(layer), cause], counts[name])
        stall.add_metric([str(layer)], counts[_SECONDS] / 1e9)
    yield from (read, stall)


def store_text(layers: Mapping[int, Mapping[str, Any]]) -> str:
    """The same in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Counted(layers))
    return generate_latest(registry).decode()


class _Counted:
    def __init__(self, layers: Mapping[int, Mapping[str, Any]]):
        self._layers = layers

    def collect(self) -> Iterator[Metric]:
        return store_metrics(self._layers)
