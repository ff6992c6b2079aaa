"""Servers of nano-moe for tests: in this process, or as the command."""

import gc
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse

import mlx.core as mx
import numpy as np
import openai

import mlx_od_moe
from checkpoints import model_directory
from mlx_od_moe import ExpertPredictor, PredictorBundle, PredictorConfig
from mlx_od_moe.server import Server, Settings
from mlx_od_moe.server.http_server import Listener

PROMPT = "Once upon a time"
COMPLETIONS = "/v1/completions"


@contextmanager
def serving(loaded, collector=None, expected_recall=(), **settings) -> Iterator[Server]:
    """A server over what mlx_od_moe.load returned, at a free port; ends without a lease."""
    listener = Listener("127.0.0.1", 0)
    named = Settings("nano-moe", **settings)
    with Server(listener, *loaded, named, collector, expected_recall) as server:
        yield server
        eventually(lambda: len(server.runs) == 0)
    assert_no_lease(loaded[2])


def assert_no_lease(runtime: mlx_od_moe.Runtime) -> None:
    """Every slot can be had at once: nothing is leased any more."""
    gc.collect()
    for layer in runtime.store.layers:
        slots = runtime.store.slots(layer)
        for first in (0, runtime.store.file.num_experts(layer) - slots):
            runtime.store.acquire(layer, range(first, first + slots), timeout=5).release()


def eventually(holds: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until it does."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "this did not come true"
        time.sleep(0.02)


def client(server: Server, key: str = "none") -> openai.OpenAI:
    """OpenAI's own, which does not try twice."""
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key=key, max_retries=0, timeout=60
    )


def ask(
    server: Server, method: str, path: str, body: bytes | None = None, **headers: str
) -> HTTPResponse:
    """One raw request; underscores in names of headers are dashes."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=30)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, named)
    return connection.getresponse()


def make_bundle(recall=(0.5, 0.4, 0.3, 0.2)) -> PredictorBundle:
    """Predictors of nano-moe that nobody trained, with a recall that nobody measured."""
    mx.random.seed(0)
    predictors = {}
    for layer in range(7):
        ahead = min(4, 7 - layer)
        config = PredictorConfig(192, 64, 64, ahead, top_k=8, terms=("mlp",) * ahead)
        predictors[layer] = ExpertPredictor(config)
    training = {"validation": {"recall_at_k": list(recall)}}
    return PredictorBundle(list(np.arange(8).tolist()), predictors, training)


class Command:
    """`mlx-od-moe serve` of nano-moe at a free port."""

    def __init__(self, *flags: str, **environment: str):
        command = [sys.executable, "-m", "mlx_od_moe", "serve", "--port", "0"]
        command += ["--model", str(model_directory("nano-moe")), *flags]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=os.environ | environment
        )
        self.said = ""
        while not (found := re.search(r"http://[\d.]+:(\d+)", self.said)):
            line = self.process.stderr.readline()
            assert line, self.said
            self.said += line
        self.port = int(found[1])

    def end(self, number: int = signal.SIGTERM) -> int:
        """Signal it; returns the exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """The exit status."""
        self.said += self.process.stderr.read()
        return self.process.wait(timeout=60)

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.stderr.close()
        self.process.wait()
