"""The prediction queue: its C++ tests, also under sanitizers, its model, and its Python face."""

import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mlx_od_moe import Prediction, PredictionQueue
from test_cpp import ADDRESS, RELEASE, THREAD, build, run, run_neon

MODEL = Path(__file__).parent / "model" / "prediction_queue.pml"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("configuration", [RELEASE, ADDRESS, THREAD], ids=lambda c: c[0])
def test_cpp(configuration):
    run(str(build(*configuration, target="prediction_tests")), TSAN_OPTIONS="halt_on_error=1")


@pytest.mark.timeout(900)
def test_neon_under_emulation():
    """ARM's instructions, atomic ones too; on x86 the emulator hides most of its weak order."""
    run_neon("prediction_tests", "max")


@pytest.mark.timeout(900)
def test_thread_sanitizer_would_tell_of_missing_orders():
    """The ring with relaxed orders is reported, so silence about the ring means something."""
    binary = build(*THREAD, target="broken_ring")
    run(str(binary), "with its orders")
    done = subprocess.run([binary], capture_output=True, text=True, timeout=100)
    assert done.returncode == 66, done.stdout + done.stderr
    assert "ThreadSanitizer: data race" in done.stderr
    assert "ring.h" in done.stderr


def search_model(folder: Path, *defines: str) -> str:
    """What spin's exhaustive search of the model prints."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if shutil.which("spin") is None or compiler is None:
        pytest.skip("spin or a C compiler is missing: apt-get install spin gcc")
    compiling = [compiler, "-O2", "-DSAFETY", "-w", "-o", "pan", "pan.c"]
    for command in (["spin", *defines, "-a", MODEL], compiling):
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=100)
    search = ["./pan", "-m1000000"]
    return subprocess.run(search, cwd=folder, capture_output=True, text=True, timeout=250).stdout


def test_model_holds_in_every_interleaving(tmp_path):
    found = search_model(tmp_path)
    assert "errors: 0" in found, found
    assert "max search depth too small" not in found
    assert "Search not completed" not in found


@pytest.mark.parametrize(
    ("broken", "violation"),
    [
        ("CLAIM", "assertion violated"),  # claiming a position is not atomic
        ("DISPLACE", "assertion violated"),  # the oldest is displaced before it is written
        ("PARKING", "invalid end state"),  # a consumer looks, then announces that it will sleep
    ],
)
def test_model_tells_when_something_is_taken_out(tmp_path, broken, violation):
    found = search_model(tmp_path, f"-DBROKEN_{broken}")
    assert "errors: 1" in found, found
    assert violation in found


def prediction(step: int, *ids: int) -> Prediction:
    return Prediction(step, source_layer=3, target_layer=5, distance=2, expert_ids=list(ids))


def test_predictions_keep_what_they_are_made_with():
    p = Prediction(7, 3, 5, 2, [4, 300], scores=[0.5, -1.5], first_rank=32, batch=True)
    assert (p.step, p.source_layer, p.target_layer, p.distance) == (7, 3, 5, 2)
    assert p.expert_ids == [4, 300]
    assert p.scores == [0.5, -1.5]
    assert (p.first_rank, p.batch) == (32, True)
    assert "expert_ids=[4, 300]" in repr(p)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 2, 1, list(range(17))), "the number of expert_ids must be 0 … 16, got 17"),
        ((0, 1, 2, 1, [40000]), "expert_ids must be 0 … 32767, got 40000"),
        ((0, -2, 2, 1, [4]), "source_layer must be -1 … 32767, got -2"),
        ((0, 1, 2, 300, [4]), "distance must be 0 … 255, got 300"),
        ((0, 1, 2, 1, [4], [1.0, 2.0]), r"as many as expert_ids \(1\), got 2"),
        ((0, 1, 2, 1, [4], [1.0], 8), "multiple of 16, got 8"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message.replace("…", r"\.\.\.")):
        Prediction(*arguments)


def test_queue_drops_its_oldest_and_forgets_older_steps():
    queue = PredictionQueue(2)
    for i in range(3):
        assert queue.try_push(prediction(0, i))
    assert queue.try_pop().expert_ids == [1]
    queue.begin_step(1)
    assert queue.step == 1
    assert queue.try_pop() is None
    assert not queue.try_push(prediction(0, 9))
    assert queue.try_push(prediction(1, 5))
    assert queue.size_approx() == 1
    assert queue.statistics() == {
        "pushed": 5,
        "popped": 1,
        "dropped": 1,
        "expired": 2,
        "waiting": 1,
    }
    assert queue.capacity == 2


def test_queue_refuses_impossible_capacities():
    with pytest.raises(ValueError, match=r"capacity must be 1 .* got 0"):
        PredictionQueue(0)


def test_wait_pop_waits_without_the_gil():
    """The producer could not run otherwise."""
    queue = PredictionQueue()
    producer = threading.Timer(0.02, lambda: queue.try_push(prediction(0, 8)))
    producer.start()
    assert queue.wait_pop(timeout=20).expert_ids == [8]
    producer.join()


def test_wait_pop_ends_by_timeout_and_by_close():
    queue = PredictionQueue()
    assert queue.wait_pop(timeout=0) is None
    assert queue.wait_pop(timeout=0.01) is None
    with pytest.raises(ValueError, match="0 or more seconds"):
        queue.wait_pop(timeout=-1)
    queue.try_push(prediction(0, 1))
    closer = threading.Timer(0.02, queue.close)
    closer.start()
    assert queue.wait_pop().expert_ids == [1]
    assert queue.wait_pop() is None
    assert queue.closed
    assert not queue.try_push(prediction(0, 2))
    closer.join()


def test_threads_of_python_share_a_queue():
    queue = PredictionQueue(4096)
    popped: list[int] = []

    def consume() -> None:
        while (p := queue.wait_pop()) is not None:
            popped.extend(p.expert_ids)

    consumers = [threading.Thread(target=consume) for _ in range(2)]
    for thread in consumers:
        thread.start()
    for i in range(2000):
        queue.try_push(prediction(0, i))
    queue.close()
    for thread in consumers:
        thread.join()
    assert sorted(popped) == list(range(2000))


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to send")
def test_keyboard_interrupt_ends_a_wait():
    code = (
        "import mlx_od_moe, signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "queue = mlx_od_moe.PredictionQueue()\n"
        "try:\n    print('ready', flush=True); queue.wait_pop()\n"
        "except KeyboardInterrupt:\n    print('interrupted')"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=30)[0] == "interrupted\n"
