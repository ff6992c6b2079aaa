"""The package comes first: it lends MLX a fast BLAS, which must load before MLX."""

import mlx_od_moe  # noqa: F401
