"""Trains the shadow model of every MoE layer; validation chooses what each layer uses."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..context import TokenMemory
from ..metrics import mean_over_layers
from ..model_routers import LayerRouter, save_routers
from ..predictor_bundle import PredictorBundle
from ..predictor_file import Quantization
from ..progress import progress_bar
from ..shadow_model import ExpertPredictor
from ..token_experts import TokenExperts
from ..token_table import TokenTable
from .bundle_trainer import train_together
from .dataset import read_array, split_documents
from .layer_trainer import LayerTrainer, TrainingOptions, train_layer
from .next_token import next_token_datasets, train_next_token
from .traces import TraceInfo, open_traces
from .workers import run_layers


def fingerprint(traces: TraceInfo) -> str:
    """Identifies a collection: the same settings and text give the same."""
    return hashlib.sha256((traces.path / "collection.json").read_bytes()).hexdigest()[:16]


def train_shadow_model(
    traces: str | Path,
    out: str | Path,
    options: TrainingOptions | None = None,
    *,
    layers: Iterable[int] | None = None,
    routers: Mapping[int, LayerRouter] | None = None,
    bits: int | None = None,
    jobs: int = 1,
    memory_bytes: int = 1 << 30,
    progress: bool = True,
) -> PredictorBundle:
    """Train one predictor per MoE layer on recorded traces and write the bundle to `out`.

    Training and validation samples come from different documents. Each candidate is trained with
    early stopping; gate lookahead alone takes its place at distances where that is better, and per
    layer the candidate is kept whose mean validation recall@k is then the best. Last comes the
    predictor of the next token's first layers, unless the options leave it out or the traces lack
    what it needs; the bundle's training then says why, as "next_token". An interrupted run goes on
    where it stopped when called again: its state lies in `out` + ".checkpoint", and is
    removed at the end.

    Args:
        traces: a directory that `collect_expert_usage` wrote.
        layers: only these MoE layers; default all that have a layer after them.
        routers: {MoE layer: router}; default those recorded with the traces. Without any, the
            candidates that look through them are left out.
        bits: quantise the written file (4 or 8).
        jobs: layers trained at once, each in a process of its own; with a context, all at once,
            each on a thread of its own, or with 1 all on one.
        memory_bytes: how much decoded data each job holds at once, roughly.

    Raises ValueError naming the file and rule for unusable traces or a foreign checkpoint.
    """
    options = options or TrainingOptions()
    info, out = open_traces(traces), Path(out)
    if jobs < 1:
        raise ValueError(f"[train] jobs must be positive, got {jobs}")
    if bits is not None:
        Quantization(bits)  # refused now, not when hours have passed
    trainable = _trainable(info, layers)
    if out.is_dir():
        raise ValueError(f"[train] {out} is a directory, not a file to write")
    checkpoint = _open_checkpoint(out, options, info, routers)
    settings = info, options, checkpoint, memory_bytes
    trainer = LayerTrainer(*settings)
    predictors, memories, reports = _train(trainer, trainable, jobs, progress)
    next_token, next_report = _train_next(trainer, progress)
    metrics = [report["validation"] for report in reports.values()]
    training = {
        "traces": fingerprint(info),
        "model": info.model,
        "options": dataclasses.asdict(options),
        "validation": mean_over_layers(metrics),
        "layers": reports,
    } | next_report
    first = learn_token_experts(info, trainer.split[0])
    layers_of_model = list(info.moe_layers)
    bundle = PredictorBundle(layers_of_model, predictors, training, memories, first, next_token)
    bundle.save(out, bits)
    shutil.rmtree(checkpoint)
    return PredictorBundle.load(out)


def learn_token_experts(info: TraceInfo, documents: set[int]) -> TokenExperts | None:
    """What the first `lookahead` MoE layers choose by the token alone, in those documents.

    None where their choices are not recorded.
    """
    first = info.moe_layers[: info.lookahead]
    if not set(first) <= set(info.recorded_layers):
        return None
    table = TokenTable(len(first), info.num_experts)
    for shard in info.shards:
        rows = np.isin(read_array(shard, "document"), list(documents))
        routed = [read_array(shard, f"routed_experts_{layer}")[rows] for layer in first]
        table.observe(read_array(shard, "token_ids")[rows], np.stack(routed, axis=1))
    return TokenExperts.learned(table)


def _train(
    trainer: LayerTrainer, layers: list[int], jobs: int, progress: bool
) -> tuple[dict[int, ExpertPredictor], dict[int, TokenMemory], dict[int, dict[str, Any]]]:
    """Predictors, memories and reports by layer."""
    reports: dict[int, dict[str, Any]] = {}
    if trainer.options.together:
        work = trainer.options.fit.epochs * trainer.training_tokens
        with progress_bar(work, "train", "token", progress) as bar:
            # Each waits at times for what others compute: with all of them cores have always work.
            streams = 1 if jobs == 1 else len(layers)
            predictors, memories, reports = train_together(trainer, layers, streams, bar.update)
            for layer, report in reports.items() if progress else ():
                bar.write(_summary(layer, trainer.info.top_k, report), file=sys.stderr)
        return predictors, memories, reports
    work = sum(trainer.work(layer) for layer in layers)
    settings = trainer.info, trainer.options, trainer.checkpoint, trainer.memory_bytes
    with progress_bar(work, "train", "sample", progress) as bar:
        for layer, report in run_layers(train_layer, settings, layers, jobs, bar):
            reports[layer] = report
            if progress:
                bar.write(_summary(layer, trainer.info.top_k, report), file=sys.stderr)
    reports = dict(sorted(reports.items()))
    return {n: ExpertPredictor.load(trainer.finished(n)) for n in reports}, {}, reports


def _train_next(
    trainer: LayerTrainer, progress: bool
) -> tuple[ExpertPredictor | None, dict[str, Any]]:
    """The next token's predictor, and what the training's report says of it."""
    if not trainer.options.next_token:
        return None, {}
    datasets = next_token_datasets(trainer)
    if isinstance(datasets, str):
        if progress:
            print(f"next token: left out, {datasets}", file=sys.stderr)
        return None, {"next_token": {"left_out": datasets}}
    work = trainer.options.fit.epochs * len(datasets[0])
    with progress_bar(work, "train next token", "token", progress) as bar:
        predictor, metrics = train_next_token(trainer, datasets, bar.update)
        if progress:
            recall = " ".join(f"{x:.3f}" for x in metrics["recall_at_k"])
            bar.write(f"next token: recall@{trainer.info.top_k} {recall}", file=sys.stderr)
    return predictor, {"next_token": {"validation": metrics}}


def _trainable(traces: TraceInfo, layers: Iterable[int] | None) -> list[int]:
    """The layers asked for, in order; all that have states and a MoE layer after them if None."""
    possible = [layer for layer in traces.recorded_layers if layer != traces.moe_layers[-1]]
    wanted = set(possible if layers is None else layers)
    if not wanted or not wanted <= set(possible):
        raise ValueError(
            f"[{traces.path}] layers {possible} have recorded states and a MoE layer after them, "
            f"asked for {sorted(wanted)}"
        )
    return sorted(wanted)


def documents_of(traces: TraceInfo, bundle: PredictorBundle) -> tuple[set[int], set[int]] | None:
    """The documents that trained and those that validated `bundle`; None if not of `traces`."""
    if bundle.training.get("traces") != fingerprint(traces):
        return None
    options = bundle.training["options"]
    return split_documents(traces, options["validation_fraction"], options["fit"]["seed"])


def _open_checkpoint(
    out: Path,
    options: TrainingOptions,
    info: TraceInfo,
    routers: Mapping[int, LayerRouter] | None,
) -> Path:
    directory = out.with_name(out.name + ".checkpoint")
    settings = {
        "traces": fingerprint(info),
        "options": dataclasses.asdict(options),
        "routers": None if routers is None else _digest(routers),
    }
    text = json.dumps(settings, indent=1)
    path = directory / "settings.json"
    if path.exists() and path.read_text() != text:
        raise ValueError(
            f"[{directory}] holds an interrupted training with other settings, traces or routers: "
            "delete it to start anew, or repeat the command that it began with"
        )
    directory.mkdir(parents=True, exist_ok=True)
    if routers is not None:
        save_routers(directory / "routers.safetensors", routers)
    path.write_text(text)
    return directory


def _digest(routers: Mapping[int, LayerRouter]) -> str:
    digest = hashlib.sha256()
    for layer, entry in sorted(routers.items()):
        digest.update(b"%d" % layer + np.array(entry.router.linear.weight).tobytes())
    return digest.hexdigest()[:16]


def _summary(layer: int, top_k: int, report: dict[str, Any]) -> str:
    recall = " ".join(f"{x:.3f}" for x in report["validation"]["recall_at_k"])
    return f"layer {layer:3}: recall@{top_k} {recall}  ({report['candidate']})"
