"""The C++ example, built against the installed package, prints what Python predicts."""

import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_od_moe import ExpertPredictor, PredictorBundle, PredictorConfig

SOURCE = Path(__file__).parents[1] / "examples" / "embed_cpp"


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("cmake or a C++ compiler is missing")
    build = tmp_path_factory.mktemp("embed_cpp")
    package = run(sys.executable, "-m", "mlx_od_moe", "--cmake-dir").strip()
    run("cmake", "-S", SOURCE, "-B", build, f"-Dmlx_od_moe_DIR={package}")
    run("cmake", "--build", build)
    return build / "predict_experts"


def test_prints_what_python_predicts(program, tmp_path):
    mx.random.seed(1)
    config = PredictorConfig(96, 48, 24, lookahead=2, top_k=4, layer_norm=True)
    bundle = PredictorBundle([2, 3, 5, 7], {3: ExpertPredictor(config)})
    bundle.save(tmp_path / "bundle.safetensors")
    states = np.random.default_rng(0).standard_normal((6, 96), dtype=np.float32)
    states.tofile(tmp_path / "states.f32")

    printed = run(program, tmp_path / "bundle.safetensors", 3, tmp_path / "states.f32")
    ids = bundle.native("int8")[3].predict(states)
    expected = [
        [token, target, *ids[token, d]] for token in range(6) for d, target in enumerate((5, 7))
    ]
    assert [[int(word) for word in line.split()] for line in printed.splitlines()] == expected


def test_says_what_is_wrong(program, tmp_path):
    done = subprocess.run([program, tmp_path / "none", "3", "x"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "no such predictor file" in done.stderr
