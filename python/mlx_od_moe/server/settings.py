"""What a server allows, and the form in which mlx-lm's server wants its settings."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field

PREFILL_STEP = 2048
DEFAULT_TOKENS = 512


@dataclass(frozen=True)
class Settings:
    """Limits of a server.

    Attributes:
        model: what the model is called in answers.
        max_tokens: most tokens of one answer.
        max_request_bytes: longest body.
        concurrency: answers that are generated at once, as one batch.
        queue: requests that may wait beyond these.
        api_keys: one of them must come with each request; none: everyone may ask.
        allowed_origins: web pages of other origins that may ask.
        prompt_cache_bytes: memory for what earlier prompts left in the attention's cache.
        temp, top_p: of requests that do not say.
    """

    model: str
    max_tokens: int = 4096
    max_request_bytes: int = 1 << 20
    concurrency: int = 4
    queue: int = 16
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_origins: tuple[str, ...] = ()
    prompt_cache_bytes: int = 1 << 30
    temp: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        least = {"max_tokens": 1, "max_request_bytes": 1, "concurrency": 1, "queue": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(
                    f"[serve] {name} must be {value} or more, got {getattr(self, name)}"
                )

    def for_mlx_lm(self) -> Namespace:
        """The command line that mlx-lm's server believes to have got."""
        return Namespace(
            model=self.model,
            adapter_path=None,
            draft_model=None,
            num_draft_tokens=0,
            trust_remote_code=False,
            chat_template="",
            use_default_chat_template=False,
            chat_template_args={},
            allowed_origins=list(self.allowed_origins),
            pipeline=False,
            temp=self.temp,
            top_p=self.top_p,
            top_k=0,
            min_p=0.0,
            max_tokens=min(DEFAULT_TOKENS, self.max_tokens),
            decode_concurrency=self.concurrency,
            prompt_concurrency=self.concurrency,
            prefill_step_size=PREFILL_STEP,
            prompt_cache_size=10,
            prompt_cache_bytes=self.prompt_cache_bytes,
            kv_bits=None,
            kv_group_size=64,
            quantized_kv_start=0,
        )
