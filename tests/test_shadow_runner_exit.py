"""ShadowRunner and the end of its process: shutdown, fork, Ctrl-C, each in a program of its own."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

SETUP = """
import os, sys, threading
import mlx_od_moe
import mlx.core as mx, numpy as np
x = np.ones(64, np.float32)
p = mlx_od_moe.ExpertPredictor(mlx_od_moe.PredictorConfig(64, 32, 24, 2, 4))
r = mlx_od_moe.ShadowRunner(p, moe_layers=[0, 1, 2, 3])
r.predict_async(x, 0)
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """A program of its own; it must end by itself."""
    source = SETUP + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    "code",
    [
        "",
        "r.predict_async(mx.random.normal((64,)) * 2, 0)",
        "r.on = [r]",
        "sys.modules['kept'] = r",
        "q = r.queue; threading.Thread(target=q.wait_pop, daemon=True).start()",
        """
        def consume():
            while r.queue.wait_pop() is not None: pass
        threading.Thread(target=consume, daemon=True).start()
        for i in range(100): r.predict_async(x, 0)
        """,
        """
        b = mlx_od_moe.ShadowRunner(p, on_prediction=lambda p: sum(range(100000)))
        for i in range(100): b.predict_async(x, i)
        """,
        "r.get_predictions_for_layer(1, None); del r",
    ],
    ids=["plain", "lazy", "cycle", "kept", "waiting", "consumer", "slow callback", "deleted"],
)
def test_the_interpreter_ends_with_a_runner_at_work(code):
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "leaked" not in done.stderr
    assert done.stderr == ""


def test_errors_left_at_the_end_are_printed():
    done = run_python(
        """
        b = mlx_od_moe.ShadowRunner(p, on_prediction=lambda p: 1 / 0)
        b.predict_async(x, 0)
        while b.statistics()["errors"] < 1: pass
        """
    )
    assert done.returncode == 0
    assert "ZeroDivisionError" in done.stderr


def test_sys_exit_and_exceptions_end_it_too():
    assert run_python("sys.exit(3)").returncode == 3
    done = run_python("raise KeyError('x')")
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("KeyError: 'x'")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_is_told_and_ends():
    done = run_python(
        """
        import signal, warnings
        warnings.simplefilter("ignore")
        threading.Thread(target=r.queue.wait_pop, args=(20,), daemon=True).start()
        r.get_predictions_for_layer(1, None)
        for rounds in range(5):
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                for call in (lambda: r.predict_async(x, 0), lambda: r.get_predictions_for_layer(1)):
                    try:
                        call()
                        os._exit(9)
                    except RuntimeError as error:
                        assert "fork" in str(error)
                r.queue.try_pop()
                r.close()
                with mlx_od_moe.ShadowRunner(p, moe_layers=[0, 1]) as own:
                    own.predict_async(x, 0)
                    assert own.get_predictions_for_layer(1, 10)
                if rounds % 2:
                    del r
                sys.exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7, rounds
            r.predict_async(x, 0)
            assert r.get_predictions_for_layer(1, 10)
        """
    )
    assert done.returncode == 0, done.stderr


def test_keyboard_interrupt_ends_a_wait(tmp_path):
    """The state never comes while the test lasts: its graph is long."""
    code = SETUP + textwrap.dedent(
        """
        import signal
        signal.signal(signal.SIGINT, signal.default_int_handler)
        a = mx.random.normal((1500, 1500))
        for _ in range(40): a = (a @ a) * 0.01
        r.predict_async(a[0, :64], 0)
        try:
            print("ready", flush=True)
            r.get_predictions_for_layer(1, None)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            os._exit(0)
        """
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=60)[0] == "interrupted\n"
