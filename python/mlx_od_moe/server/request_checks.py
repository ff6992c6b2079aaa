"""What a request may ask for, checked before mlx-lm's server sees it.

mlx-lm's server was made for one trusting user: from a request it takes names of models, adapters
and drafts to load, addresses of images to fetch and indices into the logits. None of these pass.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
MOST_STOPS = 16
LONGEST_STOP = 256


class RequestError(Exception):
    """An answer that is no completion: HTTP `status`, and an error as OpenAI's API words it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": str(self),
                "type": TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }


@dataclass(frozen=True)
class Limits:
    """What a model can do: the size of its vocabulary, and of an answer at most."""

    model: str
    max_tokens: int
    vocab_size: int


def parse_body(raw: bytes) -> dict[str, Any]:
    """The JSON object of a body, without what is null. Raises RequestError."""

    def refuse(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body must be JSON in UTF-8: {error}") from error
    if not isinstance(body, dict):
        raise RequestError(400, f"the body must be a JSON object, got {type(body).__name__}")
    return {name: value for name, value in body.items() if value is not None}


def check(body: dict[str, Any], limits: Limits, chat: bool) -> None:
    """Raise RequestError, naming the parameter, for what can't be done or may not be."""
    if body.get("model", limits.model) not in (limits.model, "default_model"):
        raise RequestError(
            404,
            f"the model {body['model']!r} does not exist; this server has {limits.model!r}",
            param="model",
            code="model_not_found",
        )
    for name, allowed, what in _RULES:
        if name in body and not allowed(body[name], limits):
            _refuse(name, what.format(limits=limits))
    for name, why in _NOT_HERE.items():
        if name in body:
            _refuse(name, why)
    if chat:
        _check_messages(body.get("messages"))
    else:
        _check_prompt(body.get("prompt"), limits)


def _refuse(name: str, what: str) -> None:
    raise RequestError(400, f"{name} {what}", param=name)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_token(value: Any, limits: Limits) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limits.vocab_size


def _is_bias(value: Any, limits: Limits) -> bool:
    """Ids beyond the vocabulary would be written beyond the logits."""
    try:
        return all(_is_token(int(k), limits) and _is_number(v) for k, v in value.items())
    except (AttributeError, ValueError):
        return False


def _are_stops(value: Any, limits: Limits) -> bool:
    stops = [value] if isinstance(value, str) else value
    return (
        isinstance(stops, list)
        and len(stops) <= MOST_STOPS
        and all(isinstance(s, str) and 0 < len(s) <= LONGEST_STOP for s in stops)
    )


def _template_names() -> frozenset[str]:
    """Arguments of apply_chat_template that are the server's own, the template among them."""
    from transformers import PreTrainedTokenizerBase

    return frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


def _are_template_arguments(value: Any, limits: Limits) -> bool:
    return isinstance(value, dict) and not _template_names() & value.keys()


def _is_only(*values: Any) -> Callable[[Any, Limits], bool]:
    return lambda value, _: value in values


def _count(value: Any, _: Limits) -> bool:
    return _is_count(value)


def _number(value: Any, _: Limits) -> bool:
    return _is_number(value)


def _tokens(value: Any, limits: Limits) -> bool:
    return _is_count(value) and 1 <= value <= limits.max_tokens


def _flag(value: Any, _: Limits) -> bool:
    return isinstance(value, bool)


_ONE_TO_MOST = "must be an integer from 1 to {limits.max_tokens}"
_RULES: list[tuple[str, Callable[[Any, Limits], bool], str]] = [
    ("max_tokens", _tokens, _ONE_TO_MOST),
    ("max_completion_tokens", _tokens, _ONE_TO_MOST),
    ("n", _is_only(1), "must be 1"),
    ("best_of", _is_only(1), "must be 1"),
    ("echo", _is_only(False), "must be false"),
    ("suffix", _is_only(""), "is not supported"),
    ("response_format", _is_only({"type": "text"}), 'must be {{"type": "text"}}'),
    ("stream", _flag, "must be true or false"),
    (
        "stream_options",
        lambda v, _: isinstance(v, dict) and isinstance(v.get("include_usage", False), bool),
        "must be an object, and its include_usage true or false",
    ),
    ("temperature", _number, "must be a number"),
    ("repetition_penalty", _number, "must be a number"),
    ("presence_penalty", _number, "must be a number"),
    ("frequency_penalty", _number, "must be a number"),
    ("repetition_context_size", _count, "must be an integer from 0"),
    ("presence_context_size", _count, "must be an integer from 0"),
    ("frequency_context_size", _count, "must be an integer from 0"),
    (
        "top_k",
        lambda v, limits: _is_count(v) and v < limits.vocab_size,
        "must be an integer from 0 to less than {limits.vocab_size}",
    ),
    (
        "seed",
        lambda v, _: isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**63,
        "must be an integer from 0 to less than 2^63",
    ),
    (
        "logit_bias",
        _is_bias,
        "must map token ids from 0 to less than {limits.vocab_size} to numbers",
    ),
    ("stop", _are_stops, f"must be up to {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters"),
    ("tools", lambda v, _: isinstance(v, list), "must be a list"),
    (
        "chat_template_kwargs",
        _are_template_arguments,
        "must be an object of the template's own variables",
    ),
]
_NOT_HERE = {
    "adapters": "can't be chosen by a request",
    "draft_model": "can't be chosen by a request",
    "num_draft_tokens": "can't be chosen by a request",
    "role_mapping": "can't be chosen by a request",
}


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        _refuse("messages", "must be a list with a message at least")
    for i, message in enumerate(messages):
        name = f"messages[{i}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            _refuse(name, "must be an object with a role")
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        if not isinstance(content, str | list | None):
            _refuse(f"{name}.content", "must be a text or a list of parts")
        for part in parts:
            text = isinstance(part, dict) and part.get("type") == "text"
            if not text or not isinstance(part.get("text"), str):
                _refuse(f"{name}.content", "must have parts of type text only")


def _check_prompt(prompt: Any, limits: Limits) -> None:
    if isinstance(prompt, list):
        if len(prompt) == 1 and isinstance(prompt[0], str):
            return
        if prompt and all(_is_token(token, limits) for token in prompt):
            return
    elif isinstance(prompt, str):
        return
    _refuse(
        "prompt",
        f"must be one text, or a list of token ids from 0 to less than {limits.vocab_size}",
    )
