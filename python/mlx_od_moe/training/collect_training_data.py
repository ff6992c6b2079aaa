"""Collects traces: what every MoE layer of a model saw, and which experts it chose.

Work is cut into shards by the settings alone. A shard is written whole when it is done, so a
collection that was stopped goes on where it was, and ends as if it had not been.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from ..progress import progress_bar
from .dummy_traces import DummyTraces
from .model_traces import Model, ModelTraces, identify
from .plan import Shard, plan_shards
from .text_stream import scan_texts
from .traces import (
    Arrays,
    TraceInfo,
    check_shard,
    open_traces,
    read_collection,
    shard_path,
    write_collection,
    write_shard,
)

Advance = Callable[[int], None]


class TraceSource(Protocol):
    """Makes shards, in their order."""

    def skip(self, shard: Shard) -> None:
        """Pass over a shard that is there already."""

    def collect(self, shard: Shard, advance: Advance) -> Arrays | None:
        """The shard's arrays, or None if the text is at its end."""


def collect_expert_usage(
    model: Model | None = None,
    *,
    out: str | Path,
    text: Sequence[str | Path] = (),
    tokens: int = 50_000,
    mode: str = "both",
    lookahead: int = 4,
    window: int = 512,
    batch_size: int | None = None,
    shard_tokens: int = 8192,
    seed: int = 0,
    samples: int = 5_000,
    hidden_size: int = 4096,
    num_experts: int = 384,
    top_k: int = 8,
    num_layers: int = 1,
    progress: bool = True,
) -> TraceInfo:
    """Run a model over text and write its traces to the directory `out`; see traces.py.

    Run again after an interruption, the same call completes the directory.

    Args:
        model: Directory of an mlx-lm model, or (model, tokenizer) to run as they are. None: dummy
            traces with a planted structure that a predictor can learn.
        out: The trace directory; made if need be.
        text: Text files; NUL bytes separate documents. Files take turns.
        tokens: Tokens to collect; fewer when the text ends before, and then a warning says so.
        mode: "prefill": windows of text; "decode": a prompt of a quarter of the sequence, then
            what the model samples at temperature 1, past ends of text too; "both": half of each.
        lookahead: How many later MoE layers' choices each row holds.
        window: Most tokens of one sequence.
        batch_size: Sequences per forward pass. Default: 2048 tokens' worth in prefill, 32 in
            decode.
        shard_tokens: Most tokens of one shard; models with wide states get smaller shards.
        seed: Of the order of documents, of sampling, and of the dummy's numbers.
        samples: Dummy only: token rows.
        hidden_size: Dummy only.
        num_experts: Dummy only.
        top_k: Dummy only.
        num_layers: Dummy only: layers with recorded states. The `lookahead` layers after each
            are planted too, so all choices exist.
        progress: Whether to show a progress bar with rate and time left.

    Raises:
        ValueError: Wrong settings, settings other than those `out` was begun with (the message
            names the setting), no text, or hidden states that float16 cannot hold.
        FileNotFoundError: The model or a text file is missing.
        OSError: The disk is full; finished shards are kept.
    """
    out = Path(out)
    settings: dict[str, Any] = {"mode": mode, "seed": seed, "lookahead": lookahead}
    settings |= {"tokens": tokens, "window": window, "batch_size": batch_size}
    settings |= {"shard_tokens": shard_tokens}
    if model is None:
        settings |= {"model": "dummy", "mode": "dummy", "tokens": samples, "texts": []}
        settings |= {"hidden_size": hidden_size, "num_experts": num_experts, "top_k": top_k}
        settings |= {"moe_layers": list(range(num_layers + lookahead))}
        settings |= {"recorded_layers": list(range(num_layers))}
        _check_settings(settings)
        if _begun(out, settings) is None:
            write_collection(out, settings)
        return _collect(out, settings, DummyTraces(settings), progress)
    _check_settings(settings)
    files = scan_texts(text)
    settings |= identify(model) | {"texts": [file.description for file in files]}
    begun = _begun(out, settings)
    if begun and all(shard_path(out, shard.index).exists() for shard in plan_shards(begun)):
        return open_traces(out)
    with ModelTraces(model, files, settings) as source, source.fast_matmul():
        if _begun(out, source.collection) is None:
            source.save_routers(out / "routers.safetensors")
            write_collection(out, source.collection)
        return _collect(out, source.collection, source, progress)


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for what cannot be collected."""
    if settings["mode"] not in ("prefill", "decode", "both", "dummy"):
        raise ValueError(
            f"[collect] mode must be prefill, decode or both, but is {settings['mode']!r}"
        )
    counts = ("tokens", "lookahead", "window", "shard_tokens", "batch_size")
    for name in (*counts, "hidden_size", "num_experts", "top_k"):
        value = settings.get(name)
        if value is not None and value < 1:
            raise ValueError(f"[collect] {name} must be at least 1, but is {value}")
    if "recorded_layers" in settings and not settings["recorded_layers"]:
        raise ValueError("[collect] num_layers must be at least 1, but is 0")
    if settings.get("top_k", 0) > settings.get("num_experts", 0):
        raise ValueError(
            f"[collect] top_k must be at most num_experts, but is {settings['top_k']} of "
            f"{settings['num_experts']}"
        )


def _begun(out: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What collection.json says, if `out` was begun. Raises ValueError where settings differ."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "collection.json").exists():
        if any(out.glob("shard-*.npz")):
            raise ValueError(f"[collect] {out} holds shards but no collection.json: not ours")
        return None
    begun = read_collection(out)
    for name, value in settings.items():
        if begun.get(name) != value:
            raise ValueError(
                f"[collect] {out} was begun with {name}={begun.get(name)!r}, so {value!r} is not "
                "possible: use the same settings or another directory"
            )
    return begun


def _collect(
    out: Path, collection: Mapping[str, Any], source: TraceSource, progress: bool
) -> TraceInfo:
    """Make the shards that are missing; the last is compressed while the next is collected."""
    shards = plan_shards(collection)
    paths = [shard_path(out, shard.index) for shard in shards]
    there = sum(check_shard(path, collection) for path in paths if path.exists())
    total = collection["tokens"]
    bar = progress_bar(total, "collect", "token", progress, done=there)
    with bar, ThreadPoolExecutor(1) as writer:
        writing: Future[None] | None = None
        for shard, path in zip(shards, paths, strict=True):
            if path.exists():
                source.skip(shard)
                continue
            arrays = source.collect(shard, lambda n: bar.update(min(n, total - bar.n)) and None)
            if writing is not None:
                writing.result()
            if arrays is not None:
                writing = writer.submit(write_shard, path, arrays)
        if writing is not None:
            writing.result()
    info = open_traces(out)
    if info.samples < total:
        warnings.warn(
            f"the text ended after {info.samples} of {total} tokens: these were collected",
            stacklevel=3,
        )
    return info
