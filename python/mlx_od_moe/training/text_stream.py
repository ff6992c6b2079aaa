"""Streams token sequences from text files of any size, in a seeded order."""

from __future__ import annotations

import codecs
import hashlib
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_CHUNK = 1 << 20
_OPEN_DOCUMENTS = 64  # per file: so many documents take turns

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class TextFile:
    """A text file: NUL bytes separate its documents, of which only byte offsets are kept.

    Document i is bytes `bounds[i] + 1` to `bounds[i + 1]`, numbered `first_document + i` over all
    files.
    """

    path: Path
    bounds: array[int]
    sha256: str
    first_document: int

    @property
    def description(self) -> dict[str, Any]:
        """Name, length in bytes and SHA-256, as traces record them."""
        return {"name": self.path.name, "bytes": self.bounds[-1], "sha256": self.sha256}


def scan_texts(paths: Sequence[str | Path]) -> list[TextFile]:
    """Find the documents of text files. Raises FileNotFoundError, and ValueError if all are empty.

    Memory is 8 bytes per document.
    """
    files: list[TextFile] = []
    documents = 0
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"[collect] text file {path} does not exist")
        bounds, digest = array("q", [-1]), hashlib.sha256()
        offset = 0
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                at = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 0)
                bounds.extend((at + offset).tolist())
                offset += len(chunk)
        bounds.append(offset)
        files.append(TextFile(path, bounds, digest.hexdigest(), documents))
        documents += len(bounds) - 1
    if sum(file.bounds[-1] for file in files) == 0:
        names = ", ".join(str(path) for path in paths)
        raise ValueError(f"[collect] there is no text to collect from: {names or 'no file'}")
    return files


class _Document:
    """One document's tokens, read and encoded a piece at a time."""

    def __init__(self, number: int, pieces: Iterator[str], encode: Encode):
        self.number = number
        self._pieces, self._encode = pieces, encode
        self._tokens: deque[int] = deque()

    def take(self, n: int) -> list[int]:
        while len(self._tokens) < n and (piece := next(self._pieces, None)) is not None:
            self._tokens.extend(self._encode(piece))
        return [self._tokens.popleft() for _ in range(min(n, len(self._tokens)))]


class TokenStream:
    """Token sequences from all files in turn, each from another document than the one before.

    Files take turns, and within a file up to 64 documents, drawn in a seeded order; a document's
    own sequences come in its order, and none is used twice. The same arguments and calls give the
    same sequences.
    """

    def __init__(self, files: Sequence[TextFile], encode: Encode, seed: int, piece_bytes: int):
        """`encode` maps text to token ids; documents are read `piece_bytes` at a time."""
        self._encode, self._piece_bytes = encode, piece_bytes
        self._files = deque(
            (self._documents(file, np.random.default_rng([seed, i])), deque[_Document]())
            for i, file in enumerate(files)
        )

    def take(self, n: int, exact: bool = False) -> tuple[int, list[int]] | None:
        """The next sequence (document number, 1 to n token ids), or None at the end of all text.

        `exact` passes over documents with fewer than n tokens left.
        """
        while self._files:
            unread, opened = self._files[0]
            while len(opened) < _OPEN_DOCUMENTS and (new := next(unread, None)) is not None:
                opened.append(new)
            if not opened:
                self._files.popleft()
                continue
            document = opened.popleft()
            tokens = document.take(n)
            if tokens and len(tokens) >= (n if exact else 1):
                opened.append(document)
                self._files.rotate(-1)
                return document.number, tokens
        return None

    def _documents(self, file: TextFile, rng: np.random.Generator) -> Iterator[_Document]:
        for i in rng.permutation(len(file.bounds) - 1):
            pieces = _pieces(file.path, file.bounds[i] + 1, file.bounds[i + 1], self._piece_bytes)
            yield _Document(file.first_document + int(i), pieces, self._encode)


def _pieces(path: Path, start: int, end: int, size: int) -> Iterator[str]:
    """The text of a byte range in pieces that end before a space or at a line's end."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = ""
    while start < end:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(min(size, end - start))
        if not data:
            raise OSError(f"[collect] {path} became shorter while it was read")
        start += len(data)
        text += decoder.decode(data, final=start >= end)
        # A space goes with the word after it, as tokenizers have it.
        cut = max(text.rfind(" "), text.rfind("\n")) if start < end else len(text)
        cut = cut if cut > 0 else len(text)
        if cut:
            yield text[:cut]
        text = text[cut:]
    if text:
        yield text
