"""What the server refuses, in which words; and that what it refuses does nothing."""

import json
import re
import socket
from contextlib import closing

import openai
import pytest

import mlx_od_moe
from checkpoints import model_directory
from mlx_od_moe.serve_command import api_keys
from mlx_od_moe.server import Settings
from servers import COMPLETIONS, ask, client, serving

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer, runtime = mlx_od_moe.load(model_directory("nano-moe"))
    with runtime:
        yield model, tokenizer, runtime


@pytest.fixture(scope="module")
def server(loaded):
    with serving(loaded, max_tokens=50, max_request_bytes=20_000) as server:
        yield server


def refused(server, path: str, body: bytes, status: int = 400, **headers: str) -> dict:
    """The error of a refused request; nothing was computed for it."""
    passes = server.monitor.page()["bytes_read"], server.numbers.generated
    answer = ask(server, "POST", path, body, **headers)
    assert answer.status == status
    assert answer.headers["Content-Type"] == "application/json"
    error = json.load(answer)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (server.monitor.page()["bytes_read"], server.numbers.generated) == passes
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'"text"',
        b"[" * 9000,
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
    ],
)
def test_bodies_that_are_no_json_object(server, body):
    assert refused(server, COMPLETIONS, body)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", None),
        ("prompt", 3),
        ("prompt", []),
        ("prompt", ["two", "texts"]),
        ("prompt", [1, 4096]),
        ("prompt", [-1]),
        ("prompt", [True]),
        ("prompt", ""),
        ("max_tokens", 0),
        ("max_tokens", 51),
        ("max_tokens", "5"),
        ("max_completion_tokens", 2.5),
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 2),
        ("top_k", 4096),
        ("min_p", -1),
        ("seed", 2**64),
        ("seed", -1),
        ("stop", [""]),
        ("stop", 5),
        ("stop", ["a"] * 17),
        ("n", 2),
        ("echo", True),
        ("suffix", "b"),
        ("stream", "yes"),
        ("stream_options", {"include_usage": 1}),
        ("response_format", {"type": "json_object"}),
        ("logit_bias", {"4096": 1.0}),
        ("logit_bias", {"-1": 1.0}),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", {"1": "b"}),
        ("logprobs", 5),
        ("top_logprobs", 12),
        ("repetition_penalty", "a"),
        ("tools", "a"),
        ("adapters", "/tmp/adapter"),
        ("draft_model", "/tmp/draft"),
        ("role_mapping", {"user": "x"}),
        ("chat_template_kwargs", {"chat_template": "{{ 1 }}"}),
        ("chat_template_kwargs", {"tokenize": False}),
    ],
)
def test_values_out_of_range(server, name, value):
    body = json.dumps({"prompt": "a", name: value}).encode()
    error = refused(server, COMPLETIONS, body)
    assert re.search(name.removeprefix("max_completion_"), error["message"])


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hi",
        ["hi"],
        [{"content": "hi"}],
        [{"role": 1, "content": "hi"}],
        [{"role": "user", "content": 3}],
        [USER, {"role": "user", "content": [{"type": "text"}]}],
        [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/private"}}
                ],
            }
        ],
        [{"role": "user", "content": "hi", "tool_calls": "many"}],
        [{"role": "user", "content": "hi", "tool_calls": [{"function": {"arguments": "{"}}]}],
    ],
)
def test_messages_that_make_no_prompt(server, messages):
    body = json.dumps({"messages": messages, "max_tokens": 2}).encode()
    assert "messages" in refused(server, CHAT, body)["message"]


def test_other_models_load_nothing(server):
    for name in ("/etc/passwd", "../nano-moe", "mlx-community/some-model", "", 5):
        body = json.dumps({"prompt": "a", "model": name}).encode()
        assert refused(server, COMPLETIONS, body, 404)["code"] == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client(server).completions.create(model="other", prompt="a")


def test_a_prompt_longer_than_the_context(server):
    body = json.dumps({"prompt": [5] * 1024}).encode()
    assert refused(server, COMPLETIONS, body)["code"] == "context_length_exceeded"


def test_answers_end_where_the_context_does(server, monkeypatch):
    monkeypatch.setattr(server.generator, "_context_length", 16)
    asked = {"model": "nano-moe", "prompt": [5] * 12, "max_tokens": 50}
    answer = client(server).completions.create(**asked)
    assert (answer.usage.total_tokens, answer.choices[0].finish_reason) == (16, "length")


def test_a_body_too_large_is_refused_unread(server):
    assert refused(server, COMPLETIONS, b" " * 5_000_000, 413)["code"] == "request_too_large"
    claimed = ask(server, "POST", COMPLETIONS, b"", Content_Length="99999999999999")
    assert claimed.status == 413


@pytest.mark.parametrize("length", ["-1", "ten", "1e3", "²", ""])
def test_lengths_that_are_none(server, length):
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n"
    with closing(socket.create_connection(("127.0.0.1", server.port), 30)) as connection:
        connection.sendall(head.encode("latin-1", "replace"))
        assert connection.recv(100).startswith(b"HTTP/1.0 400 ")


def test_unknown_paths_and_missing_lengths(server):
    assert ask(server, "GET", "/../etc/passwd").status == 404
    assert ask(server, "POST", "/v1/embeddings", b"{}").status == 404
    assert ask(server, "PUT", COMPLETIONS, b"{}").status == 501
    with closing(socket.create_connection(("127.0.0.1", server.port), 30)) as connection:
        connection.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.0 411 ")


def test_web_pages_of_elsewhere_may_not_ask(server, loaded):
    body = b'{"prompt": "a", "max_tokens": 1}'
    assert refused(server, COMPLETIONS, body, 403, Origin="https://elsewhere.example")
    assert refused(server, COMPLETIONS, body, 403, Host="rebound.example")
    own = f"http://127.0.0.1:{server.port}"
    assert ask(server, "POST", COMPLETIONS, body, Origin=own).status == 200
    with serving(loaded, allowed_origins=("https://elsewhere.example",)) as open_server:
        answer = ask(open_server, "POST", COMPLETIONS, body, Origin="https://elsewhere.example")
        assert answer.headers["Access-Control-Allow-Origin"] == "https://elsewhere.example"


def test_api_keys(loaded, tmp_path, monkeypatch):
    keys = tmp_path / "keys"
    keys.write_text("# of two users\nfirst-key\n\nsecond-key\n")
    monkeypatch.setenv("MLX_OD_MOE_API_KEY", "third-key")
    with serving(loaded, api_keys=api_keys(str(keys))) as server:
        for key in ("first-key", "second-key", "third-key"):
            assert client(server, key).models.list()
        for key in ("wrong", "first-ke", "first-key2", "schlüssel"):
            answer = ask(server, "GET", "/v1/models", Authorization=f"Bearer {key}")
            assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
        with pytest.raises(openai.AuthenticationError):
            client(server, "wrong").completions.create(model="nano-moe", prompt="a")
        for path in ("/metrics", "/dashboard/data", "/v1/models"):
            assert ask(server, "GET", path).status == 401
            assert ask(server, "GET", path, Authorization="Basic first-key").status == 401
            assert ask(server, "GET", path, Authorization="Bearer first-key").status == 200
        for path in ("/health", "/dashboard"):
            assert ask(server, "GET", path).status == 200
    assert "first-key" not in repr(server.settings)
    keys.write_text("# none\n")
    with pytest.raises(ValueError, match="holds no API key"):
        api_keys(str(keys))


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_tokens", 0), ("concurrency", 0), ("queue", -1), ("max_request_bytes", 0)],
)
def test_limits_that_let_nothing_through(name, value):
    with pytest.raises(ValueError, match=rf"\[serve\] {name} must be . or more, got {value}"):
        Settings("nano-moe", **{name: value})
