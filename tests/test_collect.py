"""Collecting traces: what is recorded, that it can be resumed, and that nothing bad passes."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import qwen3_moe

from mlx_od_moe.moe import find_moe_layers
from mlx_od_moe.training import collect_training_data, model_traces, traces
from mlx_od_moe.training.collect_training_data import collect_expert_usage
from mlx_od_moe.training.traces import open_traces

ROOT = Path(__file__).parents[1]
SHAPE = {"window": 48, "shard_tokens": 200, "batch_size": 4, "lookahead": 2, "progress": False}


class ByteTokenizer:
    """Token ids are bytes: documents can be read back from traces."""

    bos_token_id = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())


class StartTokenizer(ByteTokenizer):
    """Starts every text with token 1, as Llama's does."""

    bos_token_id = 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + super().encode(text)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    mx.random.seed(0)
    args = {
        "model_type": "qwen3_moe",
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
        "moe_intermediate_size": 16,
        "rms_norm_eps": 1e-6,
        "vocab_size": 256,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
        "norm_topk_prob": True,
    }
    model: nn.Module = qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict(args))
    mx.eval(model.parameters())
    return model


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    """Two files; document i of file f says so in each of its lines."""
    paths = [tmp_path / f"{f}.txt" for f in "ab"]
    for path in paths:
        documents = [f"{path.stem}{i:02d} " * (7 + 5 * i) for i in range(12)]
        path.write_bytes("\0".join(documents).encode())
    return paths


def load(directory: Path) -> dict[str, np.ndarray]:
    shards = [dict(np.load(shard)) for shard in open_traces(directory).shards]
    return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}


def sequences(rows: dict[str, np.ndarray]) -> list[slice]:
    starts = [*np.flatnonzero(rows["position"] == 0), len(rows["position"])]
    return [slice(a, b) for a, b in pairwise(starts)]


def same_files(a: Path, b: Path) -> bool:
    names = sorted(p.name for p in a.iterdir())
    return names == sorted(p.name for p in b.iterdir()) and all(
        np.array_equal(np.load(a / name)[key], np.load(b / name)[key])
        for name in names
        if name.endswith(".npz")
        for key in np.load(a / name).files
    )


def test_the_trace_says_what_the_model_saw_and_chose(
    model: nn.Module, texts: list[Path], tmp_path: Path
) -> None:
    info = collect_expert_usage(
        (model, ByteTokenizer()), out=tmp_path / "t", text=texts, tokens=600, **SHAPE
    )
    assert (info.samples, info.moe_layers, info.hidden_size) == (600, (0, 2, 3), 32)
    assert (info.num_experts, info.top_k, info.lookahead) == (8, 2, 2)
    rows = load(info.path)
    assert rows["phase"].sum() > 200
    for part in sequences(rows):
        assert part.stop - part.start <= 48
        assert np.array_equal(rows["position"][part], np.arange(part.stop - part.start))
        # The model alone, on this sequence alone, is the oracle.
        hidden = {}
        x = model.model.embed_tokens(mx.array(rows["token_ids"][part])[None])
        for i, layer in enumerate(model.layers):
            h = x + layer.self_attn(layer.input_layernorm(x), "causal")
            hidden[i] = layer.post_attention_layernorm(h)
            x = h + layer.mlp(hidden[i])
        for layer in info.moe_layers:
            expected = np.array(hidden[layer])[0]
            assert np.allclose(rows[f"hidden_states_{layer}"][part], expected, atol=5e-3)
    for layer, ahead in ((0, [2, 3]), (2, [3, None]), (3, [None, None])):
        for d, target in enumerate(ahead):
            chosen = rows[f"expert_choices_{layer}"][:, d]
            expected = -1 if target is None else rows[f"routed_experts_{target}"]
            assert np.array_equal(chosen, np.broadcast_to(expected, chosen.shape))


def test_recorded_routers_rank_first_what_was_routed(
    model: nn.Module, texts: list[Path], tmp_path: Path
) -> None:
    info = collect_expert_usage(
        (model, ByteTokenizer()), out=tmp_path / "t", text=texts, tokens=300, **SHAPE
    )
    routers, metadata = mx.load(str(info.routers), return_metadata=True)
    assert metadata["scoring"] == "softmax"
    rows = load(info.path)
    for layer in info.moe_layers:
        scores = rows[f"hidden_states_{layer}"] @ np.array(routers[f"{layer}.weight"]).T
        ranked = np.sort(np.argsort(-scores, axis=1)[:, :2], axis=1)
        agree = ranked == np.sort(rows[f"routed_experts_{layer}"], axis=1)
        assert agree.mean() > 0.99  # float16 states break some near-ties the other way
        assert routers[f"{layer}.norm"].shape == (32,)


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_documents_keep_one_number_and_files_take_turns(
    model: nn.Module, texts: list[Path], tmp_path: Path, mode: str
) -> None:
    info = collect_expert_usage(
        (model, ByteTokenizer()), out=tmp_path / "t", text=texts, tokens=500, mode=mode, **SHAPE
    )
    rows = load(info.path)
    assert rows["phase"].any() == (mode == "decode")
    names: dict[int, set[bytes]] = {}
    for part in sequences(rows):
        tokens = bytes(rows["token_ids"][part][rows["phase"][part] == 0].tolist())
        number = {int(n) for n in rows["document"][part]}
        assert len(number) == 1
        names.setdefault(number.pop(), set()).add(tokens.split()[0])
    for number, name in names.items():
        assert name == {f"{'ab'[number // 12]}{number % 12:02d}".encode()}
    assert {number // 12 for number in names} == {0, 1}
    assert len(names) >= 8


def test_prefill_uses_all_text_once_and_says_when_it_ends(
    model: nn.Module, texts: list[Path], tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="ended after 3312 of 9000 tokens"):
        collect_expert_usage(
            (model, ByteTokenizer()),
            out=tmp_path / "t",
            text=texts,
            tokens=9000,
            mode="prefill",
            **{**SHAPE, "shard_tokens": 2000},
        )
    rows = load(tmp_path / "t")
    read: dict[int, bytes] = {}
    for number in range(24):
        parts = [p for p in sequences(rows) if rows["document"][p.start] == number]
        read[number] = b"".join(bytes(rows["token_ids"][p].tolist()) for p in parts)
    documents = [d for path in texts for d in path.read_bytes().split(b"\0")]
    for number, document in enumerate(documents):
        assert sorted(read[number]) == sorted(document)


def test_a_killed_collection_resumes_to_the_same_traces(
    model: nn.Module, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = (model, ByteTokenizer())
    collect_expert_usage(pair, out=tmp_path / "whole", text=texts, tokens=900, **SHAPE)
    shards = []

    def killed(path: Path, arrays: Any) -> None:
        if len(shards) == 2:
            raise KeyboardInterrupt
        traces.write_shard(path, arrays)
        shards.append(path)

    monkeypatch.setattr(collect_training_data, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        collect_expert_usage(pair, out=tmp_path / "killed", text=texts, tokens=900, **SHAPE)
    monkeypatch.undo()
    kept = {path: path.stat().st_mtime_ns for path in shards}
    assert open_traces(tmp_path / "killed").samples < 900
    collect_expert_usage(pair, out=tmp_path / "killed", text=texts, tokens=900, **SHAPE)
    assert {path: path.stat().st_mtime_ns for path in shards} == kept
    assert same_files(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(
    ("setting", "value"), [("seed", 1), ("tokens", 500), ("window", 40), ("mode", "decode")]
)
def test_resuming_with_another_setting_names_it(
    model: nn.Module, texts: list[Path], tmp_path: Path, setting: str, value: Any
) -> None:
    settings: dict[str, Any] = {"out": tmp_path / "t", "text": texts, "tokens": 200, **SHAPE}
    collect_expert_usage((model, ByteTokenizer()), **settings)
    with pytest.raises(ValueError, match=f"begun with {setting}="):
        collect_expert_usage((model, ByteTokenizer()), **{**settings, setting: value})
    texts[0].write_bytes(b"other text")
    with pytest.raises(ValueError, match="begun with texts="):
        collect_expert_usage((model, ByteTokenizer()), **settings)


def test_every_sequence_starts_as_a_prompt_would(
    model: nn.Module, texts: list[Path], tmp_path: Path
) -> None:
    collect_expert_usage(
        (model, StartTokenizer()), out=tmp_path / "t", text=texts, tokens=400, **SHAPE
    )
    rows = load(tmp_path / "t")
    assert (rows["token_ids"][rows["position"] == 0] == 1).all()
    assert (rows["token_ids"][(rows["position"] > 0) & (rows["phase"] == 0)] != 1).all()


@pytest.mark.parametrize(
    ("factor", "message"),
    [(1e6, "layer 2: hidden states must fit float16"), (np.nan, "layer 2: .* NaN or infinity")],
)
def test_states_that_float16_cannot_hold_are_an_error(
    model: nn.Module, texts: list[Path], tmp_path: Path, factor: float, message: str
) -> None:
    norm = model.layers[2].post_attention_layernorm
    before = norm.weight
    try:
        norm.weight = before * factor
        with pytest.raises(ValueError, match=message), pytest.warns(match="router is left"):
            collect_expert_usage(
                (model, ByteTokenizer()), out=tmp_path / "t", text=texts, tokens=200, **SHAPE
            )
    finally:
        norm.weight = before
    assert not list((tmp_path / "t").glob("shard-*"))


def test_no_text_and_wrong_settings_are_errors(model: nn.Module, tmp_path: Path) -> None:
    pair = (model, ByteTokenizer())
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(ValueError, match="no text to collect from"):
        collect_expert_usage(pair, out=tmp_path / "t", text=[empty])
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        collect_expert_usage(pair, out=tmp_path / "t", text=[tmp_path / "missing.txt"])
    with pytest.raises(ValueError, match="mode must be"):
        collect_expert_usage(pair, out=tmp_path / "t", text=[empty], mode="train")
    with pytest.raises(ValueError, match="window must be at least 1, but is 0"):
        collect_expert_usage(pair, out=tmp_path / "t", text=[empty], window=0)
    with pytest.raises(ValueError, match="top_k must be at most num_experts"):
        collect_expert_usage(out=tmp_path / "t", num_experts=4)


def test_a_real_model_is_read_by_its_directory(tmp_path: Path, texts: list[Path]) -> None:
    places = (ROOT / "examples/nano-moe", ROOT / "../shared/models/nano-qwen3-moe")
    nano = next((place for place in places if (place / "config.json").exists()), None)
    if nano is None:
        pytest.skip("needs the nano model in examples/nano-moe")
    info = collect_expert_usage(nano, out=tmp_path / "t", text=texts, tokens=600, progress=False)
    assert (info.samples, len(info.moe_layers), info.num_experts, info.top_k) == (600, 8, 64, 8)
    rows = load(info.path)
    routers = mx.load(str(info.routers))
    for layer in info.moe_layers:
        scores = rows[f"hidden_states_{layer}"] @ np.array(routers[f"{layer}.weight"]).T
        ranked = np.sort(np.argsort(-scores, axis=1)[:, :8], axis=1)
        assert (ranked == np.sort(rows[f"routed_experts_{layer}"], axis=1)).mean() > 0.98


def test_hooks_are_taken_out_of_a_given_model(
    model: nn.Module, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("planned")

    monkeypatch.setattr(model_traces.ModelTraces, "collect", fail)
    with pytest.raises(RuntimeError, match="planned"):
        collect_expert_usage((model, ByteTokenizer()), out=tmp_path, text=texts, progress=False)
    for layer in find_moe_layers(model):
        assert type(layer.block) is qwen3_moe.Qwen3MoeSparseMoeBlock
