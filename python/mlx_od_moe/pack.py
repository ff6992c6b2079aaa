"""Rewrites a model so that each expert is one contiguous block: `mlx-od-moe pack`.

A checkpoint stacks each projection over the experts, so that one expert lies in nine places.
Packed, it is one read. The format is in docs/formats.md.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ._ext import crc32c
from .durable_file import (
    CHUNK,
    checksum,
    locked,
    partial_path,
    sync_directory,
    sync_file,
    whole_or_absent,
)
from .expert_file import ExpertFile, StoredTensor
from .packed_format import (
    MANIFEST,
    UNFINISHED,
    data_file,
    layer_entry,
    new_manifest,
    read_manifest,
    read_rest_entry,
    rest_header,
    round_up,
)
from .progress import progress_bar

REST = "model.safetensors"  # what is no expert, under a name that mlx-lm loads
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz", ".h5", ".msgpack", ".onnx"}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def pack(
    model: str | os.PathLike[str], out: str | os.PathLike[str], *, progress: bool = True
) -> ExpertFile:
    """Write `model` to the directory `out` with one block per expert, and return that opened.

    All that is not an expert goes along: `out` is a whole model. It takes the memory of a few
    experts. What is written is read back and compared. Killed, the same call goes on where it was
    and gives the same bytes; on a finished `out` it does nothing.

    Raises ValueError where `model` has no experts that can be read as they are, or `out` belongs
    to another model or holds other files; OSError where the disk is full or fails.
    """
    source, out = ExpertFile(model), Path(out)
    if source.is_packed:
        raise ValueError(f"[pack] {model} is packed already")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        _Pack(source, out, progress).run()
    return ExpertFile(out)


def verify(path: str | os.PathLike[str], *, progress: bool = True) -> int:
    """Compare every checksum of a packed directory; returns how many bytes were read.

    Raises ValueError naming the layer and the expert, or the file, whose bytes are not those that
    were packed, OSError where reading fails.
    """
    file, path = ExpertFile(path), Path(path)
    if not file.is_packed:
        raise ValueError(f"[pack] {path} is not packed")
    rest = read_rest_entry(path)
    total = rest["bytes"] + sum(file.num_experts(n) * file.expert_bytes(n) for n in file.layers)
    with progress_bar(total, "verify", "B", progress) as bar:
        if checksum(path / REST, bar.update) != rest["checksum"]:
            raise ValueError(f"[pack] {path / REST}: its checksum does not match")
        for layer in file.layers:
            for expert, expected in enumerate(file.checksums(layer)):
                data = file.read_bytes(layer, expert)
                if crc32c(data) != expected:
                    where = f"[pack] {path / data_file(layer)}: layer {layer}, expert {expert}"
                    raise ValueError(f"{where}: its checksum does not match")
                bar.update(data.nbytes)
    return total


class _Pack:
    """One run: takes up what earlier ones left in `out`."""

    def __init__(self, source: ExpertFile, out: Path, progress: bool):
        self.source, self.out = source, out
        self.rest = sorted(source.rest, key=lambda tensor: (-_width(tensor), tensor.name))
        self.manifest = new_manifest(source)
        self.is_finished = self._resume()
        self.bar = progress_bar(self._total(), "pack", "B", progress and not self.is_finished)

    def run(self) -> None:
        if self.is_finished:
            self._end()
            return
        with self.bar, self._explained():
            self._save(UNFINISHED)
            self._check_space()
            self._copy_files()
            if self.manifest["rest"] is None:
                self.manifest["rest"] = self._write_rest()
                self._save_checked()
            self.bar.update(self._rest_bytes())
            done = {entry["layer"] for entry in self.manifest["layers"]}
            for layer in self.source.layers:
                if layer in done:
                    self.bar.update(self._layer_bytes(layer))
                    continue
                self.manifest["layers"].append(self._write_layer(layer))
                self._save_checked()
            self._save(MANIFEST)
            self._end()

    def _end(self) -> None:
        (self.out / UNFINISHED).unlink(missing_ok=True)
        sync_directory(self.out)

    def _resume(self) -> bool:
        """Take up the manifest that lies in `out`, if any; whether it is finished."""
        for name in (MANIFEST, UNFINISHED):
            path = self.out / name
            if not path.exists():
                continue
            found = read_manifest(path)
            fixed = ("format", "version", "alignment", "source")
            if any(found.get(key) != self.manifest[key] for key in fixed):
                raise ValueError(
                    f"[pack] {self.out} holds a pack of another model than {self.source.path}: "
                    "delete it, or give another --out"
                )
            self.manifest = found
            return name == MANIFEST
        begun = partial_path(self.out / UNFINISHED)
        if others := sorted(path.name for path in self.out.iterdir() if path != begun):
            raise ValueError(
                f"[pack] {self.out} must be new or empty, but holds files that pack did not write: "
                + ", ".join(others[:3])
            )
        return False

    def _write_rest(self) -> dict[str, Any]:
        """The model without its experts, as one safetensors file."""
        header = rest_header(self.rest, self.source.metadata)
        crc = crc32c(header)
        with whole_or_absent(self.out / REST) as file:
            file.write(header)
            for tensor in self.rest:
                for begin in range(0, tensor.bytes, CHUNK):
                    chunk = self.source.read_rest(tensor, begin, min(CHUNK, tensor.bytes - begin))
                    crc = crc32c(chunk, crc)
                    file.write(chunk.data)
        if checksum(self.out / REST) != crc:
            raise _misread(self.out / REST)
        return {"file": REST, "bytes": self._rest_bytes(), "checksum": crc}

    def _write_layer(self, layer: int) -> dict[str, Any]:
        """All experts of a layer, each in its block. What a killed run wrote stays where right."""
        path = self.out / data_file(layer)
        partial = partial_path(path)
        if path.exists():  # killed between the two steps at the end of a layer
            os.replace(path, partial)
        block, experts = self._block_bytes(layer), range(self.source.num_experts(layer))
        checksums = []
        with open(partial, "r+b" if partial.exists() else "w+b") as file:
            for expert in experts:
                data = self.source.read_bytes(layer, expert)
                checksums.append(crc32c(data))
                _put(file, expert * block, data.tobytes().ljust(block, b"\0"))
                self.bar.update(block)
            file.truncate(len(experts) * block)
            sync_file(file)
            for expert in experts:
                file.seek(expert * block)
                if crc32c(file.read(self.source.expert_bytes(layer))) != checksums[expert]:
                    raise _misread(partial)
        os.replace(partial, path)
        sync_directory(self.out)
        return layer_entry(self.source, layer, block, checksums)

    def _copy_files(self) -> None:
        """Configuration, tokenizer, code: all but weights, as they are."""
        for path in self._other_files():
            with whole_or_absent(self.out / path.name) as file, open(path, "rb") as original:
                shutil.copyfileobj(original, file)

    def _other_files(self) -> list[Path]:
        return [
            path
            for path in sorted(self.source.path.iterdir())
            if path.is_file()
            and not path.name.startswith(".")
            and path.suffix not in _WEIGHTS
            and not path.name.endswith(".index.json")  # which file holds which tensor
        ]

    def _save_checked(self) -> None:
        """Note what is finished, if all of it came from the files whose headers were read."""
        self.source.check()
        self._save(UNFINISHED)

    def _save(self, name: str) -> None:
        with whole_or_absent(self.out / name) as file:
            file.write(json.dumps(self.manifest).encode() + b"\n")

    def _block_bytes(self, layer: int) -> int:
        return round_up(self.source.expert_bytes(layer), self.manifest["alignment"])

    def _layer_bytes(self, layer: int) -> int:
        return self.source.num_experts(layer) * self._block_bytes(layer)

    def _total(self) -> int:
        return self._rest_bytes() + sum(map(self._layer_bytes, self.source.layers))

    def _rest_bytes(self) -> int:
        header = rest_header(self.rest, self.source.metadata)
        return len(header) + sum(tensor.bytes for tensor in self.rest)

    def _check_space(self) -> None:
        """Refuse at once what could only fail after hours."""
        written = sum(path.stat().st_size for path in self.out.iterdir())
        missing = self._total() - written - shutil.disk_usage(self.out).free
        if missing > 0:
            raise OSError(errno.ENOSPC, f"{missing:,} bytes more are needed")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise OSError(
                error.errno,
                f"[pack] the disk of {self.out} is full: {error.strerror}. Make room and run the "
                "same command again to go on",
            ) from error


def _width(tensor: StoredTensor) -> int:
    """Bytes of one value: the widest come first, so that all are aligned."""
    count = 1
    for size in tensor.shape:
        count *= size
    return tensor.bytes // count if count else 0


def _put(file: BinaryIO, at: int, data: bytes) -> None:
    """Write the bytes there, where they are not there yet."""
    file.seek(at)
    if file.read(len(data)) != data:
        file.seek(at)
        file.write(data)


def _misread(path: Path) -> OSError:
    return OSError(errno.EIO, f"[pack] {path}: the disk gives back other bytes than were written")
