"""What the first MoE layers will choose for the next token, by the state before the last one.

At a token's end nothing else is known to read. Once the next token is there, its own predictions
take the place of these.
"""

from __future__ import annotations

from ._ext import NextTokenPrefetcher, Prefetcher
from .predictor_bundle import PredictorBundle
from .shadow_runner import ShadowRunner
from .token_experts import WIDTH


def next_token_runner(
    bundle: PredictorBundle, prefetcher: Prefetcher, format: str, threads: int
) -> ShadowRunner | None:
    """A runner whose layer 0 is the bundle's last MoE layer: it prefetches for the first ones.

    None where the bundle does not know.
    """
    predictor = bundle.native_next_token(format, threads)
    if predictor is None:
        return None
    first = bundle.moe_layers[: predictor.lookahead]
    return ShadowRunner(
        predictor,
        moe_layers=range(len(first) + 1),
        k=min(WIDTH, predictor.num_experts),
        on_prediction=NextTokenPrefetcher(prefetcher, first),
    )
