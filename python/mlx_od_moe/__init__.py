"""Run mixture-of-experts models that do not fit in memory: a shadow model predicts the experts."""

from importlib import metadata as _metadata
from importlib.util import find_spec as _find_spec
from pathlib import Path as _Path

from . import _blas
from ._build import MLX_VERSION as _MLX_VERSION

_installed = _metadata.version("mlx")
if _installed != _MLX_VERSION:
    raise ImportError(
        f"mlx_od_moe was built for mlx {_MLX_VERSION}, but mlx {_installed} is installed, and "
        f"MLX's C++ interface changes with every release: pip install 'mlx=={_MLX_VERSION}'"
    )

# Found, not imported: importing it loads MLX, and the fast BLAS must come before.
_ext_spec = _find_spec(f"{__name__}._ext")
assert _ext_spec is not None
assert _ext_spec.origin is not None
INSTALL_DIR = _Path(_ext_spec.origin).parent  # where compiled and installed files lie
FAST_BLAS = _blas.load_fast_blas(INSTALL_DIR)

try:
    import mlx.core as _mx  # noqa: F401
except ImportError as error:
    raise ImportError(
        "MLX has no backend here: pip install 'mlx-od-moe[cpu]' (or [cuda12], [cuda13] with an "
        f"NVIDIA GPU). The cause: {error}"
    ) from error

from ._ext import (  # noqa: E402
    NativePredictor,
    Prediction,
    PredictionQueue,
    SequenceContext,
    is_available,
)
from .expert_file import ExpertFile  # noqa: E402
from .expert_store import ExpertStore  # noqa: E402
from .offload import load  # noqa: E402
from .predictor_bundle import PredictorBundle  # noqa: E402
from .predictor_config import PredictorConfig  # noqa: E402
from .runtime import Runtime  # noqa: E402
from .shadow_model import ExpertPredictor  # noqa: E402
from .shadow_runner import ShadowRunner  # noqa: E402

__version__ = _metadata.version("mlx-od-moe")

__all__ = [
    "FAST_BLAS",
    "INSTALL_DIR",
    "ExpertFile",
    "ExpertPredictor",
    "ExpertStore",
    "NativePredictor",
    "Prediction",
    "PredictionQueue",
    "PredictorBundle",
    "PredictorConfig",
    "Runtime",
    "SequenceContext",
    "ShadowRunner",
    "is_available",
    "load",
]
