"""The server as OpenAI's client sees it, and how it begins, fails and ends."""

import json
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from mlx_lm import generate
from mlx_lm.utils import load as load_stock

import mlx_od_moe
from checkpoints import model_directory
from mlx_od_moe.cli import main
from mlx_od_moe.server.http_server import Listener
from servers import COMPLETIONS, PROMPT, Command, ask, client, eventually, make_bundle, serving


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer, runtime = mlx_od_moe.load(model_directory("nano-moe"), make_bundle())
    with runtime:
        yield model, tokenizer, runtime


@pytest.fixture(scope="module")
def server(loaded):
    with serving(loaded, expected_recall=(0.5, 0.4, 0.3, 0.2)) as server:
        yield server


@pytest.fixture(scope="module")
def slow():
    """So slow that requests can be met under way."""
    model, tokenizer, runtime = mlx_od_moe.load(
        model_directory("nano-moe"), capacity="12.5%", disk="20MB/s,1ms"
    )
    with runtime:
        yield model, tokenizer, runtime


def test_completions_are_those_of_the_model_in_memory(server):
    model, tokenizer = load_stock(str(model_directory("nano-moe")))
    expected = generate(model, tokenizer, PROMPT, max_tokens=8)
    asked = {"model": "nano-moe", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    completions = client(server).completions
    whole = completions.create(**asked)
    assert (whole.choices[0].text, whole.model) == (expected, "nano-moe")
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (
        len(tokenizer.encode(PROMPT)),
        8,
    )
    parts = list(completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.text for part in parts for c in part.choices) == expected
    assert parts[-1].usage.completion_tokens == 8
    ids = completions.create(**asked | {"prompt": tokenizer.encode(PROMPT)})
    assert ids.choices[0].text == expected
    seeded = [
        completions.create(**asked | {"temperature": 1, "seed": 7, "max_tokens": 3}).choices[0].text
        for _ in range(2)
    ]
    assert seeded[0] == seeded[1]


def test_chats_stream_and_stop(server):
    asked = {"model": "nano-moe", "messages": [{"role": "user", "content": "def add(a, b):"}]}
    chat = client(server).chat.completions
    whole = chat.create(**asked, max_tokens=8, temperature=0).choices[0]
    assert whole.message.role == "assistant"
    assert whole.message.content
    streamed = chat.create(**asked, max_tokens=8, temperature=0, stream=True)
    parts = [part.choices[0].delta.content or "" for part in streamed]
    assert "".join(parts) == whole.message.content
    stopped = chat.create(**asked, max_tokens=8, temperature=0, stop=[parts[4]]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == "".join(parts[: parts.index(parts[4])])


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_text_ends_the_answer_in_mid_token_too(server, stream):
    asked = {"model": "nano-moe", "prompt": "The sea", "max_tokens": 12, "temperature": 0}
    completions = client(server).completions
    text = completions.create(**asked).choices[0].text
    stop = text[7:11]
    answer = completions.create(**asked, stop=["nowhere", stop], stream=stream)
    parts = [p.choices[0] for p in answer] if stream else [answer.choices[0]]
    assert "".join(part.text for part in parts) == text[: text.index(stop)]
    assert parts[-1].finish_reason == "stop"


def test_a_model_without_chat_template_chats_in_plain_text(loaded):
    model, tokenizer, runtime = loaded
    own = tokenizer.has_chat_template
    tokenizer.has_chat_template = False
    try:
        with serving((model, tokenizer, runtime)) as server:
            chat = client(server).chat.completions
            asked = [{"role": "user", "content": [{"type": "text", "text": "The sea"}]}]
            assert chat.create(model="nano-moe", messages=asked, max_tokens=4).choices[0]
    finally:
        tokenizer.has_chat_template = own


def test_models_are_the_one_that_there_is(server):
    models = client(server).models
    assert [m.id for m in models.list()] == ["nano-moe"]
    assert models.retrieve("nano-moe").id == "nano-moe"
    assert ask(server, "GET", "/v1/models/other").status == 404
    assert json.load(ask(server, "GET", "/health")) == {"status": "ok", "model": "nano-moe"}


def test_requests_are_answered_together(server):
    def one(i: int) -> int:
        asked = {"model": "nano-moe", "prompt": f"{i} {PROMPT}", "max_tokens": 2 + i}
        return client(server).completions.create(**asked).usage.completion_tokens

    with ThreadPoolExecutor(5) as pool:
        assert list(pool.map(one, range(5))) == [2 + i for i in range(5)]


def stream(server, max_tokens: int = 900) -> socket.socket:
    """A connection whose answer has begun."""
    body = json.dumps({"prompt": PROMPT, "max_tokens": max_tokens, "stream": True}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(head.encode() + body)
    received = b""
    while b"data: " not in received:
        received += connection.recv(4096)
    return connection


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("seed", [None, 1])
def test_generation_stops_when_the_client_leaves(slow, streamed, seed):
    """Batched, or alone, as a seed has it. `serving` asserts that no lease is left."""
    with serving(slow) as server:
        asked = {"prompt": PROMPT, "max_tokens": 900, "stream": streamed, "seed": seed}
        body = json.dumps(asked).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with closing(socket.create_connection(("127.0.0.1", server.port), 30)) as connection:
            connection.sendall(head + body)
            eventually(lambda: server.numbers.generated > 1)
        eventually(lambda: len(server.runs) == 0)
        steps = []
        slow[2].on_routing = lambda *_: steps.append(1)
        answer = client(server).completions.create(model="nano-moe", prompt="A", max_tokens=1)
        slow[2].on_routing = None
        assert answer.usage.completion_tokens == 1
        assert len(steps) < 200 * 8, "the model went on for nobody"
        assert server.numbers.generated < 900


def test_one_too_many_is_told_to_come_back(slow):
    with serving(slow, concurrency=1, queue=1) as server:
        with closing(stream(server)), closing(stream_queued(server)):
            eventually(lambda: len(server.runs) == 2)
            answer = ask(server, "POST", COMPLETIONS, b'{"prompt": "A"}')
            assert answer.status == 429
            assert 1 <= int(answer.headers["Retry-After"]) <= 60
            assert json.load(answer)["error"]["type"] == "rate_limit_error"
            assert ask(server, "GET", "/health").status == 200
        eventually(lambda: len(server.runs) == 0)
        assert ask(server, "POST", COMPLETIONS, b'{"prompt": "A", "max_tokens": 1}').status == 200


def stream_queued(server) -> socket.socket:
    """A connection that has asked, and waits."""
    body = b'{"prompt": "B", "max_tokens": 900}'
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(head + body)
    return connection


@pytest.mark.parametrize("seed", [None, 1])
def test_a_failing_disk_fails_requests_and_not_the_server(loaded, monkeypatch, seed):
    def fail(*_: object) -> None:
        raise OSError("layer 3, expert 7: the disk is gone")

    body = json.dumps({"prompt": PROMPT, "max_tokens": 3, "seed": seed}).encode()
    with serving(loaded) as server:
        with monkeypatch.context() as broken:
            broken.setattr(loaded[2].store, "acquire", fail)
            answer = ask(server, "POST", COMPLETIONS, body)
            error = json.load(answer)["error"]
            assert (answer.status, error["type"]) == (500, "server_error")
            assert "disk" not in error["message"], "what the log says is no client's"
        assert ask(server, "GET", "/health").status == 200
        assert ask(server, "POST", COMPLETIONS, body).status == 200


def test_sigterm_lets_requests_finish():
    with Command("--disk", "30MB/s,1ms", "--grace", "60") as command:
        with closing(stream(command, 40)) as connection:
            command.process.terminate()
            received = b""
            while data := connection.recv(4096):
                received += data
        assert command.wait() == 0
        assert received.endswith(b"data: [DONE]\n\n")
        assert b'"finish_reason": "length"' in received
        assert command.said.endswith("ended\n")


def test_sigterm_ends_what_does_not_finish():
    with Command("--disk", "10MB/s,2ms", "--capacity", "12.5%", "--grace", "0.2") as command:
        with closing(stream(command)) as connection:
            command.process.terminate()
            received = b""
            while data := connection.recv(4096):
                received += data
        assert command.wait() == 0
        assert b"the server is shutting down" in received
        assert "some requests were cut off" in command.said


def test_a_port_in_use_is_said(capsys):
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--model", "nowhere", "--port", str(port)]) == 1
    error = capsys.readouterr().err
    assert f"127.0.0.1:{port}: another process uses it: choose another --port" in error


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70000), ("not a host", 0)])
def test_addresses_that_are_none_are_said(host, port):
    with pytest.raises(OSError, match=f"can't listen at {host}:{port}"):
        Listener(host, port)


def test_a_thread_that_compiled_may_be_the_last_to_end():
    """Without clear_compile_cache the process aborts in two of five runs."""
    code = """if True:
        import threading, mlx_od_moe, mlx.core as mx
        from mlx_od_moe._ext import clear_compile_cache
        def work():
            mx.eval(compiled(mx.array([1.0])))
            clear_compile_cache()
        compiled = mx.compile(lambda x: mx.abs(x) + mx.exp(x))
        threads = [threading.Thread(target=work) for _ in range(20)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()"""
    for _ in range(4):
        subprocess.run([sys.executable, "-c", code], check=True)
