"""The wheel, in an environment and a directory without the source tree."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# What a user relies on; the rest of the suite needs the source tree or repeats these.
SUITE = ("test_ext.py", "test_shadow_model.py", "test_predictor_bundle.py", "test_metrics.py",
         "test_cli.py", "test_native_predictor.py", "test_bench.py")  # fmt: skip


@pytest.mark.timeout(900)
def test_wheel_passes_the_tests_elsewhere(tmp_path):
    if not (REPOSITORY / "pyproject.toml").exists():
        pytest.skip("no source tree here: this is the wheel itself under test")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    source = tmp_path / "source"
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    for name in filter(None, names):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, source / name)
    subprocess.run([*build, "-w", tmp_path, source], check=True)
    shutil.rmtree(source)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "mlx_od_moe/server/dashboard.html" in archive.namelist()

    # Dependencies come from this environment, whose own installation of the package is hidden: a
    # folder on PYTHONPATH has its .pth files ignored.
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps"]
    subprocess.run([*pip, wheel], check=True)
    tests = tmp_path / "tests"
    tests.mkdir()
    for name in (*SUITE, "conftest.py", "planted_traces.py"):
        if (REPOSITORY / "tests" / name).exists():
            shutil.copy(REPOSITORY / "tests" / name, tests)
    variables = {**os.environ, "PYTHONPATH": sysconfig.get_paths()["purelib"]}
    where = "import mlx_od_moe; print(mlx_od_moe.__file__)"
    done = subprocess.run(
        [python, "-c", where], env=variables, cwd=tests, capture_output=True, text=True
    )
    assert str(environment) in done.stdout, done.stdout + done.stderr
    suite = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    done = subprocess.run(suite, env=variables, cwd=tests, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
