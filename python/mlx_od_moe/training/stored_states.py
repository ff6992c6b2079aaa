"""States read from where they lie in a shard's file: `write_shard` does not compress them."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .traces import read_header

Array = npt.NDArray[Any]
_LOCAL_HEADER = 30  # bytes of a zip member's, before its name and its extra field
_EXPONENT = 0x7C00  # of a float16: all ones in NaN and infinity


@dataclass(frozen=True)
class StoredStates:
    """Where a shard's file holds the states of some layers: {layer: bytes before its first row}."""

    path: Path
    places: dict[int, int]
    found: tuple[int, ...]  # which file it was

    @classmethod
    def find(cls, path: Path, layers: Sequence[int]) -> StoredStates | None:
        """Those of a shard; None where it holds them compressed. Raises OSError, BadZipFile."""
        places = {}
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            found = _identity(file.fileno())
            for layer in layers:
                member = archive.getinfo(f"hidden_states_{layer}.npy")
                if member.compress_type != zipfile.ZIP_STORED:
                    return None
                with archive.open(member) as array:
                    read_header(array)
                    header = array.tell()
                # The lengths that stand in the archive's directory may be others.
                file.seek(member.header_offset + _LOCAL_HEADER - 4)
                names = sum(struct.unpack("<HH", file.read(4)))
                places[layer] = member.header_offset + _LOCAL_HEADER + names + header
        return cls(path, places, found)

    def read(self, rows: Array, to: Mapping[int, Array]) -> None:
        """Read ascending rows of layers into float16 [rows, hidden_size], each contiguous.

        Raises ValueError naming the file where it was replaced or cut, or a state is not finite.
        """
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        runs = list(zip(starts, [*starts[1:], len(rows)], strict=True))
        with self.path.open("rb", buffering=0) as file:
            if _identity(file.fileno()) != self.found:
                raise ValueError(f"[{self.path}] was written to while it was read")
            for layer, states in to.items():
                for start, end in runs:
                    part = states[start:end]
                    file.seek(self.places[layer] + int(rows[start]) * states[0].nbytes)
                    if file.readinto(part.data) != part.nbytes:
                        raise ValueError(f"[{self.path}] hidden_states_{layer} cannot be read")
                # Three times as fast as isfinite.
                if (states.view(np.uint16) & _EXPONENT).max(initial=0) == _EXPONENT:
                    raise ValueError(f"[{self.path}] hidden_states_{layer} hold NaN or infinity")


@dataclass(frozen=True)
class LoadedStates:
    """The states of some layers in memory, {layer: float16 [n, hidden_size]}."""

    states: dict[int, Array]

    def read(self, rows: Array, to: Mapping[int, Array]) -> None:
        """Copy rows of layers into float16 [rows, hidden_size]."""
        for layer, states in to.items():
            states[:] = self.states[layer][rows]


def _identity(file: int) -> tuple[int, ...]:
    status = os.fstat(file)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
