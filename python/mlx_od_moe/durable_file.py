"""Files that are on the disk, whole, before anything relies on them."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ._ext import crc32c

CHUNK = 16 << 20  # bytes of a file that are in memory at once


def partial_path(path: Path) -> Path:
    """What a file is called until it is whole."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def whole_or_absent(path: Path) -> Iterator[BinaryIO]:
    """A file to write that gets its name once all of it is on the disk."""
    partial = partial_path(path)
    with open(partial, "wb") as file:
        yield file
        sync_file(file)
    os.replace(partial, path)
    sync_directory(path.parent)


def sync_file(file: BinaryIO) -> None:
    """Bring a file to the disk and, on Linux, out of memory: reading it then asks the disk."""
    file.flush()
    if sys.platform == "darwin":  # whose fsync leaves the bytes in the disk's own cache
        with suppress(OSError):  # not every file system knows it
            fcntl.fcntl(file.fileno(), fcntl.F_FULLFSYNC)
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sync_directory(directory: Path) -> None:
    """Bring the names in a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other processes that ask for the same out of the directory.

    Raises ValueError where another is in it. File systems without locks let all in.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"[{directory}] another process writes to it") from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def checksum(path: Path, advance: Callable[[int], object] = lambda _: None) -> int:
    """The CRC-32C of a whole file; `advance` is told how many bytes were read."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            crc = crc32c(chunk, crc)
            advance(len(chunk))
    return crc
