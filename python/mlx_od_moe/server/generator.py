"""mlx-lm's response generator, over a model that runs from the store."""

from __future__ import annotations

import gc
import logging
from typing import Any, Protocol

import mlx.nn as nn
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache
from mlx_lm.server import GenerationContext, ModelProvider, Response, ResponseGenerator

from .._ext import clear_compile_cache
from .request_checks import RequestError
from .runs import Run, Runs
from .settings import Settings

log = logging.getLogger("mlx_od_moe")


class Collector(Protocol):
    """Samples requests into traces; see training.traffic_traces."""

    def wants(self) -> bool:
        """Whether the next request is to be recorded."""

    def begin(self) -> None:
        """What the model computes from now on is one request's."""

    def end(self, token_ids: list[int], prompt: int) -> None:
        """The request's tokens that the model was given, the first `prompt` of them its prompt."""

    def counts(self) -> dict[str, int]:
        """`tokens` recorded, and the `limit`."""


class StoredModel(ModelProvider):
    """The one model that there is. Requests load nothing."""

    def __init__(self, model: nn.Module, tokenizer: Any, settings: Settings):
        super().__init__(settings.for_mlx_lm())
        self.model, self.tokenizer = model, tokenizer
        self.model_key = (settings.model, None, None)
        self.is_batchable = all(hasattr(cache, "merge") for cache in make_prompt_cache(model))

    def load(self, *_: Any) -> tuple[nn.Module, Any]:
        """(model, tokenizer), whatever is asked for."""
        return self.model, self.tokenizer


class Generator(ResponseGenerator):
    """Generates for all runs, on a thread of its own.

    What goes wrong there ends the runs with an error; the thread goes on with the next.
    """

    def __init__(
        self,
        provider: StoredModel,
        runs: Runs,
        context_length: int | None,
        collector: Collector | None,
    ):
        self._runs, self._context_length, self._collector = runs, context_length, collector
        arguments = provider.cli_args
        cache = LRUPromptCache(arguments.prompt_cache_size, arguments.prompt_cache_bytes)
        super().__init__(provider, cache)

    def _run_generate(self) -> None:
        while not self._stop:
            try:
                self._generate()
            except Exception as error:
                log.exception("generation failed")
                self._runs.fail(error)
                gc.collect()  # what the failed pass had leased
        clear_compile_cache()

    def _next_request(self, timeout: float | None = None) -> Any:
        """The next whose client still waits."""
        request = super()._next_request(timeout)
        return None if request is not None and request[0].over else request

    def _is_batchable(self, args: Any) -> bool:
        """A request that is recorded runs alone, so that what the model computes is its own."""
        return super()._is_batchable(args) and not args.collect

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        if isinstance(request.prompt, list):
            prompt = request.prompt
            prompt = tokenizer.encode(prompt[0]) if isinstance(prompt[0], str) else list(prompt)
            parts: Any = (prompt, [prompt], ["assistant"], "normal", None)
        else:
            try:
                parts = super()._tokenize(tokenizer, request, args)
            except Exception as error:  # a template's own, too
                raise RequestError(400, f"the messages make no prompt: {error}") from error
        self._check_length(len(parts[0]), args)
        return parts

    def _check_length(self, length: int, args: Any) -> None:
        if not length:
            raise RequestError(400, "the prompt has no tokens", param="prompt")
        if self._context_length is None:
            return
        if length >= self._context_length:
            raise RequestError(
                400,
                f"the prompt has {length} tokens, the model's context {self._context_length}",
                code="context_length_exceeded",
            )
        args.max_tokens = min(args.max_tokens, self._context_length - length)

    def _serve_single(self, request: Any, stream: Any) -> None:
        run, asked, args = request
        if self._collector is None or not run.collect:
            super()._serve_single((Alone(run), asked, args), stream)
            return
        heard = Alone(run)
        self._collector.begin()
        try:
            super()._serve_single((heard, asked, args), stream)
        finally:
            self._collector.end(heard.prompt + heard.tokens, len(heard.prompt))


class Alone:
    """Between the generator and a run that has it for itself: keeps what the model was given."""

    def __init__(self, run: Run):
        self._run = run
        self._context: GenerationContext | None = None
        self.tokens: list[int] = []

    @property
    def prompt(self) -> list[int]:
        """The prompt, but for what the prompt cache held."""
        if self._context is None:
            return []
        return list(self._context.prompt[max(self._context.prompt_cache_count, 0) :])

    def put(self, item: Any) -> None:
        """What the generator says. Raises in mid-prompt where nobody waits for it any more."""
        if isinstance(item, tuple) and self._run.over:
            raise InterruptedError("the request is over")
        if isinstance(item, GenerationContext):
            self._context = item
        elif isinstance(item, Response):
            self.tokens.append(item.token)
        self._run.put(item)
