"""The trace format: a directory of recorded MoE inputs and expert choices.

    collection.json       what was collected, and how: everything that resuming must agree on
    routers.safetensors   the routers that `save_routers` wrote; a model's traces only
    shard-00000.npz ...   token rows, whole sequences, in order

A shard holds for each MoE layer `hidden_states_{layer}` float16 [n, hidden_size],
`routed_experts_{layer}` int16 [n, top_k] and `expert_choices_{layer}` int16 [n, lookahead, top_k],
the choices of the next 1..lookahead MoE layers (-1 where there is none); and for each token
`token_ids`, `document`, `position` int32 [n] and `phase` uint8 [n]. Position 0 starts a sequence.
"""

from __future__ import annotations

import errno
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

FORMAT, VERSION = "mlx-od-moe-traces", 1
PREFILL, DECODE = 0, 1
_TOKEN_ARRAYS = {"token_ids": "<i4", "document": "<i4", "position": "<i4", "phase": "|u1"}

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class TraceInfo:
    """A checked trace directory. `samples` counts token rows, `shard_samples` those per shard."""

    path: Path
    model: str
    moe_layers: tuple[int, ...]
    recorded_layers: tuple[int, ...]
    hidden_size: int
    num_experts: int
    top_k: int
    lookahead: int
    mode: str
    seed: int
    tokens: int
    samples: int
    shards: tuple[Path, ...]
    shard_samples: tuple[int, ...]

    @property
    def routers(self) -> Path:
        """Where the routers lie; dummy traces, and models whose routers are unknown, have none."""
        return self.path / "routers.safetensors"


def recorded_layers(collection: Mapping[str, Any]) -> list[int]:
    """The MoE layers whose states are recorded: all of a model's, the first of dummy traces."""
    return list(collection.get("recorded_layers", collection["moe_layers"]))


def shard_path(directory: Path, index: int) -> Path:
    """Path of shard `index` of a trace directory."""
    return directory / f"shard-{index:05d}.npz"


def write_collection(directory: Path, collection: Mapping[str, Any]) -> None:
    """Write collection.json, whole or not at all."""
    text = json.dumps({"format": FORMAT, "version": VERSION} | dict(collection), indent=1)
    path = directory / "collection.json"
    temporary = path.with_name("collection.json.tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_collection(directory: Path) -> dict[str, Any]:
    """Read collection.json.

    Raises FileNotFoundError where there is none and ValueError where it is not of this format.
    """
    path = directory / "collection.json"
    if not path.is_file():
        raise FileNotFoundError(f"[open_traces] {path} is missing: {directory} holds no traces")
    try:
        collection = json.loads(path.read_text(encoding="utf-8"))
        known = (collection["format"], collection["version"]) == (FORMAT, VERSION)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"[open_traces] {path} is not a {FORMAT} file: {error!r}") from error
    if not known:
        found = f"{collection['format']!r} version {collection['version']}"
        raise ValueError(f"[open_traces] {path} must be {FORMAT!r} version {VERSION}, is {found}")
    return dict(collection)


def open_traces(path: str | Path) -> TraceInfo:
    """Check a trace directory and describe it, from the headers alone.

    Raises FileNotFoundError for missing files and ValueError, naming file and rule, for foreign,
    truncated or contradicting ones.
    """
    directory = Path(path)
    collection = read_collection(directory)
    shards = sorted(directory.glob("shard-*.npz"))
    if not shards:
        raise FileNotFoundError(f"[open_traces] {directory} has no shard-*.npz: nothing collected")
    names = ("model", "hidden_size", "num_experts", "top_k", "lookahead", "mode", "seed", "tokens")
    try:
        settings = {name: collection[name] for name in names}
        moe_layers = tuple(collection["moe_layers"])
    except KeyError as error:
        raise ValueError(f"[open_traces] {directory}/collection.json lacks {error}") from error
    samples = tuple(check_shard(shard, collection) for shard in shards)
    return TraceInfo(
        path=directory,
        moe_layers=moe_layers,
        recorded_layers=tuple(recorded_layers(collection)),
        samples=sum(samples),
        shards=tuple(shards),
        shard_samples=samples,
        **settings,
    )


def check_shard(path: Path, collection: Mapping[str, Any]) -> int:
    """Number of token rows of a shard whose arrays are all there, in shape and dtype.

    Raises ValueError naming the file, the array and the rule.
    """
    expected = _expected(collection)
    try:
        with zipfile.ZipFile(path) as archive:
            found = {name: _header_of(archive, name) for name in ("token_ids", *expected)}
    except (zipfile.BadZipFile, KeyError, EOFError, ValueError) as error:
        raise ValueError(
            f"[open_traces] {path} is truncated or no trace shard: {error}; delete it and collect "
            "again into the same directory"
        ) from error
    rows = int(found["token_ids"][0][0])
    for name, (shape, dtype) in expected.items():
        if found[name] != ((rows, *shape), dtype):
            raise ValueError(
                f"[open_traces] {path}: {name} must be {dtype} {(rows, *shape)}, but is "
                f"{found[name][1]} {found[name][0]}"
            )
    return rows


def _expected(collection: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """{array: (shape after the first axis, dtype)} of a shard."""
    top_k = collection["top_k"]
    expected: dict[str, tuple[tuple[int, ...], str]] = {}
    for layer in recorded_layers(collection):
        expected[f"hidden_states_{layer}"] = ((collection["hidden_size"],), "<f2")
        expected[f"routed_experts_{layer}"] = ((top_k,), "<i2")
        expected[f"expert_choices_{layer}"] = ((collection["lookahead"], top_k), "<i2")
    return expected | {name: ((), dtype) for name, dtype in _TOKEN_ARRAYS.items()}


def _header_of(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], str]:
    with archive.open(f"{name}.npy") as member:
        return read_header(member)


def read_header(member: IO[bytes]) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of the array in a member, which is then read up to its first element."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0
    shape, _, dtype = (read if version == (1, 0) else np.lib.format.read_array_header_2_0)(member)
    return shape, dtype.str


def write_shard(path: Path, arrays: Arrays) -> None:
    """Write one shard as .npz: afterwards it is whole, or absent.

    Raises OSError naming the file when the disk is full; shards written before stay.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with zipfile.ZipFile(temporary, "w", compresslevel=1) as archive:
            for name, array in arrays.items():
                # States barely compress, and unpacking them took training some ten seconds per GB.
                stored = array.dtype == np.float16
                archive.compression = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            errno.ENOSPC,
            "No space left on the device; finished shards are kept: free some space and run the "
            "same collection again",
            str(path),
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


class ShardRows:
    """Collects the rows of one shard, checking that float16 holds every hidden state."""

    def __init__(self, rows: int, collection: Mapping[str, Any]):
        """Make room for at most `rows` token rows of the traces that `collection` describes."""
        self._arrays = {
            name: np.full((rows, *shape), -1 if dtype == "<i2" else 0, dtype)
            for name, (shape, dtype) in _expected(collection).items()
            if not name.startswith("expert_choices")
        }
        self._layers = list(collection["moe_layers"])
        self._lookahead = int(collection["lookahead"])
        self.rows = 0

    @property
    def room(self) -> int:
        """Rows that still fit."""
        return len(self._arrays["token_ids"]) - self.rows

    def add(
        self,
        token_ids: NDArray[Any],
        document: int,
        phase: NDArray[Any],
        states: Mapping[int, NDArray[np.float32]],
        experts: Mapping[int, NDArray[Any]],
    ) -> None:
        """Append one sequence of n rows, cut to the room left.

        `states` are float32 [n, hidden_size] and `experts` [n, top_k] by layer. Raises ValueError
        naming the layer where a state is NaN or infinite, or overflows float16.
        """
        n = min(self.room, len(token_ids))
        to = slice(self.rows, self.rows + n)
        for layer in self._layers:
            self._arrays[f"hidden_states_{layer}"][to] = _half(states[layer][:n], layer)
            chosen = experts[layer][:n]
            self._arrays[f"routed_experts_{layer}"][to, : chosen.shape[1]] = chosen
        self._arrays["token_ids"][to] = token_ids[:n]
        self._arrays["document"][to] = document
        self._arrays["position"][to] = np.arange(n)
        self._arrays["phase"][to] = phase[:n]
        self.rows += n

    def arrays(self) -> Arrays:
        """The shard's arrays, the choices of later layers among them."""
        arrays = {name: array[: self.rows] for name, array in self._arrays.items()}
        routed = [arrays[f"routed_experts_{layer}"] for layer in self._layers]
        absent = np.full_like(routed[0], -1)
        for i, layer in enumerate(self._layers):
            ahead = (routed[i + 1 :] + [absent] * self._lookahead)[: self._lookahead]
            arrays[f"expert_choices_{layer}"] = np.stack(ahead, axis=1)
        return arrays


def _half(states: NDArray[np.float32], layer: int) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = states.astype(np.float16)
    if not np.isfinite(half).all():
        if np.isfinite(states).all():
            largest = float(np.abs(states).max())
            raise ValueError(
                f"[collect] layer {layer}: hidden states must fit float16 (65504), but reach "
                f"{largest:.3g}"
            )
        raise ValueError(f"[collect] layer {layer}: hidden states hold NaN or infinity")
    return half
