"""Worker processes: their end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PARENT = """
import sys, time
from pathlib import Path
from mlx_od_moe.progress import progress_bar
from mlx_od_moe.training.workers import run_layers

def work(directory, layer, advance):
    import os
    Path(directory, str(layer)).write_text(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    list(run_layers(work, (sys.argv[1],), [1, 2], 2, progress_bar(2, "x", "y", False)))
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie is only waiting to be collected by whoever inherited it.
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    # Its resource tracker outlives it and complains of semaphores: not the matter here.
    parent = subprocess.Popen([sys.executable, script, tmp_path], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    files = [tmp_path / "1", tmp_path / "2"]
    while time.monotonic() < deadline and not all(f.exists() and f.read_text() for f in files):
        time.sleep(0.05)
    workers = [int(file.read_text()) for file in files]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))
