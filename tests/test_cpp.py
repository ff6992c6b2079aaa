"""Builds and runs the C++ tests: as they are, under sanitizers, and for AArch64 under emulation."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CROSS = Path("/usr/aarch64-linux-gnu")  # where Debian installs the cross compiler's libraries
# A folder of build/, and how it is configured.
RELEASE = ("cpp-tests", "-DCMAKE_BUILD_TYPE=Release", "-DMLX_OD_MOE_WERROR=ON")
ADDRESS = ("cpp-address", "-DCMAKE_CXX_FLAGS=-O1", "-DMLX_OD_MOE_SANITIZE=address")
THREAD = ("cpp-thread", "-DCMAKE_CXX_FLAGS=-O1", "-DMLX_OD_MOE_SANITIZE=thread")


def find_doctest() -> str | None:
    """The folder that holds doctest/doctest.h, or None."""
    for folder in ("/usr/include", "/usr/local/include", "/opt/homebrew/include"):
        if Path(folder, "doctest/doctest.h").exists():
            return folder
    return None


def build(name: str, *options: str, target: str = "mlx_od_moe_tests") -> Path:
    """Configure and build the target in build/NAME (kept, so that a second run is quick)."""
    doctest = find_doctest()
    if doctest is None:
        pytest.skip(
            "doctest/doctest.h is missing: apt-get install doctest-dev, brew install doctest"
        )
    if shutil.which("cmake") is None:
        pytest.skip("cmake is missing: pip install cmake")
    folder = ROOT / "build" / name
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), *generator]
    configure += ["-DMLX_OD_MOE_TESTS=ON", f"-DMLX_OD_MOE_DOCTEST={doctest}", *options]
    for command in (configure, ["cmake", "--build", str(folder), "--target", target]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "tests" / "cpp" / target


def run(*command: str, **environment: str) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=os.environ | environment
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_cpp():
    run(str(build(*RELEASE)))


@pytest.mark.timeout(900)
def test_address_sanitizer():
    run(str(build(*ADDRESS)))


@pytest.mark.timeout(900)
def test_thread_sanitizer():
    """What threads share: the tests that use more than one."""
    binary = build(*THREAD)
    cases = "*every block*,*a helper that stalls*,*every thread count*,*workers stop*,*threads*"
    run(str(binary), f"--test-case={cases}", TSAN_OPTIONS="halt_on_error=1")


def test_kernels_leave_nothing_inline_to_the_linker():
    """Code for a newer CPU that the linker may pick for all: weak symbols of the kernels' files."""
    if shutil.which("nm") is None or sys.platform != "linux":
        pytest.skip("needs nm, and the symbol types of ELF")
    build(*RELEASE)
    objects = (ROOT / "build" / "cpp-tests").rglob("kernels/*.o")
    objects = [path for path in objects if path.name.startswith(("avx", "amx", "neon"))]
    assert objects
    for path in objects:
        symbols = subprocess.run(
            ["nm", "--defined-only", str(path)], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        assert [line for line in symbols if line.split()[1] in "WVu"] == [], path.name


@pytest.mark.skipif(platform.machine() != "x86_64", reason="emulates an x86-64 CPU")
def test_old_cpu_under_emulation():
    """A CPU without AVX runs the same binary."""
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip("apt-get install qemu-user")
    binary = build("cpp-tests", "-DCMAKE_BUILD_TYPE=Release", "-DMLX_OD_MOE_WERROR=ON")
    run(emulator, "-cpu", "Nehalem", str(binary), "--test-case-exclude=*stall*,*thread count*")


# For AArch64, with a cross compiler.
NEON = (
    "cpp-neon",
    "-DCMAKE_BUILD_TYPE=Release",
    "-DCMAKE_SYSTEM_NAME=Linux",
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
    "-DMLX_OD_MOE_WERROR=ON",
)


def run_neon(target: str, cpu: str, *arguments: str) -> None:
    """Build the target for AArch64 and run it on the emulated CPU."""
    if platform.machine() in ("aarch64", "arm64"):
        pytest.skip("this machine runs NEON: see test_cpp")
    emulator = shutil.which("qemu-aarch64")
    if shutil.which("aarch64-linux-gnu-g++") is None or emulator is None:
        pytest.skip("apt-get install g++-aarch64-linux-gnu qemu-user")
    binary = build(*NEON, target=target)
    run(emulator, "-L", str(CROSS), "-cpu", cpu, str(binary), *arguments)


@pytest.mark.timeout(900)
# cortex-a57: plain NEON; cortex-a76: dotprod; max: i8mm and bf16 too.
@pytest.mark.parametrize("cpu", ["cortex-a57", "cortex-a76", "max"])
def test_neon_under_emulation(cpu):
    run_neon("mlx_od_moe_tests", cpu, "--test-case-exclude=*stall*")
