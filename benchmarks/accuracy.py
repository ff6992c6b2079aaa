"""Every recall table of a model by one command: collect, train, evaluate, and what it cost.

    python benchmarks/accuracy.py --model examples/nano-moe --text TEXT --out nano --curve 1000

TEXT holds `*.train.txt`, `*.val.txt` and, of others, `unseen_*.val.txt`. Traces, predictors,
tables (`tables.md`), plots and JSON lie in OUT; predictors that lie there are not trained anew. The
one with context is `OUT/context.safetensors`, and `OUT/predictor.safetensors` is it at 4 bits in
groups of 32. Plots need the extra `plot`.
"""

import argparse
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from mlx_od_moe import PredictorBundle

PLAIN = ["--predictor-size", "512", "--epochs", "5", "--batch-size", "512", "--candidates"]
PLAIN += ["mlp+gate", "mlp+gate+previous", "gate"]
CONTEXT = ["--context", "attention", "--candidates", "mlp+gate", "gate"]
ABLATIONS = {
    "previous token's state only": ["--context", "state", "--candidates", "mlp+gate", "gate"],
    "without gate lookahead": ["--context", "attention", "--candidates", "mlp"],
    "KL": [*CONTEXT, "--loss", "kl"],
    "hard labels": [*CONTEXT, "--loss", "bce"],
    "late queries": [*CONTEXT, "--late-query"],
    "width 512": [*CONTEXT, "--predictor-size", "512"],
    "window 16": [*CONTEXT, "--window", "16"],
    "one epoch": [*CONTEXT, "--epochs", "1"],
}


@dataclass
class Tables:
    """What is measured, in order, as Markdown; costs by step."""

    out: Path
    options: argparse.Namespace
    text: list[str] = field(default_factory=list)
    costs: list[tuple[str, float, float]] = field(default_factory=list)

    def run(self, *arguments: str | Path) -> str:
        """One command of mlx-od-moe; its output. Progress goes to the terminal."""
        words = [str(a) for a in arguments]
        print("mlx-od-moe", *words, file=sys.stderr, flush=True)
        start, cpu = time.time(), cpu_seconds()
        done = subprocess.run(
            [sys.executable, "-m", "mlx_od_moe", *words],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        self.costs.append(
            (" ".join(words[:1] + words[-2:]), time.time() - start, cpu_seconds() - cpu)
        )
        return done.stdout

    def collect(self, name: str, tokens: int, pattern: str, excluded: str = "-") -> Path:
        """Traces of the texts that match."""
        texts = sorted(p for p in self.options.text.glob(pattern) if not p.match(excluded))
        if not texts:
            raise SystemExit(f"[accuracy] {self.options.text} holds no {pattern}")
        traces = self.out / name
        model = self.options.model
        self.run(
            "collect", "--model", model, "--text", *texts, "--out", traces, "--tokens", str(tokens)
        )
        return traces

    def train(self, name: str, traces: Path, *flags: str) -> Path:
        """A predictor of the traces, trained unless it lies there."""
        predictor = self.out / f"{name}.safetensors"
        if not predictor.exists():
            memory = ["--memory-gb", str(self.options.memory_gb)]
            self.run("train", *flags, *memory, "--traces", traces, "--out", predictor)
        return predictor

    def evaluate(self, title: str, predictor: Path, traces: Path, fit: Path) -> None:
        """The table of one predictor on one set of traces."""
        stem = self.out / f"{predictor.stem}-{traces.name}"
        files = ["--json", f"{stem}.json", "--plot", f"{stem}.png"]
        table = self.run(
            "evaluate", "--predictor", predictor, "--fit-traces", fit, *files, "--traces", traces
        )
        self.text += [
            f"## {title}",
            "```",
            table.rstrip(),
            "```",
            f"![{title}]({stem.name}.png)",
            "",
        ]
        self.write()

    def write(self) -> None:
        """OUT/tables.md as far as it has got."""
        rows = [f"| {step} | {wall:.0f} | {cpu:.0f} |" for step, wall, cpu in self.costs]
        sizes = [
            f"| {file.name} | {file.stat().st_size / 1e6:.1f} MB |"
            for file in sorted(self.out.glob("*.safetensors"))
        ]
        costs = ["## Costs", "| step | seconds | CPU seconds |", "|---|---|---|", *rows, ""]
        costs += ["| predictor | |", "|---|---|", *sizes, ""]
        (self.out / "tables.md").write_text("\n".join([*self.text, *costs]), encoding="utf-8")


def schedule(tokens: int) -> list[str]:
    """How long to train on so many tokens: a curve shows what samples are worth, not steps.

    Few are passed over until the same work is done, one epoch of 2**20, but not 500 times.
    """
    epochs = str(min(500, max(3, 2**20 // tokens)))
    held_out = ".02" if tokens >= 2**18 else ".1"
    return ["--epochs", epochs, "--patience", epochs, "--validation-fraction", held_out]


def cpu_seconds() -> float:
    """Of all finished child processes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="to train on")
    parser.add_argument(
        "--held-out", type=int, default=49_152, help="validation tokens; half unseen"
    )
    parser.add_argument("--memory-gb", type=float, default=6.0)
    parser.add_argument(
        "--curve", type=int, nargs="*", default=[], help="train on so few tokens too"
    )
    parser.add_argument("--ablations", action="store_true", help="what each part is worth")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    tables = Tables(options.out, options)

    train = tables.collect("train", options.tokens, "*.train.txt")
    held_out = {
        "validation": tables.collect("validation", options.held_out, "*.val.txt", "unseen_*"),
        "unseen domains": tables.collect("unseen", options.held_out // 2, "unseen_*.val.txt"),
    }
    predictors = {
        "with context": tables.train("context", train, *CONTEXT, "--validation-fraction", ".02"),
        "without context": tables.train("plain", train, *PLAIN),
    }
    for name, predictor in predictors.items():
        for where, traces in held_out.items():
            tables.evaluate(f"{name}, {where}", predictor, traces, train)
    bundle = PredictorBundle.load(predictors["with context"])
    bundle.quantized(4, group_size=32).save(options.out / "predictor.safetensors")

    validation = held_out["validation"]
    for tokens in options.curve:
        traces = tables.collect(f"train-{tokens}", tokens, "*.train.txt")
        few = tables.train(f"context-{tokens}", traces, *CONTEXT, *schedule(tokens))
        tables.evaluate(f"with context, {tokens:,} tokens", few, validation, traces)
    for name, flags in ABLATIONS.items() if options.ablations else ():
        stem = "ablation-" + "-".join(name.split())
        other = tables.train(stem, train, *flags, "--validation-fraction", ".02")
        tables.evaluate(f"with context, {name}", other, validation, train)
    tables.write()
    print((options.out / "tables.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
