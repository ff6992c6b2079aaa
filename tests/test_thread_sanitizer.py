"""The extension under ThreadSanitizer, inside an interpreter that is not instrumented."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "py-thread"
HERE = Path(__file__).parent / "sanitize"


def build_package() -> Path:
    """A copy of the package whose extension is instrumented; returns the folder to import from."""
    if importlib.util.find_spec("nanobind") is None or shutil.which("cmake") is None:
        pytest.skip("to build the extension: pip install nanobind==3.1.0 cmake ninja")
    configure = [
        "cmake",
        "-S",
        ROOT,
        "-B",
        FOLDER,
        "-DSKBUILD=ON",
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
    ]
    configure += ["-DMLX_OD_MOE_SANITIZE=thread", f"-DPython_EXECUTABLE={sys.executable}"]
    nanobind = importlib.util.find_spec("nanobind")
    assert nanobind is not None
    assert nanobind.origin is not None
    configure += [f"-Dnanobind_DIR={Path(nanobind.origin).parent / 'cmake'}"]
    if shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    site = FOLDER / "site"
    # Not the stub's target: it imports the extension, which needs the sanitizer loaded first.
    build = ["cmake", "--build", FOLDER, "--target", "_ext"]
    for command in (configure, build):
        done = subprocess.run(command, capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, done.stdout + done.stderr
    package = site / "mlx_od_moe"
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(ROOT / "python" / "mlx_od_moe", package)
    (package / "lib").mkdir()
    for built, to in (("_ext*.so", "."), ("_build.py", "."), ("libmlx_od_moe_core.so", "lib")):
        for path in FOLDER.glob(built):
            shutil.copy(path, package / to)
    return site


@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizer is loaded with LD_PRELOAD")
def test_shadow_runner():
    site = build_package()
    compiler = shutil.which("g++")
    assert compiler is not None
    runtime = subprocess.run(
        [compiler, "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    code = (
        # The copy, not the installed package: an editable one is found by a finder of its own.
        "import sys; sys.meta_path = [f for f in sys.meta_path if isinstance(f, type)]\n"
        f"sys.path.insert(0, {str(site)!r})\n"
        "import mlx_od_moe as m; assert m.__file__.startswith(sys.path[0]), m.__file__\n"
        f"exec(open({str(HERE / 'shadow_runner.py')!r}).read())"
    )
    environment = os.environ | {
        "LD_PRELOAD": runtime,
        "TSAN_OPTIONS": f"suppressions={HERE / 'mlx.supp'} exitcode=66",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment
    )
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not run here: lower vm.mmap_rnd_bits")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
    assert "ThreadSanitizer" not in done.stderr
