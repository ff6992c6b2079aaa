"""The generate command, the hot set it keeps, and what it says to wrong input."""

import json
import os

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import generate
from mlx_lm.utils import load as load_stock

import mlx_od_moe
from checkpoints import model_directory
from mlx_od_moe.cli import main
from mlx_od_moe.pack import pack

PROMPT = ("--prompt", "Once upon a time", "--max-tokens", "12", "--ignore-chat-template")


@pytest.fixture(scope="module")
def nano():
    return str(model_directory("nano-moe"))


def test_generate_prints_mlx_lms_text_and_its_figures(nano, capsys, tmp_path):
    out = tmp_path / "result.json"
    assert main(["generate", "--model", nano, *PROMPT, "--json", str(out)]) == 0
    printed, said = capsys.readouterr()
    stock, tokenizer = load_stock(nano)
    assert printed.rstrip("\n") == generate(stock, tokenizer, PROMPT[1], max_tokens=12).rstrip("\n")
    result = json.loads(out.read_text())
    assert result["text"] == printed[:-1]
    assert result["generated_tokens"] == 12
    assert 0 < result["hit_rate"] < 1
    assert result["bytes_per_token"] > 0
    assert f"hit rate {result['hit_rate']:.1%}" in said


def test_sampling_is_repeatable_by_seed(nano, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        main(["generate", "--model", nano, *PROMPT, "--temp", "1", "--seed", seed])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_routes_are_recorded_for_simulate(nano, capsys, tmp_path):
    trace = tmp_path / "routes.npz"
    assert main(["generate", "--model", nano, *PROMPT, "--trace", str(trace)]) == 0
    with np.load(trace) as routes:
        assert routes["experts"].shape[1:] == (8, 8)
        assert len(routes["experts"]) == len(routes["tokens"])
        assert len(routes["tokens"]) >= 12
        assert all(len(set(row)) == 8 for row in routes["experts"].reshape(-1, 8).tolist())
    assert main(["simulate", "--trace", str(trace), "--capacity", "25%"]) == 0


def test_a_start_with_kept_usage_is_a_warm_one(nano, capsys, tmp_path):
    usage = str(tmp_path / "usage.json")
    assert main(["generate", "--model", nano, *PROMPT, "--save-usage", usage]) == 0
    uses = {
        int(n): np.array(u)
        for n, u in json.loads((tmp_path / "usage.json").read_text())["uses"].items()
    }
    runtime = mlx_od_moe.load(nano, usage=usage)[2]
    with runtime:
        for layer in runtime.store.layers:
            resident = runtime.store.resident(layer)
            assert len(resident) == min(16, np.count_nonzero(uses[layer]))
            others = np.setdiff1d(np.arange(64), resident)
            assert uses[layer][resident].min() >= uses[layer][others].max()


def test_usage_of_another_model_is_refused(nano, tmp_path):
    usage = tmp_path / "usage.json"
    for text, said in (
        ("[]", "not a readable file of usage"),
        ("{", "not a readable file of usage"),
        ('{"format": "mlx-od-moe-usage", "version": 1, "uses": {"0": [1]}}', "another model"),
    ):
        usage.write_text(text)
        with pytest.raises(ValueError, match=rf"usage.json.*{said}"):
            mlx_od_moe.load(nano, usage=usage)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--capacity", "1MB"), "capacity must be at least 1327104 bytes"),
        (("--capacity", "much"), "bytes are written as"),
        (("--predictor", "absent.safetensors"), "absent.safetensors"),
        (("--max-tokens", "0"), "--max-tokens must be 1 or more, got 0"),
        (("--prompt", ""), "--prompt must not be empty"),
        (("--model", "absent"), "absent must be a model directory"),
    ],
)
def test_wrong_input_is_one_line(nano, flags, said, capsys):
    assert main(["generate", "--model", nano, *PROMPT, *flags]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error


def copy_with_config(nano, tmp_path, **changes):
    for file in model_directory("nano-moe").iterdir():
        if file.is_file() and file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((model_directory("nano-moe") / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "nonsense"}, "nonsense not supported"),
        ({"mlp_only_layers": [3]}, r"experts in layers \[0, 1, 2, 4, 5, 6, 7\], its files in \[0,"),
        ({"num_experts": 32}, "layer 0 has 32 experts, its files 64"),
        ({"moe_intermediate_size": 128}, r"^\[load\] .*layers.0.mlp.switch_mlp.gate_proj.weight"),
    ],
)
def test_a_model_that_is_not_that_of_the_files_is_refused(nano, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        mlx_od_moe.load(copy_with_config(nano, tmp_path, **changes))


def test_an_expert_that_cannot_be_read_raises_and_leaves_no_lease(nano, tmp_path):
    packed = pack(nano, tmp_path / "packed", progress=False).path
    model, _, runtime = mlx_od_moe.load(packed)
    with runtime:
        os.truncate(runtime.store.file.files[5], 4096)
        with pytest.raises(OSError, match="layer"):
            mx.eval(model(mx.array([[1, 2, 3]])))
        for layer in runtime.store.layers:
            if layer < 5:
                runtime.store.acquire(layer, range(16), timeout=5).release()
                runtime.store.acquire(layer, range(48, 64), timeout=5).release()
