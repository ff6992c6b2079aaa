"""`mlx-od-moe generate`: text from a model that does not fit, and what its store did meanwhile."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from ._ext import eviction_policies
from .offload import load
from .route_recorder import RouteRecorder
from .runtime import Runtime


def add_model_flags(flag: Any) -> None:
    """What a command needs to load a model that runs from the store; see `load_model`."""
    flag("--model", required=True, help="model directory, as mlx-lm saves or `pack` writes it")
    flag("--capacity", default="25%", help="memory for experts: 25%% of them, 8GB, 8GiB or bytes")
    flag("--predictor", help="file that train wrote: prefetch with it")
    flag("--policy", choices=eviction_policies(), default="lrfu", help="who makes room")
    flag("--disk", help="read as slowly as a disk like 500MB/s,100us, for measurements")
    flag("--direct-io", action="store_true", help="pass the system's page cache by")
    flag("--threads", type=int, help="CPU threads that compute a call's experts (default: 2)")
    flag("--usage", help="file of --save-usage: begin with the experts that were used most")
    flag("--save-usage", help="write which experts were used to this file")


def load_model(options: argparse.Namespace) -> tuple[Any, Any, Runtime]:
    """(model, tokenizer, runtime) as the flags of `add_model_flags` ask."""
    names = ("predictor", "capacity", "policy", "disk", "direct_io", "usage", "threads")
    return load(options.model, progress=True, **{name: getattr(options, name) for name in names})


def add_flags(flag: Any) -> None:
    """The command's flags, as mlx-lm spells them."""
    add_model_flags(flag)
    flag("--prompt", required=True, help="text to go on from; - reads it from standard input")
    flag("--max-tokens", type=int, default=100)
    flag("--temp", type=float, default=0.0, help="sampling temperature; 0: the likeliest token")
    flag("--top-p", type=float, default=1.0)
    flag("--seed", type=int, default=None)
    flag("--ignore-chat-template", action="store_true", help="give the prompt as it is")
    flag("--trace", help="write the routes of all tokens to this .npz, for simulate")
    flag("--json", help="also write the result to this file")
    flag("--verbose", action="store_true", help="log what is switched off and on")


def run(options: argparse.Namespace) -> None:
    """Stream the text to standard output; then say how fast it came."""
    if options.max_tokens < 1:
        raise ValueError(f"--max-tokens must be 1 or more, got {options.max_tokens}")
    if options.verbose:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    model, tokenizer, runtime = load_model(options)
    with runtime:
        result = _generate(model, tokenizer, runtime, options)
        if options.save_usage:
            runtime.save_usage(options.save_usage)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    print(summary(result), file=sys.stderr)


def _generate(
    model: Any, tokenizer: Any, runtime: Runtime, options: argparse.Namespace
) -> dict[str, Any]:
    import mlx.core as mx
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_sampler

    if options.seed is not None:
        mx.random.seed(options.seed)
    prompt = _prompt(tokenizer, options)
    recorder = RouteRecorder(runtime.store.layers) if options.trace else None
    runtime.on_routing = recorder.record if recorder else None
    since, text = runtime.snapshot(), ""
    generated: list[int] = []
    sampler = make_sampler(temp=options.temp, top_p=options.top_p)
    for response in stream_generate(
        model, tokenizer, prompt, max_tokens=options.max_tokens, sampler=sampler
    ):
        if not generated:
            since = runtime.snapshot()  # the prompt is another matter
        text += response.text
        generated.append(response.token)
        print(response.text, end="", flush=True)
    print(flush=True)
    if recorder:
        recorder.save(options.trace, prompt + generated)
    return {
        "model": options.model,
        "text": text,
        "prompt_tokens": len(prompt),
        "generated_tokens": len(generated),
        **runtime.report(since),
    }


def _prompt(tokenizer: Any, options: argparse.Namespace) -> list[int]:
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    if not text:
        raise ValueError("--prompt must not be empty")
    if tokenizer.chat_template and not options.ignore_chat_template:
        messages = [{"role": "user", "content": text}]
        prompt: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    else:
        prompt = tokenizer.encode(text)
    return prompt


def summary(result: dict[str, Any]) -> str:
    """Of a report, what one wants to know first."""
    lines = [
        f"{result['generated_tokens']} tokens, {result['tokens_per_second']:.1f} tokens/s, "
        f"{result['capacity_bytes'] / 1e6:.1f} MB of experts in memory",
        f"hit rate {result['hit_rate']:.1%}, {result['bytes_per_token'] / 1e6:.2f} MB read and "
        f"{result['stall_per_token'] * 1e3:.2f} ms waited per token",
    ]
    recall = result["prediction"]["recall_at_k"]
    if recall:
        found = ", ".join(f"{share:.1%}" for share in recall.values())
        off = len(result["prediction"]["off"])
        lines.append(f"recall 1 … {len(recall)} layers ahead {found}; {off} predictions off")
    return "\n".join(lines)
