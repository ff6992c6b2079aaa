"""Requests become traces that train reads, and only those that may."""

import json
import os

import mlx.core as mx
import numpy as np
import pytest

import mlx_od_moe
from checkpoints import model_directory
from mlx_od_moe import PredictorBundle
from mlx_od_moe.cli import main
from mlx_od_moe.moe import find_moe_layers, load_model, record_routing
from mlx_od_moe.training.run_model import ModelRunner
from mlx_od_moe.training.traces import DECODE, PREFILL, open_traces
from mlx_od_moe.training.traffic_traces import TrafficTraces
from servers import Command, client, eventually, serving

TEXTS = ("Once upon a time", "def add(a, b):\n    return", "The sea was", "func main() {")


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer, runtime = mlx_od_moe.load(model_directory("nano-moe"))
    with runtime:
        yield model, tokenizer, runtime


def test_requests_are_recorded_as_the_model_saw_them(loaded, tmp_path):
    model, tokenizer, runtime = loaded
    traces = TrafficTraces(tmp_path / "traces", model, runtime, share=1.0)
    with serving(loaded, traces) as server:
        asked = {"model": "nano-moe", "prompt": TEXTS[0], "max_tokens": 6, "temperature": 0}
        text = client(server).completions.create(**asked).choices[0].text
        unseen = asked | {"prompt": TEXTS[1], "extra_body": {"store": False}}
        client(server).completions.create(**unseen)
        eventually(lambda: server.monitor.page()["collected"]["tokens"] > 0)
    traces.close()
    info = open_traces(tmp_path / "traces")
    assert (info.mode, info.model, info.lookahead) == ("traffic", "nano-moe", 4)
    assert (info.num_experts, info.top_k, info.hidden_size) == (64, 8, 192)
    routers = mx.load(str(info.routers))
    assert {f"{layer}.weight" for layer in info.moe_layers} <= routers.keys()
    (path,) = info.shards
    assert os.stat(path).st_mode & 0o077 == 0
    shard = np.load(path)
    prompt = tokenizer.encode(TEXTS[0])
    ids = shard["token_ids"].tolist()
    assert ids[: len(prompt)] == prompt
    assert tokenizer.decode(ids[len(prompt) :]).strip() == text.strip()
    assert shard["phase"].tolist() == [PREFILL] * len(prompt) + [DECODE] * 6
    assert shard["position"].tolist() == list(range(len(ids)))
    stock, _ = load_model(model_directory("nano-moe"))
    with record_routing(stock) as recorder:
        batch = ModelRunner(stock, find_moe_layers(stock), recorder).prefill([ids])
    for layer in info.moe_layers:
        states = shard[f"hidden_states_{layer}"].astype(np.float32)
        assert np.abs(states - batch.states[layer][0]).max() < 0.15
        chosen, expected = shard[f"routed_experts_{layer}"], batch.experts[layer][0]
        common = [len(set(a) & set(b)) for a, b in zip(chosen, expected, strict=True)]
        assert np.mean(common) > 0.95 * info.top_k


def test_a_limit_a_second_run_and_another_model(loaded, tmp_path):
    model, _, runtime = loaded
    for tokens, expected in ((10, 10), (25, 25)):
        traces = TrafficTraces(tmp_path, model, runtime, 1.0, tokens)
        with pytest.raises(ValueError, match="another process"):
            TrafficTraces(tmp_path, model, runtime)
        for _ in range(3):
            if not traces.wants():
                break
            traces.begin()
            mx.eval(model(mx.arange(12)[None]))
            traces.end(list(range(12)), 12)
        assert not traces.wants()
        traces.close()
        assert open_traces(tmp_path).samples == expected
    documents = np.concatenate([np.load(s)["document"] for s in open_traces(tmp_path).shards])
    assert len(set(documents.tolist())) == 3
    collection = json.loads((tmp_path / "collection.json").read_text())
    (tmp_path / "collection.json").write_text(json.dumps(collection | {"model": "other"}))
    with pytest.raises(ValueError, match="begun with model='other'"):
        TrafficTraces(tmp_path, model, runtime)
    for share, tokens in ((0, 1), (1.1, 1), (0.5, 0)):
        with pytest.raises(ValueError, match="share must be over 0"):
            TrafficTraces(tmp_path, model, runtime, share, tokens)


def test_a_full_disk_ends_the_recording_and_no_request(loaded, tmp_path, monkeypatch):
    model, _, runtime = loaded
    traces = TrafficTraces(tmp_path, model, runtime, 1.0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(traces, "_open_shard", full)
    with serving(loaded, traces) as server:
        asked = {"model": "nano-moe", "prompt": TEXTS[0], "max_tokens": 2}
        assert client(server).completions.create(**asked).usage.completion_tokens == 2
        eventually(lambda: not server.collects())
        assert client(server).completions.create(**asked).usage.completion_tokens == 2
    traces.close()


def test_serve_collect_train_serve(tmp_path, capsys):
    traces, predictor = tmp_path / "traces", tmp_path / "predictor.safetensors"
    with Command("--collect", str(traces), "--collect-share", "1") as command:
        for text in TEXTS:
            client(command).completions.create(model="nano-moe", prompt=text, max_tokens=12)
        assert command.end() == 0
        assert "100% of the requests are recorded" in command.said
    flags = ["--predictor-size", "16", "--epochs", "1", "--candidates", "mlp+gate", "--jobs", "1"]
    assert main(["train", "--traces", str(traces), "--out", str(predictor), *flags]) == 0
    recall = PredictorBundle.load(predictor).training["validation"]["recall_at_k"]
    capsys.readouterr()
    with Command("--predictor", str(predictor)) as command:
        client(command).completions.create(model="nano-moe", prompt=TEXTS[0], max_tokens=4)
        assert command.end() == 0
    assert len(recall) == 4
