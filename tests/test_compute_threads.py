"""Experts computed on several CPU threads: the same bits, whoever computes them."""

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU
from mlx_lm.utils import load as load_stock

import mlx_od_moe
from checkpoints import model_directory
from mlx_od_moe.cli import main
from mlx_od_moe.compute_threads import SORTED_FROM, ComputeThreads

HIDDEN = 4


class Calls:
    """Stands for a module: remembers its calls; of each pair it gives id + x."""

    def __init__(self):
        self.shapes, self.streams = [], []

    def __call__(self, x, ids):
        self.shapes.append(tuple(ids.shape))
        self.streams.append(str(mx.default_stream(mx.cpu)))
        return ids[..., None].astype(mx.float32) + x[..., None, :]


def spread(threads, ids):
    calls = Calls()
    x = mx.arange(ids.size // ids.shape[-1] * HIDDEN).reshape(*ids.shape[:-1], HIDDEN)
    output = ComputeThreads(threads).spread(calls)(x, ids)
    assert mx.array_equal(output, Calls()(x, ids))
    return calls


def chosen(*shape):
    return (mx.arange(mx.array(shape).prod().item()) * 7 % 64).reshape(shape)


@pytest.mark.parametrize(
    ("threads", "parts"), [(1, [8]), (2, [4, 4]), (3, [2, 3, 3]), (8, [1] * 8), (20, [1] * 8)]
)
def test_each_thread_has_as_many_experts(threads, parts):
    calls = spread(threads, chosen(1, 1, 8))
    assert calls.shapes == [(1, 1, k) for k in parts]
    assert len(set(calls.streams)) == len(parts)


def test_the_first_part_stays_with_the_caller():
    assert spread(3, chosen(1, 1, 8)).streams[0] == str(mx.default_stream(mx.cpu))


def test_one_expert_a_token_is_one_part():
    assert spread(4, chosen(1, 300, 1)).shapes == [(1, 300, 1)]


@pytest.mark.parametrize(
    ("tokens", "k", "parts"), [(7, 8, [4, 4]), (8, 8, [8]), (15, 8, [8]), (16, 8, [4, 4])]
)
def test_parts_of_what_mlx_lm_sorts_are_sorted_too(tokens, k, parts):
    shapes = spread(2, chosen(1, tokens, k)).shapes
    assert shapes == [(1, tokens, part) for part in parts]
    whole = tokens * k >= SORTED_FROM
    assert all((tokens * part >= SORTED_FROM) == whole for part in parts)


def test_a_gpu_computes_all(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    assert spread(4, chosen(1, 1, 8)).shapes == [(1, 1, 8)]


def test_none_is_too_few():
    with pytest.raises(ValueError, match=r"threads must be 1 or more, got 0"):
        ComputeThreads(0)


def logits(model, prompt):
    cache = make_prompt_cache(model)
    steps = [model(prompt[None], cache=cache)]
    steps += [model(mx.array([[token]]), cache=cache) for token in (5, 9, 5)]
    return mx.concatenate(steps, axis=1)


@pytest.mark.parametrize("capacity", ["25%", "100%"])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_logits_are_bit_identical(threads, capacity):
    nano, prompt = model_directory("nano-moe"), mx.arange(40) * 11 % 4096
    model, _, runtime = mlx_od_moe.load(nano, capacity=capacity, threads=threads)
    with runtime:
        assert mx.array_equal(logits(model, prompt), logits(load_stock(str(nano))[0], prompt))


@pytest.mark.parametrize(("threads", "parts"), [(1, [8]), (2, [4, 4])])
@pytest.mark.parametrize("capacity", ["25%", "100%"])
@pytest.mark.parametrize("listened", [False, True])
def test_a_model_computes_with_them(threads, parts, capacity, listened, monkeypatch):
    seen = []
    call = SwitchGLU.__call__
    monkeypatch.setattr(
        SwitchGLU, "__call__", lambda self, x, ids: seen.append(ids.shape[-1]) or call(self, x, ids)
    )
    model, _, runtime = mlx_od_moe.load(
        model_directory("nano-moe"), capacity=capacity, threads=threads
    )
    if listened:
        runtime.on_routing = lambda *_: None
    with runtime:
        mx.eval(model(mx.array([[7]])))
    assert seen == parts * len(runtime.layers)


@pytest.mark.parametrize("command", ["generate", "bench runtime"])
def test_the_command_line_says_how_many(command, capsys):
    flags = ["--model", str(model_directory("nano-moe")), "--threads", "0"]
    flags += ["--prompt", "x"] if command == "generate" else ["--rows", "resident"]
    assert main([*command.split(), *flags]) == 1
    assert "threads must be 1 or more, got 0" in capsys.readouterr().err


def test_python_threads_compute_beside_each_other():
    nano = model_directory("nano-moe")
    stock = load_stock(str(nano))[0]
    prompts = [mx.arange(n) * 13 % 4096 for n in (3, 20, 37)]
    expected = [logits(stock, prompt) for prompt in prompts]
    mx.eval(expected)
    model, _, runtime = mlx_od_moe.load(nano, capacity="25%", threads=3)

    def work(prompt):
        found = logits(model, prompt)
        mx.eval(found)
        return found

    with runtime, ThreadPoolExecutor(3) as threads:
        found = list(threads.map(work, prompts))
    assert all(mx.array_equal(a, b) for a, b in zip(found, expected, strict=True))
