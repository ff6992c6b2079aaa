"""Makes trace shards by running a model over text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .._blas import one_blas_thread
from ..model_routers import read_routers, save_routers
from ..moe import find_moe_layers, load_model, record_routing
from .plan import Shard, decode_shape, prefill_batch
from .run_model import Batch, ModelRunner, new_cache, use_float32_if_faster
from .text_stream import TextFile, TokenStream
from .traces import DECODE, PREFILL, Arrays, ShardRows

Model = str | Path | tuple[nn.Module, Any]

_PROBE_TOKENS = 128
_NARROW = 1024  # products of hidden sizes up to this gain nothing from BLAS threads
_Sequences = list[tuple[int, list[int]]]


def identify(model: Model) -> dict[str, Any]:
    """What a resumed collection must share with its beginning: name and fingerprint of a model.

    Raises FileNotFoundError for a missing directory.
    """
    if isinstance(model, tuple):
        return {"model": type(model[0]).__module__.rpartition(".")[2], "model_sha256": None}
    path = Path(model).resolve()
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"[collect] {path} must be a model directory with config.json")
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for weights in sorted(path.glob("*.safetensors")):
        digest.update(f"{weights.name} {weights.stat().st_size}\n".encode())
    return {"model": path.name, "model_sha256": digest.hexdigest()}


class ModelTraces(AbstractContextManager["ModelTraces"]):
    """A model, hooked while the `with` lasts, and the text it reads. One thread only."""

    def __init__(self, model: Model, files: Sequence[TextFile], settings: Mapping[str, Any]):
        """Load the model. `collection` is `settings` with what is known of the model."""
        if isinstance(model, tuple):
            self.model, self._tokenizer = model
        else:
            self.model, self._tokenizer = load_model(model)
            use_float32_if_faster(self.model)
        self._files = files
        layers = find_moe_layers(self.model)
        bos = getattr(self._tokenizer, "bos_token_id", None)
        self._start = [bos] if bos is not None and self._encode_whole("")[:1] == [bos] else []
        self.collection: dict[str, Any] = {
            **settings,
            "moe_layers": [layer.index for layer in layers],
            "num_experts": max(layer.num_experts for layer in layers),
            "top_k": max(layer.top_k for layer in layers),
        }
        self._stream = self._new_stream()
        self._probe = mx.array([self._start + self._probe_text()])
        with record_routing(self.model) as recorder:
            self.model(
                self._probe, cache=new_cache(self.model)
            )  # never evaluated: only the shape is wanted
            self.collection["hidden_size"] = recorder.take()[0].hidden.shape[-1]
        # Last: what fails before leaves the model as it was.
        self._hooks = record_routing(self.model)
        self._runner = ModelRunner(self.model, layers, self._hooks.__enter__())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the hooks out of the model."""
        self._hooks.__exit__(kind, error, trace)

    def fast_matmul(self) -> AbstractContextManager[None]:
        """Choose the BLAS threads that suit the model, while the `with` lasts."""
        narrow = self.collection["hidden_size"] <= _NARROW
        return one_blas_thread() if narrow else nullcontext()

    def save_routers(self, path: Path) -> None:
        """Prove the model's routers on its own text and write them."""
        save_routers(path, read_routers(self.model, self._probe))

    def skip(self, shard: Shard) -> None:
        """Pass over the text of a shard that is there already."""
        self._sequences(shard)

    def collect(self, shard: Shard, advance: Callable[[int], None]) -> Arrays | None:
        """The arrays of the next shard, or None where no text is left for it.

        `advance` is told the tokens that were run. Raises ValueError naming the layer where
        float16 does not hold the hidden states.
        """
        sequences = self._sequences(shard)
        if not sequences:
            return None
        rows = ShardRows(shard.rows, self.collection)
        run = self._decode if shard.phase == DECODE else self._prefill
        run(shard, sequences, rows, advance)
        return rows.arrays()

    def _prefill(
        self, shard: Shard, sequences: _Sequences, rows: ShardRows, advance: Callable[[int], None]
    ) -> None:
        size = prefill_batch(self.collection["window"], self.collection["batch_size"])
        for at in range(0, len(sequences), size):
            part = sequences[at : at + size]
            batch = self._runner.prefill([tokens for _, tokens in part])
            for i, (document, tokens) in enumerate(part):
                _add(rows, batch, i, document, len(tokens), prompt=len(tokens))
                advance(len(tokens))

    def _decode(
        self, shard: Shard, sequences: _Sequences, rows: ShardRows, advance: Callable[[int], None]
    ) -> None:
        size, prompt, length = self._decode_shape(shard)
        for at in range(0, len(sequences), size):
            part = sequences[at : at + size]
            seed = np.random.SeedSequence([self.collection["seed"], shard.index, at])
            prompts = [tokens for _, tokens in part]
            state = int(seed.generate_state(1)[0])
            batch = self._runner.decode(prompts, length, state, advance)
            for i, (document, _) in enumerate(part):
                _add(rows, batch, i, document, length, prompt)

    def _sequences(self, shard: Shard) -> _Sequences:
        """The shard's windows of text, or its prompts: (document, token ids)."""
        if shard.phase == DECODE:
            return self._prompts(shard)
        sequences: _Sequences = []
        room = shard.rows
        while room > 0 and (window := self._take(min(self.collection["window"], room))):
            sequences.append(window)
            room -= len(window[1])
        # Windows of one length share a pass with little padding.
        return sorted(sequences, key=lambda window: -len(window[1]))

    def _prompts(self, shard: Shard) -> _Sequences:
        _, prompt, length = self._decode_shape(shard)
        count = -(-shard.rows // length)
        taken = (self._take(prompt, exact=True) for _ in range(count))
        return [sequence for sequence in taken if sequence]

    def _decode_shape(self, shard: Shard) -> tuple[int, int, int]:
        return decode_shape(shard.rows, self.collection["window"], self.collection["batch_size"])

    def _take(self, n: int, exact: bool = False) -> tuple[int, list[int]] | None:
        """A sequence of at most n tokens, the one that starts every text included."""
        start = self._start if n > len(self._start) else []
        taken = self._stream.take(n - len(start), exact)
        return taken and (taken[0], start + taken[1])

    def _probe_text(self) -> list[int]:
        """The first tokens of the text, of several documents if they are short."""
        stream, tokens = self._new_stream(), list[int]()
        while len(tokens) < _PROBE_TOKENS and (taken := stream.take(_PROBE_TOKENS)):
            tokens += taken[1]
        if not tokens:
            raise ValueError("[collect] the tokenizer makes no tokens of the text")
        return tokens[:_PROBE_TOKENS]

    def _new_stream(self) -> TokenStream:
        collection = self.collection
        piece = max(2048, 4 * collection["window"])
        return TokenStream(self._files, self._encode, collection["seed"], piece)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _encode_whole(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text))


def _add(rows: ShardRows, batch: Batch, i: int, document: int, length: int, prompt: int) -> None:
    """Add the first `length` rows of sequence i, the first `prompt` of them prefilled."""
    phase = np.where(np.arange(length) < prompt, PREFILL, DECODE)
    states = {layer: array[i, :length] for layer, array in batch.states.items()}
    experts = {layer: array[i, :length] for layer, array in batch.experts.items()}
    rows.add(batch.token_ids[i, :length], document, phase, states, experts)
