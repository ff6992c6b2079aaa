"""The package comes first: it lends MLX a fast BLAS, which must load before MLX."""

import os

# On a CUDA GPU MLX multiplies float32 in TF32 by default, too coarse to compare results.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx_od_moe  # noqa: F401
