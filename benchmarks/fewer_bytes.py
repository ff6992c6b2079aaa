"""What fewer bytes per token cost and save: recall of trained designs, and time of cold bundles.

python benchmarks/fewer_bytes.py recall TRAINING_TRACES VALIDATION_TRACES [design ...]
python benchmarks/fewer_bytes.py time [threads ...]

`recall` trains every design on the same tokens in the same way: all layers together, with the
previous token's encoded state as context. `time` runs one token through 60 layers of each design in
int4, 4096 → 1024 → 4 x 384 for the plain one, in turns, so that each design finds its weights in
DRAM. What two layers share is cold at the token's first layer only; the second figure is with 32 MB
of other memory read before each layer, untimed, as by a model that runs on the same cores.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from mlx_od_moe._ext import ReadProbe, time_predict

import mlx_od_moe
from mlx_od_moe.bench.timing import Run, in_turns, machine, summary
from mlx_od_moe.context import ContextConfig
from mlx_od_moe.metrics import Recall
from mlx_od_moe.projection import Projection
from mlx_od_moe.training import FitOptions, TrainingOptions, open_traces, train_shadow_model
from mlx_od_moe.training.sequence_blocks import SequenceBlocks
from mlx_od_moe.training.shared_predictors import SharedPredictors, measure_blocks, name_of

LAYERS, HIDDEN, EXPERTS, AHEAD = 60, 4096, 384, 4
BETWEEN = 32 << 20
FIT = FitOptions(loss="kl", epochs=4, batch_size=2048)
CONTEXT = ContextConfig(window=0, key_size=0, state_size=64)

# Per design: predictor_size, trunk_rank and share_trunk. Of 60 layers (4096 wide) …
TIMED = {
    "plain": (1024, 0, False),
    "own rank 256": (1024, 256, False),
    "shared rank 512": (1024, 512, True),
    "shared rank 512, width 512": (512, 512, True),
    "width 512": (512, 0, False),
    "width 256": (256, 0, False),
}
EVERY_SECOND = ("plain", "shared rank 512", "width 512", "width 256")
# … and of nano's 7 (192 wide), whose plain width is 512: ranks as shares of width and state.
TRAINED = {
    "plain": (512, 0, False),
    "own rank 48": (512, 48, False),
    "shared rank 96": (512, 96, True),
    "width 256": (256, 0, False),
    "shared rank 96, width 256": (256, 96, True),
}


def trained(
    traces: str, design: tuple[int, int, bool], directory: str
) -> mlx_od_moe.PredictorBundle:
    """The design, trained."""
    width, rank, share = design
    options = TrainingOptions(
        predictor_size=width, trunk_rank=rank, share_trunk=share, context=CONTEXT, fit=FIT
    )
    return train_shadow_model(traces, Path(directory) / "p.safetensors", options, progress=False)


def recalls(bundle: mlx_od_moe.PredictorBundle, traces: str) -> dict[int, Recall]:
    """{layer: recall} on all tokens of the traces."""
    targets = {layer: bundle.targets(layer) for layer in bundle}
    info = open_traces(traces)
    asking = {layer: bundle.query_layer(layer) for layer in bundle}
    model = SharedPredictors(dict(bundle), targets, CONTEXT, info.hidden_size, asking)
    model.memories = {name_of(layer): memory for layer, memory in bundle.memories.items()}
    return measure_blocks(model, targets, SequenceBlocks(info, info.moe_layers, CONTEXT.rows))


def per_distance(found: dict[int, Recall], k: int) -> list[float]:
    """Mean over the layers that have the distance."""
    at = [recall.at(k) for recall in found.values()]
    return [float(np.mean([r[d] for r in at if len(r) > d])) for d in range(AHEAD)]


def last_word(found: dict[int, Recall], k: int, sources: list[int], offset: int) -> float:
    """Mean recall of the nearest prediction of each layer, every second source from `offset` on."""
    used = sources[offset::2]
    best = [
        max((s, found[s].at(k)[t - s - 1]) for s in used if 0 < t - s <= AHEAD)[1]
        for t in range(sources[0] + 2, sources[-1] + 2)
    ]
    return float(np.mean(best))


def report_recall(traces: str, validation: str, names: list[str]) -> None:
    """Prints a row per design."""
    print(f"load {machine()['load']}; recall@8 d1 … d4 / recall@16 d1 … d4")
    for name in names or TRAINED:
        with tempfile.TemporaryDirectory() as directory:
            bundle = trained(traces, TRAINED[name], directory)
        found = recalls(bundle, validation)
        unique = {id(p.shared_projection): p.shared_projection for p in bundle.values()}
        modules = [*bundle.values(), *(p for p in unique.values() if p is not None)]
        weights = sum(
            m.weight.size for module in modules for m in _matrices(module) if m.weight.ndim == 2
        )
        columns = " / ".join(" ".join(f"{r:.4f}" for r in per_distance(found, k)) for k in (8, 16))
        print(f"{name:28}{weights / 1e6:7.2f} M  {columns}", flush=True)
        if name == "plain":
            for k in (8, 16):
                every = np.mean([r.at(k)[0] for s, r in found.items() if s > min(found)])
                halves = [last_word(found, k, sorted(found), offset) for offset in (0, 1)]
                print(f"  nearest prediction, recall@{k}: {every:.4f}; of every second layer "
                      f"{np.mean(halves):.4f}", flush=True)  # fmt: skip


def _matrices(module: mlx_od_moe.ExpertPredictor) -> list:
    skipped = ("previous_state", "encode")
    return [
        m for path, m in module.named_modules()
        if hasattr(m, "weight") and not path.endswith(skipped)
    ]  # fmt: skip


def native_layers(design: tuple[int, int, bool], threads: int) -> list[mlx_od_moe.NativePredictor]:
    """60 layers with random weights of their own, packed as a model's are."""
    width, rank, share = design
    config = mlx_od_moe.PredictorConfig(HIDDEN, width, EXPERTS, AHEAD, trunk_rank=rank)
    shared = Projection(HIDDEN, rank) if share else None
    layers = {i: mlx_od_moe.ExpertPredictor(config, projection=shared) for i in range(LAYERS)}
    bundle = mlx_od_moe.PredictorBundle(list(range(LAYERS + AHEAD)), layers)
    return list(bundle.native("int4", threads).values())


def token(
    natives: list[mlx_od_moe.NativePredictor], x: np.ndarray, between: ReadProbe | None
) -> Run:
    """All layers once, by C++'s clock; before each, `between` reads what is not timed."""

    def run() -> float:
        total = 0.0
        for native in natives:
            if between is not None:
                between.read(0, BETWEEN)
            total += time_predict(native, x, native.top_k)
        return total

    return run


def report_time(threads: int) -> None:
    """Prints a row per design."""
    x = np.random.default_rng(0).standard_normal((1, HIDDEN), dtype=np.float32)
    packed = {name: native_layers(design, threads) for name, design in TIMED.items()}
    rows = dict(packed)
    for name in EVERY_SECOND:
        rows[f"{name}, every second layer"] = packed[name][::2]
    probe = ReadProbe(BETWEEN, 1)
    calm = in_turns({n: token(r, x, None) for n, r in rows.items()}, 40, 30, warm_up=0, calls=1)
    busy = in_turns({n: token(r, x, probe) for n, r in rows.items()}, 8, 60, warm_up=0, calls=1)
    print(f"{threads} thread(s), load {machine()['load']}, {packed['plain'][0].kernel}: "
          "MB per token, ms min, p50, plain / it at p50; likewise, reads between")  # fmt: skip
    base = [summary(times["plain"])["p50"] for times in (calm, busy)]
    for name, natives in rows.items():
        shared = natives[0].projection_bytes * (len(natives) - 1) if "shared" in name else 0
        megabytes = (sum(n.weight_bytes for n in natives) - shared) / 1e6
        parts = ""
        for times, plain in zip((calm, busy), base, strict=True):
            found = summary(times[name])
            parts += (f"  {found['min'] / 1e3:6.2f} {found['p50'] / 1e3:6.2f} "
                      f"{plain / found['p50']:5.2f}x")  # fmt: skip
        print(f"{name:45}{megabytes:7.1f}{parts}", flush=True)


def main() -> None:
    command, *arguments = sys.argv[1:] or ["help"]
    if command == "recall" and len(arguments) >= 2:
        report_recall(arguments[0], arguments[1], arguments[2:])
    elif command == "time":
        for threads in map(int, arguments or ("1", "2")):
            report_time(threads)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
