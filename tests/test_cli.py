"""The command line, as a user types it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_od_moe.cli import main
from planted_traces import plant

REPOSITORY = Path(__file__).parents[1]


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlx_od_moe", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def traces(tmp_path_factory) -> Path:
    return plant(tmp_path_factory.mktemp("cli") / "traces").path


TRAIN = ("--predictor-size", 24, "--epochs", 2, "--jobs", 1, "--candidates", "mlp+gate")


def test_collect_train_evaluate(tmp_path, capsys, monkeypatch):
    """Dummy traces through every command, with the files that each promises."""
    arguments = [
        "collect", "--dummy", "--samples", "600", "--hidden-size", "32", "--num-experts", "16",
        "--top-k", "2", "--out", tmp_path / "traces",
    ]  # fmt: skip
    assert main([str(a) for a in arguments]) == 0
    assert "600 tokens" in capsys.readouterr().out
    predictor, metrics = tmp_path / "p.safetensors", tmp_path / "train.json"
    arguments = [
        "train", "--traces", tmp_path / "traces", "--out", predictor, "--json", metrics,
        "--epochs", 2, "--predictor-size", 32, "--bits", 4, "--jobs", 1,
    ]  # fmt: skip
    assert main([str(a) for a in arguments]) == 0
    assert "top_8_accuracy" in capsys.readouterr().out
    assert len(json.loads(metrics.read_text())["validation"]["recall_at_k"]) == 4
    arguments = [
        "evaluate", "--predictor", predictor, "--traces", tmp_path / "traces",
        "--json", tmp_path / "result.json", "--plot", tmp_path / "plot.png", "--jobs", 1,
    ]  # fmt: skip
    assert main([str(a) for a in arguments]) == 0
    assert "shadow model" in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert {"top_k", "methods"} <= result.keys()
    assert len(result["methods"]["predictor"]["recall_at_2k"]) == 4
    assert (tmp_path / "plot.png").stat().st_size > 1000
    monkeypatch.setitem(
        sys.modules, "matplotlib.figure", None
    )  # without it all but the plot is there
    assert main([str(a) for a in arguments]) == 1
    found = capsys.readouterr()
    assert "shadow model" in found.out
    assert "plots need matplotlib" in found.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["collect", "--out", "x"], "give either --model DIR with --text FILE..., or --dummy"),
        (["collect", "--out", "x", "--model", "/no/such", "--text", __file__], "/no/such"),
        (["train", "--traces", "/no/such", "--out", "x"], "/no/such"),
        (["evaluate", "--predictor", "/no/file", "--traces", "y"], "/no/file"),
    ],
)
def test_mistakes_are_one_line_that_names_the_place(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.startswith(f"mlx-od-moe {words[0]}: ")
    assert "\n" not in error
    assert not list(tmp_path.iterdir())


def test_ctrl_c_in_training_keeps_the_checkpoint_and_the_next_run_ends_the_same(traces, tmp_path):
    """The process is interrupted for real, in the middle, and started again."""

    def train(out: Path) -> list[str]:
        words = ["train", "--traces", traces, "--out", out, *TRAIN[:3], 200, *TRAIN[4:]]
        words += ["--patience", 200]
        return [sys.executable, "-m", "mlx_od_moe", *map(str, words)]

    out = tmp_path / "interrupted.safetensors"
    checkpoint = out.with_name(out.name + ".checkpoint")
    process = subprocess.Popen(
        train(out),
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background of a script is born deaf to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list(checkpoint.glob("layer-*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "run the same command again" in error
    assert list(checkpoint.glob("layer-*.safetensors"))
    assert not out.exists()
    subprocess.run(train(out), check=True, capture_output=True, timeout=240)
    straight = tmp_path / "straight.safetensors"
    subprocess.run(train(straight), check=True, capture_output=True, timeout=240)
    assert out.read_bytes() == straight.read_bytes()
    assert not checkpoint.exists()


def test_version_skew_and_late_import_are_explained(tmp_path):
    """An MLX of another version is refused by name; importing MLX first costs one warning."""
    late = "import mlx.core, warnings; warnings.simplefilter('error'); import mlx_od_moe"
    done = subprocess.run([sys.executable, "-c", late], capture_output=True, text=True)
    if sys.platform == "linux":
        assert "import mlx_od_moe first" in done.stderr
    else:
        assert done.returncode == 0
    skew = (
        "import importlib.metadata as m; real = m.version\n"
        "m.version = lambda name: '0.1.2' if name == 'mlx' else real(name)\n"
        "import mlx_od_moe"
    )
    done = subprocess.run([sys.executable, "-c", skew], capture_output=True, text=True)
    assert "but mlx 0.1.2 is installed" in done.stderr


def test_help_lists_the_commands():
    done = run("--help")
    assert done.returncode == 0
    for command in ("collect", "train", "evaluate", "bench", "demo"):
        assert command in done.stdout


def test_demo_runs_the_whole_road(tmp_path):
    """A demo in small: real collection, training, evaluation on unseen text, a table, a plot."""
    done = run("demo", "--out", tmp_path / "demo", "--tokens", 1500, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    assert "gate lookahead" in done.stdout
    assert "µs" in done.stdout
    assert (tmp_path / "demo" / "recall.png").exists()
    assert "methods" in json.loads((tmp_path / "demo" / "evaluation.json").read_text())
    predictor = tmp_path / "demo" / "predictor.safetensors"
    first = predictor.read_bytes()
    assert run("demo", "--out", tmp_path / "demo", "--tokens", 1500, "--epochs", 1).returncode == 0
    assert predictor.read_bytes() == first
    assert run("demo", "--out", tmp_path / "demo", "--tokens", 1500, "--epochs", 2).returncode == 0
    assert predictor.read_bytes() != first, "other options train anew"


def test_example_script(tmp_path):
    """The training example, in small, as a user runs it."""
    script = REPOSITORY / "examples" / "train_shadow_example.py"
    if not script.exists():
        pytest.skip("the examples are not here: this is not a source tree")
    done = subprocess.run(
        [sys.executable, str(script), "--samples", "300", "--epochs", "1"],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "top-8:" in done.stdout
