"""What `evaluate` found, as a text table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .metrics import reads

LABELS = {
    "random": "random",
    "frequency": "frequency",
    "previous_token": "previous token",
    "gate_lookahead_raw": "gate lookahead, raw",
    "gate_lookahead": "gate lookahead",
    "linear_probe": "linear probe",
    "predictor": "shadow model",
    "true_state": "true state, 4-bit router",
}


def table(result: dict[str, Any]) -> str:
    """The recall of every method per distance, for a terminal."""
    k = result["top_k"]
    distances = len(result["methods"]["predictor"]["recall_at_k"])
    heads = "".join(f"{f'd{d + 1}':>7}" for d in range(distances))
    rows = [
        f"{'':26}{f'recall@{k}':<{7 * distances}}  recall@{2 * k}",
        f"{'layers ahead':26}{heads}  {heads}",
    ]
    for name, metrics in result["methods"].items():
        rows.append(_row(LABELS[name], metrics["recall_at_k"], metrics["recall_at_2k"]))
    rows += _details(result["methods"]["predictor"], k)
    if first := result["by_token"]:
        rows.append(_row("layers 1, 2, … by token", first["recall_at_k"], first["recall_at_2k"]))
    if following := result.get("next_token"):
        rows.append("\nlayers 1, 2, … of the next token, by the last layer's state:")
        for label, found in (
            ("  previous token", following["previous_token"]),
            ("  shadow model", following),
        ):
            rows.append(_row(label, found["recall_at_k"], found["recall_at_2k"]))
    control, margin = result["control"].values(), result["margin"]
    rows.append(f"\n{result['samples']:,} tokens, mean over {len(result['layers'])} layers, ")
    rows[-1] += f"the model's top {k} of {result['num_experts']} experts."
    if control:
        rows.append(f"Control, each router on its own input, as recorded: {min(control):.4f} of 1.")
    if margin:
        where = f"(layer {margin['layer']}, d{margin['distance']})"
        verb = "leads" if margin["lead"] > 0 else "does NOT lead"
        lead = f"{margin['lead']:+.3f}"
        rows.append(f"The shadow model {verb} gate lookahead everywhere: {lead} at least {where}.")
    return "\n".join(rows)


def _row(label: str, *columns: list[float]) -> str:
    return f"{label:26}" + "  ".join("".join(f"{x:7.3f}" for x in column) for column in columns)


# The predictor's other metrics: label, name in the report.
_DETAILS = (
    ("  all {k} among {k}", "exact_set_rate", None),
    ("  of the gate's mass", "gate_mass_recall_at_k", "gate_mass_recall_at_2k"),
    ("  not in a 25 % LRU cache", "non_resident_recall_at_k", "non_resident_recall_at_2k"),
    ("  calibration error", "calibration_error", None),
)


def _details(metrics: dict[str, list[float]], k: int) -> list[str]:
    rows = []
    for label, first, second in _DETAILS:
        columns = [metrics[name] for name in (first, second) if name in metrics]
        if columns:
            rows.append(_row(label.format(k=k), *columns))
    by_reads = [
        _row(f"  {n} (used: × {k / n:.2f})", metrics[f"recall_at_{n}"], metrics[name])
        for n in reads(k)
        if (name := f"threshold_recall_at_{n}") in metrics
    ]
    if by_reads:
        heads = f"{'the likeliest':<{7 * len(metrics['recall_at_k'])}}  by a threshold"
        by_reads.insert(0, f"{'where so many are read:':26}{heads}")
    return ["", "of the shadow model's:", *rows, *by_reads] if rows else []


def plot(result: dict[str, Any], path: str | Path) -> None:
    """Recall against distance as a PNG; needs matplotlib (the extra `plot`)."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'mlx-od-moe[plot]'") from error
    k = result["top_k"]
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, name, n in zip(axes, ("recall_at_k", "recall_at_2k"), (k, 2 * k), strict=True):
        for method, metrics in result["methods"].items():
            distances = range(1, len(metrics[name]) + 1)
            style: dict[str, Any] = {"lw": 1.5, "marker": "."}
            if method == "predictor":
                style = {"lw": 3, "marker": "o", "color": "black"}
            elif method == "gate_lookahead_raw":
                style["linestyle"] = ":"
            axis.plot(distances, metrics[name], label=LABELS[method], **style)
        axis.set_title(f"recall@{n}: share of the {k} chosen experts among the {n} predicted")
        axis.title.set_fontsize(10)
        axis.set_xlabel("MoE layers ahead")
        axis.set_xticks(list(distances))
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", fontsize=9)
    figure.savefig(path, dpi=110)
