"""Lets a process keep the memory that it frees."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20


def keep_freed_memory() -> bool:
    """For the rest of the process, freed memory stays its own; returns whether that can be had.

    A training step frees and takes some hundred MB. Linux gives each page anew, and zeroed: a
    twelfth of the step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:  # another C library
        return False
    kept = mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    return bool(kept and mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD))
