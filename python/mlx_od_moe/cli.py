"""The command line: `mlx-od-moe COMMAND`, also as `python -m mlx_od_moe COMMAND`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import bench

if TYPE_CHECKING:
    from .context import ContextConfig
    from .model_routers import LayerRouter

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    Errors that a user can mend are one line on standard error and status 1; Ctrl-C is 130.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.cmake_dir:
        from . import INSTALL_DIR

        print(INSTALL_DIR / "share" / "cmake" / "mlx_od_moe")
        return 0
    if not hasattr(options, "run"):
        parser.print_help()
        return 2
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, ImportError) as error:
        print(f"mlx-od-moe {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx-od-moe",
        description="Predict which experts a mixture-of-experts model will use next.",
    )
    parser.add_argument(
        "--cmake-dir", action="store_true", help="print where the CMake package lies, for C++"
    )
    from . import calibrate_command, generate_command, serve_command, simulate_command

    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, add, run, text in (
        ("collect", _collect_flags, _collect, "record a model's hidden states and expert choices"),
        ("train", _train_flags, _train, "train a shadow model on recorded traces"),
        ("evaluate", _evaluate_flags, _evaluate, "measure a shadow model against the baselines"),
        (
            "calibrate",
            calibrate_command.add_flags,
            calibrate_command.run,
            "make the scores of a shadow model those of probabilities",
        ),
        ("pack", _pack_flags, _pack, "rewrite a model with one contiguous block per expert"),
        (
            "simulate",
            simulate_command.add_flags,
            simulate_command.run,
            "replay routing: what would a machine wait for?",
        ),
        (
            "generate",
            generate_command.add_flags,
            generate_command.run,
            "generate text with a model whose experts stay on disk",
        ),
        (
            "serve",
            serve_command.add_flags,
            serve_command.run,
            "answer OpenAI's API with a model whose experts stay on disk",
        ),
        ("demo", _demo_flags, _demo, "all of it on the small model that ships, in two minutes"),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        add(command.add_argument)
        command.set_defaults(run=run)
    text = "measure beside other libraries, in one process and in turns"
    command = commands.add_parser("bench", help=text, description=text)
    bench.add_benches(command)
    command.set_defaults(run=bench.run)
    return parser


def _collect_flags(flag: Any) -> None:
    flag("--model", help="directory of an mlx-lm MoE model")
    flag("--text", nargs="+", default=[], help="text files; NUL bytes separate documents")
    flag("--out", required=True, help="directory for the traces")
    flag("--tokens", type=int, default=50_000, help="tokens to record")
    flag("--mode", choices=("prefill", "decode", "both"), default="both")
    flag("--window", type=int, default=512, help="tokens of context at most")
    flag("--batch-size", type=int, default=None, help="sequences at once; default: by mode")
    flag("--lookahead", type=int, default=4, help="MoE layers ahead")
    flag("--seed", type=int, default=0)
    flag("--dummy", action="store_true", help="no model: traces with a planted structure")
    flag("--samples", type=int, default=5_000, help="with --dummy")
    flag("--hidden-size", type=int, default=4096, help="with --dummy")
    flag("--num-experts", type=int, default=384, help="with --dummy")
    flag("--top-k", type=int, default=8, help="with --dummy")


def _collect(options: argparse.Namespace) -> None:
    from .training import collect_expert_usage

    if bool(options.model) == options.dummy:
        raise ValueError("give either --model DIR with --text FILE..., or --dummy")
    dummy = ("samples", "hidden_size", "num_experts", "top_k") if options.dummy else ()
    names = ("out", "text", "tokens", "mode", "window", "batch_size", "lookahead", "seed", *dummy)
    info = collect_expert_usage(options.model, **{name: getattr(options, name) for name in names})
    print(f"{info.samples:,} tokens at {len(info.moe_layers)} MoE layers in {info.path}")


def _train_flags(flag: Any) -> None:
    from_fit = "see docs/shadow_model_training.md"
    flag("--traces", required=True, help="directory that collect wrote")
    flag("--out", required=True, help="predictor file to write (.safetensors)")
    flag("--model", help="read the routers from this model instead of from the traces")
    flag("--layers", type=int, nargs="+", help="only these MoE layers")
    flag("--candidates", nargs="+", default=None, help=f"what validation chooses from; {from_fit}")
    flag("--predictor-size", type=int, default=1024, help="width of the inner layer")
    flag("--activation", choices=("relu", "silu"), default="relu")
    flag("--layer-norm", action="store_true")
    flag("--trunk-rank", type=int, default=0, help="the first matrix as two of this rank; 0: one")
    flag("--share-trunk", action="store_true", help="one first factor for all layers")
    flag("--no-next-token", action="store_true", help="leave out the next token's first layers")
    flag("--context", choices=("none", "state", "attention"), default="none", help=f"{from_fit}")
    flag("--window", type=int, default=64, help="earlier tokens that attention sees")
    flag("--key-size", type=int, default=64, help="width of attention's keys and values")
    flag("--state-size", type=int, default=64, help="width of the previous token's encoded state")
    flag("--late-query", action="store_true", help="attention asks with the layer's own state")
    flag("--loss", choices=("soft", "bce", "kl", "softmax"), default="soft", help=f"{from_fit}")
    together = "with a context or --share-trunk"
    flag("--epochs", type=int, default=None, help=f"default: 20, {together} 2")
    flag("--batch-size", type=int, default=None, help=f"default: 256, {together} 2048")
    flag("--learning-rate", type=float, default=1e-3)
    flag("--weight-decay", type=float, default=0.01)
    flag("--patience", type=int, default=3, help="epochs without a better validation recall")
    flag("--validation-fraction", type=float, default=0.1, help="of the documents")
    flag("--bits", type=int, choices=(4, 8), default=None, help="quantise the written file")
    flag("--seed", type=int, default=0)
    flag("--memory-gb", type=float, default=2.0, help="decoded samples held at once")
    flag("--jobs", type=int, default=None, help="layers trained at once; default: by machine")
    flag("--json", help="also write the metrics to this file")


def _train(options: argparse.Namespace) -> None:
    from ._malloc import keep_freed_memory
    from .training import FitOptions, TrainingOptions, train_shadow_model
    from .training.layer_trainer import DEFAULT_CANDIDATES

    keep_freed_memory()
    names = ("loss", "learning_rate", "weight_decay", "patience", "seed")
    context = _context(options)
    together = context is not None or options.share_trunk
    epochs, batch_size = (2, 2048) if together else (20, 256)
    settings = TrainingOptions(
        predictor_size=options.predictor_size,
        activation=options.activation,
        layer_norm=options.layer_norm,
        candidates=tuple(options.candidates or DEFAULT_CANDIDATES),
        validation_fraction=options.validation_fraction,
        context=context,
        trunk_rank=options.trunk_rank,
        share_trunk=options.share_trunk,
        next_token=not options.no_next_token,
        fit=FitOptions(
            epochs=options.epochs or epochs,
            batch_size=options.batch_size or batch_size,
            **{name: getattr(options, name) for name in names},
        ),
    )
    bundle = train_shadow_model(
        options.traces,
        options.out,
        settings,
        layers=options.layers,
        routers=options.model and _routers(options.model),
        bits=options.bits,
        jobs=options.jobs or default_jobs(),
        memory_bytes=int(options.memory_gb * (1 << 30)),
    )
    _write_json(options.json, bundle.training)
    for name, values in bundle.training["validation"].items():
        print(f"{name:16} " + " ".join(f"{x:.3f}" for x in values))
    print(f"{options.out}: {Path(options.out).stat().st_size / 1e6:.1f} MB")


def _context(options: argparse.Namespace) -> ContextConfig | None:
    from .context import ContextConfig

    if options.context == "none":
        return None
    attends = options.context == "attention"
    window, key_size = (options.window, options.key_size) if attends else (0, 0)
    return ContextConfig(window, key_size, options.state_size, not options.late_query)


def _evaluate_flags(flag: Any) -> None:
    flag("--predictor", required=True, help="file that train wrote")
    flag("--traces", required=True, help="directory that collect wrote")
    flag("--fit-traces", help="training traces, for the baselines that learn, if others")
    flag("--model", help="read the routers from this model instead of from the traces")
    flag("--plot", help="write a PNG of the recall per distance")
    flag("--jobs", type=int, default=None, help="layers at once; default: by machine")
    flag("--json", help="also write the result to this file")


def _evaluate(options: argparse.Namespace) -> None:
    from .evaluate import evaluate
    from .model_routers import save_routers
    from .report import plot, table

    with tempfile.TemporaryDirectory() as directory:
        routers = Path(directory) / "routers.safetensors" if options.model else None
        if routers:
            save_routers(routers, _routers(options.model))
        given = options.predictor, options.traces, options.fit_traces
        result = evaluate(*given, routers=routers, jobs=options.jobs or default_jobs())
    _write_json(options.json, result)
    print(table(result))
    if options.plot:
        plot(result, options.plot)


def _pack_flags(flag: Any) -> None:
    flag("--model", help="directory of an mlx-lm or Hugging Face MoE model")
    flag("--out", required=True, help="directory for the packed model; run again to go on")
    flag("--verify", action="store_true", help="compare all checksums of --out, packed before")


def _pack(options: argparse.Namespace) -> None:
    from .pack import pack, verify

    if bool(options.model) == options.verify:
        raise ValueError("give either --model DIR, to pack it, or --verify")
    if options.verify:
        print(f"{options.out}: {verify(options.out):,} bytes are as they were packed")
        return
    packed = pack(options.model, options.out)
    experts = sum(map(packed.num_experts, packed.layers))
    size = sum(packed.num_experts(n) * packed.expert_bytes(n) for n in packed.layers)
    print(f"{options.out}: {experts:,} experts of {len(packed.layers)} layers, {size / 1e9:.2f} GB")


def _demo_flags(flag: Any) -> None:
    flag("--out", default="demo-output", help="directory for all that is made")
    flag("--tokens", type=int, default=32_000, help="tokens to record for training")
    flag("--epochs", type=int, default=5)


def _demo(options: argparse.Namespace) -> None:
    from .demo import demo

    demo(Path(options.out), options.tokens, options.epochs, default_jobs())


def default_jobs() -> int:
    """Layers to work on at once: on a GPU one, on a CPU one for each two cores, 2 at least."""
    import mlx.core as mx

    cores = os.cpu_count() or 1
    return 1 if mx.default_device() == mx.gpu else min(cores, max(2, cores // 2))


def _routers(model: str) -> dict[int, LayerRouter]:
    from .model_routers import read_routers
    from .moe import load_model

    return read_routers(load_model(model)[0])


def _write_json(path: str | None, value: Any) -> None:
    if path:
        Path(path).write_text(json.dumps(value, indent=1) + "\n")
