"""What a machine would have waited for: recorded routing replayed against caches and a disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ._ext import SimulatorOptions, eviction_policies
from ._ext import simulate as _simulate
from .routing_trace import Predictions, RoutingTrace

POLICIES = (*eviction_policies(), "belady")
# In the order of the table. Belady: no prefetch, but evicts what is used last of all.
METHODS = {
    "none": "no prefetch",
    "predicted": "prefetch",
    "oracle": "oracle",
    "oracle_next_token": "oracle, next token",
    "belady": "Belady, no prefetch",
}


@dataclass(frozen=True)
class Machine:
    """Times in seconds: of one MoE layer, of reading one expert, and until a read begins to count.

    `token_time` lies between a token's last layer and the next token; the next token is known
    `first_attention` layer times before its first MoE layer. `expert_bytes` 0: unknown.
    """

    layer_time: float = 1.0
    read_time: float = 1 / 6
    latency: float = 0.0
    token_time: float = 0.0
    first_attention: float = 0.5
    expert_bytes: int = 0

    @property
    def reads_per_layer(self) -> float:
        """Experts that the disk reads while one layer computes."""
        return self.layer_time / self.read_time if self.read_time else float("inf")


@dataclass(frozen=True)
class Prefetching:
    """Our policy's settings, one number per distance where there are several.

    See cpp/mlx_od_moe/prefetch_policy.h; the defaults are measured: docs/planning.md.
    """

    widths: tuple[int, ...] = (16, 16, 16, 16)
    thresholds: tuple[float, ...] = (0.1, 0.1, 0.1, 0.1)
    discount: float = 0.3
    margin: float = 0.1

    @property
    def lookahead(self) -> int:
        """MoE layers ahead that are prefetched."""
        return len(self.widths)


def parse_capacity(text: str, layers: int, num_experts: int, expert_bytes: int = 0) -> int:
    """Experts that each layer has room for: "25%", "16" (experts a layer), or "8GB" in all."""
    number, unit = text.strip(), ""
    for known in ("%", "GB", "MB"):
        if number.upper().endswith(known):
            number, unit = number[: -len(known)], known
    try:
        value = float(number)
    except ValueError:
        raise ValueError(
            f"[simulate] capacity {text!r}: give 25%, experts per layer, or 8GB"
        ) from None
    if unit == "%":
        return int(num_experts * value / 100 + 1e-9)
    if not unit:
        return int(value)
    if not expert_bytes:
        raise ValueError(f"[simulate] capacity {text!r} needs the bytes of one expert")
    return min(num_experts, int(value * {"GB": 1e9, "MB": 1e6}[unit] / expert_bytes / layers))


def simulate(
    trace: RoutingTrace,
    capacity: int | Sequence[int],
    policies: Sequence[str],
    machines: Sequence[Machine],
    predictions: Predictions | None = None,
    prefetching: Prefetching | None = None,
    oracles: bool = True,
) -> dict[str, Any]:
    """Replay a trace for each machine and policy: without prefetch, with ours, and with oracles.

    Args:
        trace: the routes.
        capacity: experts that each layer has room for, one number for all or one for each.
        policies: of POLICIES.
        machines: the disks to try.
        predictions: given, our prefetch is replayed too.
        prefetching: its settings.
        oracles: also replay prefetching of the true routes of the next layers ("oracle": of the
            same token; "oracle_next_token": of the next token's first layers too).

    Returns {"hit_rate": of the first policy and machine, with prefetch where there are predictions,
    "trace", "capacity", "runs": [{"policy", "method", "reads_per_layer", "hit_rate", …}]}.
    Raises ValueError, naming the rule, where the numbers do not fit each other.
    """
    prefetching = prefetching or Prefetching()
    tokens, layers, top_k = trace.experts.shape
    capacity = [capacity] * layers if isinstance(capacity, int) else list(capacity)
    settings = prefetching, predictions or Predictions.empty(trace, prefetching.lookahead, 1)
    methods = ["none"] + ["predicted"] * (predictions is not None)
    methods += ["oracle", "oracle_next_token"] * oracles
    runs = []
    for machine in machines:
        for policy in policies:
            runs += [_run(trace, capacity, policy, m, machine, *settings) for m in methods]
        if "belady" not in policies:
            runs.append(_run(trace, capacity, "belady", "none", machine, *settings))
            runs[-1]["method"] = "belady"
    first = [r for r in runs if r["policy"] == policies[0]]
    ours = next(r for r in first if r["method"] == ("predicted" if predictions else "none"))
    return {
        "hit_rate": ours["hit_rate"],
        "trace": {
            "tokens": tokens,
            "layers": layers,
            "top_k": top_k,
            "num_experts": trace.num_experts,
        },
        "capacity": capacity,
        "runs": runs,
    }


def _run(
    trace: RoutingTrace,
    capacity: list[int],
    policy: str,
    method: str,
    machine: Machine,
    prefetching: Prefetching,
    predictions: Predictions,
) -> dict[str, Any]:
    options = SimulatorOptions()
    options.capacity = capacity
    options.policy, options.prefetch = policy, method
    options.widths, options.thresholds = list(prefetching.widths), list(prefetching.thresholds)
    options.discount, options.margin = prefetching.discount, prefetching.margin
    for name in ("layer_time", "read_time", "latency", "token_time", "first_attention"):
        setattr(options, name, getattr(machine, name))
    counts = _simulate(
        trace.experts, trace.num_experts, predictions.ids, predictions.probabilities, options
    )
    return {
        "policy": policy,
        "method": method,
        "reads_per_layer": machine.reads_per_layer,
        **_rates(counts, trace, machine),
    }


def _rates(counts: dict[str, Any], trace: RoutingTrace, machine: Machine) -> dict[str, Any]:
    tokens, layers, _ = trace.experts.shape
    lookups = max(counts["lookups"], 1)
    used = counts["useful"] + counts["late"]
    report = {
        "hit_rate": counts["hits"] / lookups,
        "late_rate": counts["late"] / lookups,
        "miss_rate": counts["misses"] / lookups,
        # In layer times per layer: 1 makes the model twice as slow.
        "stall": counts["stall"] / (tokens * layers * machine.layer_time),
        "demand_reads": counts["misses"] / (tokens * layers),
        "prefetch_reads": counts["prefetched"] / (tokens * layers),
        "wasted_per_useful": counts["wasted"] / max(used, 1),
        "recall_non_resident": counts["named"] / max(used + counts["misses"], 1),
        "hit_rate_per_layer": [c["hits"] / max(c["lookups"], 1) for c in counts["layers"]],
        "counts": {name: value for name, value in counts.items() if name != "layers"},
    }
    if machine.expert_bytes:
        report["demand_bytes"] = counts["misses"] * machine.expert_bytes
        report["prefetch_bytes"] = counts["prefetched"] * machine.expert_bytes
        report["wasted_bytes"] = counts["wasted"] * machine.expert_bytes
        report["tokens_per_second"] = tokens / counts["time"] if counts["time"] else 0.0
    return report


def table(result: dict[str, Any]) -> str:
    """One line per disk, policy and method, for a terminal."""
    t = result["trace"]
    absolute = "tokens_per_second" in result["runs"][0]
    head = f"{'reads':>6} {'policy':8}{'method':20}{'hit':>6}{'late':>6}{'miss':>6}{'stall':>7}"
    head += f"{'demand':>8}{'ahead':>7}{'wasted':>8}{'named':>7}" + absolute * f"{'tokens/s':>10}"
    rows = [
        f"{t['tokens']:,} tokens, {t['layers']} MoE layers, top {t['top_k']} of "
        f"{t['num_experts']} experts, room for {_room(result['capacity'])}.",
        "",
        head,
    ]
    for r in result["runs"]:
        row = f"{r['reads_per_layer']:6.3g} {r['policy']:8}{METHODS[r['method']]:20}"
        row += f"{r['hit_rate']:6.3f}{r['late_rate']:6.3f}{r['miss_rate']:6.3f}{r['stall']:7.3f}"
        row += f"{r['demand_reads']:8.2f}{r['prefetch_reads']:7.2f}"
        ahead = r["prefetch_reads"] > 0
        row += f"{r['wasted_per_useful']:8.2f}" if ahead else f"{'-':>8}"
        row += f"{r['recall_non_resident']:7.3f}" if ahead else f"{'-':>7}"
        rows.append(row + (f"{r['tokens_per_second']:10.2f}" if absolute else ""))
    return "\n".join(rows)


def _room(capacity: list[int]) -> str:
    first, *others = capacity
    if set(others) <= {first}:
        return f"{first} in each layer"
    return f"{first} in the first layer, {min(others)} to {max(others)} in the others"


def plot(result: dict[str, Any], path: str | Path) -> None:
    """Hit rate against the disk as a PNG; needs matplotlib (the extra `plot`)."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'mlx-od-moe[plot]'") from error
    runs = result["runs"]
    policies = list(dict.fromkeys(r["policy"] for r in runs if r["method"] != "belady"))
    styles = {"none": ":", "predicted": "-", "oracle": "--", "oracle_next_token": "-."}
    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    lines = [(p, m) for m in METHODS for p in (policies if m != "belady" else ["belady"])]
    for policy, method in lines:
        chosen = [r for r in runs if (r["policy"], r["method"]) == (policy, method)]
        if not chosen:
            continue
        label = METHODS[method] + (f", {policy}" if method != "belady" else "")
        color = "black" if method == "belady" else f"C{policies.index(policy)}"
        x, y = [r["reads_per_layer"] for r in chosen], [r["hit_rate"] for r in chosen]
        axis.plot(x, y, styles.get(method, ":"), marker=".", color=color, label=label)
    t = result["trace"]
    share = sum(result["capacity"]) / (t["num_experts"] * t["layers"])
    axis.set_title(f"{share:.0%} of {t['num_experts']} experts resident, {t['layers']} MoE layers")
    axis.set_xlabel("experts that the disk reads in one layer's compute time")
    axis.set_ylabel("demand hit rate")
    axis.set_xticks(np.unique([r["reads_per_layer"] for r in runs]))
    axis.set_ylim(0, 1)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)
