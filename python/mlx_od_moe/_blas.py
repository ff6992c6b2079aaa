"""On Linux, lend MLX's CPU backend the OpenBLAS of scipy-openblas32.

MLX's Linux wheel bundles netlib's reference BLAS, 80 times slower in float32. Symbols are bound
when `mlx.core` loads, so this must run first; nothing else of MLX changes. macOS needs none of it.
"""

import ctypes
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

_openblas: ctypes.CDLL | None = None


def load_fast_blas(package: Path) -> bool:
    """Load OpenBLAS and the forwarding library of `package` into the global symbol scope.

    Returns whether MLX will use it. Warns once where it is too late.
    """
    global _openblas
    forward = package / "lib" / "libmlx_od_moe_blas.so"
    spec = find_spec("scipy_openblas32")
    if sys.platform != "linux" or not forward.exists() or spec is None or not spec.origin:
        return False
    if "mlx.core" in sys.modules:
        warnings.warn(
            "mlx was imported before mlx_od_moe, so its slow CPU matmul stays: "
            "import mlx_od_moe first",
            RuntimeWarning,
            stacklevel=3,
        )
        return False
    library = Path(spec.origin).parent / "lib" / "libscipy_openblas.so"
    _openblas = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(forward), mode=ctypes.RTLD_GLOBAL)
    if "OPENBLAS_NUM_THREADS" not in os.environ:
        # Its threads spin between products: on a busy machine, one for each core is up to 40 times
        # slower than none.
        set_blas_threads(max(1, (os.cpu_count() or 1) // 2))
    return True


def set_blas_threads(count: int) -> int:
    """Let OpenBLAS use that many threads; returns how many it used before (0: it is not loaded)."""
    if _openblas is None:
        return 0
    before = int(_openblas.scipy_openblas_get_num_threads())
    _openblas.scipy_openblas_set_num_threads(count)
    return before


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """One thread for as long as the `with` lasts: small products gain nothing from more."""
    before = set_blas_threads(1)
    try:
        yield
    finally:
        set_blas_threads(before)
