"""`mlx-od-moe bench`: in small, what is measured and written; the peers compute what ours does."""

import builtins
import json

import numpy as np
import pytest

from mlx_od_moe import ExpertPredictor, PredictorConfig, _ext
from mlx_od_moe._blas import set_blas_threads
from mlx_od_moe.bench import BENCHES, predictor
from mlx_od_moe.bench.peers import PEERS
from mlx_od_moe.bench.timing import blas_threads, in_turns, summary, timed_in_turn
from mlx_od_moe.cli import main

CONFIG = PredictorConfig(hidden_size=128, predictor_size=64, num_experts=16)
SMALL = ("--hidden-size", "128", "--predictor-size", "64", "--num-experts", "16", "--seconds", "0")
TIMES = {"min", "p50", "p99"}
OURS = {"mlx-od-moe", "mlx-od-moe, C++", "reading the weights"}


def bench(tmp_path, *words: str) -> dict:
    path = tmp_path / "result.json"
    assert main(["bench", *words, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["bench"] == words[0]
    assert {"cpu", "cores", "system", "load", "load_after"} <= result.keys()
    return result


def check_times(times: dict[str, float]) -> None:
    assert times.keys() == TIMES
    assert 0 < times["min"] <= times["p50"] <= times["p99"]


def test_predictor_writes_every_row(tmp_path, capsys):
    words = ("--formats", "f32", "int4", "--tokens", "1", "3", "--peers", "mlx", *SMALL)
    result = bench(tmp_path, "predictor", *words)
    assert (result["hidden_size"], result["threads"]) == (128, 1)
    rows = result["results"]
    blocks = [(row["format"], row["tokens"]) for row in rows]
    assert blocks == [("f32", 1), ("f32", 3), ("int4", 1), ("int4", 3)]
    for row in rows:
        found = row["microseconds"]
        assert found.keys() == OURS | {"mlx"}
        for times in found.values():
            check_times(times)
        fraction = found["reading the weights"]["p50"] / found["mlx-od-moe, C++"]["p50"]
        assert row["fraction_of_floor"]["p50"] == pytest.approx(fraction)
        added = found["mlx-od-moe"]["min"] - found["mlx-od-moe, C++"]["min"]
        assert row["python_overhead"]["min"] == pytest.approx(added)
        assert row["best_peer"]["name"] == "mlx"
        assert row["best_peer"]["p50"] == pytest.approx(
            found["mlx"]["p50"] / found["mlx-od-moe"]["p50"]
        )
        assert row["left_out"] == {}
        assert row["megabytes"] > 0
    out = capsys.readouterr().out
    assert "best peer mlx" in out
    assert "floor / C++" in out


def test_peers_that_are_not_installed_are_left_out_with_the_reason(tmp_path, monkeypatch, capsys):
    absent = {"onnx", "onnxruntime", "openvino", "torch", "threadpoolctl"}
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.split(".")[0] in absent:
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    result = bench(tmp_path, "predictor", "--formats", "f32", *SMALL)
    (row,) = result["results"]
    assert row["microseconds"].keys() == OURS | {"mlx"}
    assert row["left_out"].keys() == {"numpy", "torch", "onnxruntime", "openvino"}
    assert "No module named 'torch'" in row["left_out"]["torch"]
    assert "threadpoolctl" in row["left_out"]["numpy"]
    assert "torch left out: ImportError" in capsys.readouterr().out


def test_layers_in_rotation_with_two_threads(tmp_path):
    peers = ("--peers", "onnxruntime")  # which can't be measured so
    words = ("--formats", "int8", *peers, "--layers", "3", "--threads", "2", *SMALL)
    result = bench(tmp_path, "predictor", *words)
    assert (result["layers"], result["threads"]) == (3, 2)
    (row,) = result["results"]
    assert row["microseconds"].keys() == OURS
    assert row["best_peer"] is None
    assert row["left_out"].keys() == {"onnxruntime"}


def test_context_writes_every_row(tmp_path, capsys):
    sizes = ("--window", "20", "--key-size", "8", "--state-size", "4")
    result = bench(tmp_path, "context", "--formats", "int8", "--layers", "2", *sizes, *SMALL)
    assert (result["window"], result["key_size"], result["state_size"]) == (20, 8, 4)
    (row,) = result["results"]
    found = row["microseconds"]
    paths = ("previous state", "attention", "both", "late")
    assert found.keys() == {"plain", *paths, *(f"observing, {name}" for name in paths)}
    for times in found.values():
        check_times(times)
    assert row["ratio"]["both"]["p50"] == pytest.approx(
        found["both"]["p50"] / found["plain"]["p50"]
    )
    assert row["added"]["both"]["min"] == pytest.approx(
        found["both"]["min"] - found["plain"]["min"]
    )
    held = row["bytes_per_sequence"]
    assert 0 < held["previous state"] < held["attention"] < held["both"]
    assert "MB per sequence" in capsys.readouterr().out


def test_layers_are_as_many_and_alike():
    natives = predictor.make_natives(CONFIG, predictor.make_matrices(CONFIG), "int4", 1, layers=3)
    assert len(natives) == 3
    x = np.random.default_rng(0).standard_normal((2, 128), dtype=np.float32)
    ids = [native.predict(x).tolist() for native in natives]
    assert ids[0] == ids[1] == ids[2]


CASES = [(format, name) for format, makers in PEERS.items() for name in makers]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("format", "name"), CASES)
def test_peers_compute_what_ours_does(format, name):
    matrices = predictor.make_matrices(CONFIG)
    x = np.random.default_rng(2).standard_normal((5, 128), dtype=np.float32)
    try:
        forward = PEERS[format][name](matrices, 1)
    except ImportError as error:
        pytest.skip(f"pip install 'mlx-od-moe[bench]': {error}")
    found = forward(x)
    if name == "torch":
        found = found.float()
    if name in ("onnxruntime", "openvino"):
        found = found[0]
    found = np.array(found, np.float64)
    expected = np.maximum(x.astype(np.float64) @ matrices.trunk.T, 0) @ matrices.heads.T
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < {"f32": 1e-5, "bf16": 0.02, "int8": 0.05, "int4": 0.25}[format]
    native = predictor.make_natives(CONFIG, matrices, format, 1)[0]
    ours = native.logits(x).reshape(5, -1)
    assert np.linalg.norm(ours - expected) / np.linalg.norm(expected) < 0.25


def test_queue_writes_every_row(tmp_path, capsys):
    result = bench(tmp_path, "queue", "--rounds", "2", "--records", "5")
    assert (result["rounds"], result["records"]) == (2, 5)
    for measured in ("put_and_get", "round_trip"):
        assert result[measured].keys() == {"PredictionQueue", "queue.SimpleQueue", "queue.Queue"}
        for times in result[measured].values():
            check_times(times)
    assert "round trip" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("predictor", "--tokens", "0", *SMALL), "--tokens and --layers must be 1 or more"),
        (("predictor", "--threads", "0", *SMALL), "threads must be 1 ... 64, got 0"),
        (("predictor", "--peers", "cupy", *SMALL), "no peer is named cupy"),
        (("queue", "--rounds", "0"), "--rounds and --records must be 1 or more"),
        (("queue", "--rounds", "1", "--records", "1", "--json", "/no/such/file"), "/no/such/file"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    assert main(["bench", *words]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert error[-1].startswith("mlx-od-moe bench: ")


def test_bench_names_its_benches(capsys):
    with pytest.raises(SystemExit):
        main(["bench"])
    assert "NAME" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in BENCHES)


def test_turns_are_taken_in_order_and_warm_up_is_not_counted():
    calls = []

    def run(name: str, microseconds: float):
        return lambda: calls.append(name) or microseconds

    runs = {"a": run("a", 1.0), "b": run("b", 2.0)}
    times = in_turns(runs, rounds=2, seconds=60, warm_up=1, calls=2)
    assert "".join(calls) == "aaabbb" * 2
    assert times == {"a": [1.0] * 4, "b": [2.0] * 4}
    assert len(in_turns(runs, rounds=100, seconds=0, calls=3)["a"]) == 3  # one round at least


def test_calls_are_timed_in_turn_with_their_arguments():
    seen = []
    run = timed_in_turn(
        [lambda x: seen.append(("first", x)), lambda x: seen.append(("next", x))], 7
    )
    assert all(run() >= 0 for _ in range(3))
    assert seen == [("first", 7), ("next", 7), ("first", 7)]


def test_summary():
    assert summary([3.0, 1.0, 2.0])["min"] == 1
    assert summary([3.0, 1.0, 2.0])["p50"] == 2


def test_blas_threads_are_given_back():
    before = set_blas_threads(2)
    with blas_threads(1):
        assert set_blas_threads(1) in (0, 1)  # 0: no OpenBLAS here
    assert set_blas_threads(before) in (0, 2)


def test_read_probe_reads_within_its_bounds_only():
    probe = _ext.ReadProbe(1 << 16, threads=3)
    assert (probe.bytes, probe.threads) == (1 << 16, 3)
    assert all(probe.read(offset, 1 << 15) > 0 for offset in (0, 1 << 15, 100) for _ in range(50))
    for offset, count in ((1, 1 << 16), (1 << 17, 0), (2**64 - 1, 2)):
        with pytest.raises(ValueError, match="are more than its 65536"):
            probe.read(offset, count)
    with pytest.raises(ValueError, match=r"threads must be 1 .* got 0"):
        _ext.ReadProbe(1 << 16, threads=0)
    with pytest.raises(ValueError, match="bytes must be 512 or more, got 0"):
        _ext.ReadProbe(0)


def test_time_predict_checks_as_predict_does():
    native = ExpertPredictor(CONFIG).native()
    x = np.ones((2, 128), np.float32)
    assert _ext.time_predict(native, x, 8) > 0
    with pytest.raises(ValueError, match=r"x must be \[tokens, 128\], got 64 columns"):
        _ext.time_predict(native, x[:, :64].copy(), 8)
    with pytest.raises(ValueError, match=r"k must be 1 \.\.\. 16, got 17"):
        _ext.time_predict(native, x, 17)
    x[1, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        _ext.time_predict(native, x, 8)
