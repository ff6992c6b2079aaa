"""`mlx-od-moe bench NAME`: measures something beside its rivals, in one process and in turns.

A bench is a module with `add_flags(flag)` and `run(options)`, which prints its rows as they come
and returns what `--json` writes. To add one, add its line to BENCHES.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import context, predictor, queue
from .timing import machine

AddFlags = Callable[[Callable[..., Any]], None]
RunBench = Callable[[argparse.Namespace], dict[str, Any]]

BENCHES: dict[str, tuple[AddFlags, RunBench, str]] = {
    "predictor": (
        predictor.add_flags,
        predictor.run,
        "the native predictor beside other runtimes and the time to read its weights",
    ),
    "context": (
        context.add_flags,
        context.run,
        "what a context costs a native prediction, and what it costs beside the critical path",
    ),
    "queue": (queue.add_flags, queue.run, "the prediction queue beside Python's own queues"),
}


def add_benches(parser: argparse.ArgumentParser) -> None:
    """Give the `bench` command its sub-commands."""
    benches = parser.add_subparsers(dest="bench", metavar="NAME", required=True)
    for name, (add_flags, _, text) in BENCHES.items():
        bench = benches.add_parser(
            name,
            help=text,
            description=text,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        add_flags(bench.add_argument)
        bench.add_argument("--json", type=Path, help="also write the result to this file")


def run(options: argparse.Namespace) -> None:
    """Run the chosen bench; its JSON file also names the machine and what else ran on it."""
    before = machine()
    result = BENCHES[options.bench][1](options)
    if options.json:
        whole = {"bench": options.bench, **before, "load_after": machine()["load"], **result}
        options.json.write_text(json.dumps(whole, indent=1) + "\n")
