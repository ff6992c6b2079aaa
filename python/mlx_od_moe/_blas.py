"""On Linux, lend MLX's CPU backend the OpenBLAS of scipy-openblas32.

MLX's Linux wheel bundles netlib's reference BLAS, 80 times slower in float32. Symbols are bound
when `mlx.core` loads, so this must run first; nothing else of MLX changes. macOS needs none of it.
"""

import ctypes
import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path


def load_fast_blas(package: Path) -> bool:
    """Load OpenBLAS and the forwarding library of `package` into the global symbol scope.

    Returns whether MLX will use it. Warns once where it is too late.
    """
    forward = package / "lib" / "libmlx_od_moe_blas.so"
    openblas = find_spec("scipy_openblas32")
    if sys.platform != "linux" or not forward.exists() or openblas is None or not openblas.origin:
        return False
    if "mlx.core" in sys.modules:
        warnings.warn(
            "mlx was imported before mlx_od_moe, so its slow CPU matmul stays: "
            "import mlx_od_moe first",
            RuntimeWarning,
            stacklevel=3,
        )
        return False
    library = Path(openblas.origin).parent / "lib" / "libscipy_openblas.so"
    blas = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    if "OPENBLAS_NUM_THREADS" not in os.environ:
        # MLX's matmuls are many and small: threads that spin for the next one cost more than they
        # give as soon as anything else runs (16 against 0.4 ms a matmul, measured).
        blas.scipy_openblas_set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    ctypes.CDLL(str(forward), mode=ctypes.RTLD_GLOBAL)
    return True
