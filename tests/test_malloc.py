"""Memory that a process keeps: freed pages are not asked for again."""

import platform
import subprocess
import sys

import pytest

# Pages that a second round of taking and freeing 80 MB asks the system for; each is written to.
_FAULTS = """
import resource, sys
import numpy as np
from mlx_od_moe._malloc import keep_freed_memory

assert sys.argv[1] == "given" or keep_freed_memory()

def fault():
    held = [np.ones(20 << 17) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

before = fault()
print(fault() - before)
"""


def faults(kind: str) -> int:
    command = [sys.executable, "-c", _FAULTS, kind]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_kept_memory_is_not_given_anew():
    assert faults("kept") < faults("given") // 10
