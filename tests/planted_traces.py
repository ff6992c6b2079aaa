"""Small traces of a model that does not exist: states that turn a little from layer to layer."""

from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_od_moe.model_routers import LayerRouter, save_routers
from mlx_od_moe.router import Router, RouterConfig
from mlx_od_moe.training import FitOptions, TrainingOptions, train_shadow_model
from mlx_od_moe.training.traces import (
    PREFILL,
    ShardRows,
    TraceInfo,
    open_traces,
    shard_path,
    write_collection,
    write_shard,
)

HIDDEN, EXPERTS, TOP_K = 24, 12, 3


def plant(
    directory: Path,
    *,
    layers: tuple[int, ...] = (1, 3, 4),
    lookahead: int = 2,
    shards: int = 4,
    sequences: int = 5,
    rows: int = 30,
    with_routers: bool = True,
    seed: int = 0,
    carry: float = 0.0,
) -> TraceInfo:
    """`shards` of `sequences` each (a document apiece) of about `rows` tokens.

    Each layer's state is the one before, turned by a fixed rotation and a little noise, so its own
    router looks ahead well and a learned map better. `carry`: the share of the previous token's
    state that each layer's adds, unseen by the layers before. Sequences differ in length.
    """
    rng = np.random.default_rng(seed)
    weights = {layer: rng.standard_normal((EXPERTS, HIDDEN)).astype(np.float32) for layer in layers}
    generator = rng.standard_normal((HIDDEN, HIDDEN)) / HIDDEN**0.5
    rotation, upper = np.linalg.qr(np.eye(HIDDEN) + 0.5 * (generator - generator.T))
    turn = (rotation * np.sign(np.diag(upper))).astype(np.float32)
    collection = {
        "model": "planted",
        "hidden_size": HIDDEN,
        "num_experts": EXPERTS,
        "top_k": TOP_K,
        "lookahead": lookahead,
        "mode": "prefill",
        "seed": seed,
        "tokens": shards * sequences * rows,
        "moe_layers": list(layers),
    }
    directory.mkdir(parents=True)
    document = 0
    for index in range(shards):
        shard = ShardRows(2 * sequences * rows, collection)
        for _ in range(sequences):
            n = int(rng.integers(rows // 2, rows * 3 // 2))
            state = rng.standard_normal((n, HIDDEN)).astype(np.float32)
            states, experts = {}, {}
            for layer in layers:
                states[layer] = state.astype(np.float16).astype(np.float32)
                scores = states[layer] @ weights[layer].T
                experts[layer] = np.argsort(-scores, axis=1)[:, :TOP_K].astype(np.int16)
                noise = rng.standard_normal(state.shape).astype(np.float32)
                state = state @ turn + 0.1 * noise
                for i in range(1, n if carry else 0):
                    state[i] += carry * state[i - 1]
            tokens = rng.integers(0, 100, n).astype(np.int32)
            shard.add(tokens, document, np.full(n, PREFILL, np.uint8), states, experts)
            document += 1
        write_shard(shard_path(directory, index), shard.arrays())
    write_collection(directory, collection)
    if with_routers:
        save_routers(directory / "routers.safetensors", routers_of(weights))
    return open_traces(directory)


def routers_of(weights: dict[int, np.ndarray]) -> dict[int, LayerRouter]:
    """The routers with those weights, no norm before them."""
    found = {}
    for layer, weight in weights.items():
        router = Router(RouterConfig(hidden_size=weight.shape[1], num_experts=weight.shape[0]))
        router.linear.weight = mx.array(weight)
        found[layer] = LayerRouter(router, None)
    return found


def plant_predictor(directory: Path) -> tuple[Path, Path]:
    """Traces, and the file of a small predictor that was trained on them."""
    traces, predictor = plant(directory / "traces").path, directory / "predictor.safetensors"
    options = TrainingOptions(
        predictor_size=24, candidates=("mlp+gate",), fit=FitOptions(epochs=5, learning_rate=5e-3)
    )
    train_shadow_model(traces, predictor, options, progress=False)
    return traces, predictor
