"""The package comes first: it lends MLX a fast BLAS, which must load before MLX."""

import os

# On a CUDA GPU MLX multiplies float32 in TF32 by default, too coarse to compare results.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx_od_moe  # noqa: F401  isort: skip
import pytest
from mlx_od_moe._ext import available_kernels


@pytest.fixture(params=available_kernels())
def kernel(request, monkeypatch):
    """Each instruction set that this CPU runs, for what is packed in the test."""
    monkeypatch.setenv("MLX_OD_MOE_KERNEL", request.param)
    return request.param
