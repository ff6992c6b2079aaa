"""`mlx-od-moe calibrate`: a calibration for a predictor file that was trained without one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx

    from .predictor_bundle import PredictorBundle
    from .training.traces import TraceInfo


def add_flags(flag: Any) -> None:
    """Declare the command's flags by calls of `flag`."""
    flag("--predictor", required=True, help="file that train wrote")
    flag("--traces", required=True, help="directory that collect wrote; best the training's own")
    flag("--out", required=True, help="predictor file to write (.safetensors)")


def run(options: argparse.Namespace) -> None:
    """Calibrate, write the file and print what was fitted."""
    bundle = calibrate(options.predictor, options.traces, options.out)
    print("layer  factor and offset per distance")
    for layer, predictor in bundle.items():
        assert predictor.calibration is not None
        rows: Any = predictor.calibration.tolist()
        print(f"{layer:5}  " + "  ".join(f"{a:.2f} {b:+.2f}" for a, b in rows))


def calibrate(predictor: str | Path, traces: str | Path, out: str | Path) -> PredictorBundle:
    """Fit the calibration of every predictor of a bundle file anew and write the bundle to `out`.

    On the traces that it was trained on only its validation documents count, as for the trainer;
    on others all. All else in the file stays. Returns what was written.
    Raises ValueError where file and traces do not belong together.
    """
    from .evaluate import check_traces, dequantize
    from .predictor_bundle import PredictorBundle
    from .training.traces import open_traces
    from .training.train_shadow import documents_of

    bundle, dense = PredictorBundle.load(predictor), PredictorBundle.load(predictor)
    info = open_traces(traces)
    check_traces(Path(predictor), bundle, info)
    seen = documents_of(info, bundle)
    for layer in dense:
        dense[layer].calibrate(None)
        dequantize(dense, layer)
    for layer, calibration in _fit(dense, info, seen[1] if seen else None).items():
        bundle[layer].calibrate(calibration)
    bundle.save(out)
    return bundle


def _fit(
    bundle: PredictorBundle, info: TraceInfo, documents: set[int] | None
) -> dict[int, mx.array]:
    from .evaluate import bundle_logits
    from .training.dataset import LayerDataset
    from .training.fit import fit_calibration
    from .training.sequence_blocks import SequenceBlocks
    from .training.shared_predictors import fit_block_calibrations

    if bundle.context is None:
        return {
            layer: fit_calibration(bundle[layer], LayerDataset(info, layer, documents), info.top_k)
            for layer in bundle
        }
    targets = {layer: bundle.targets(layer) for layer in bundle}
    asking = {bundle.query_layer(layer) for layer in bundle}
    layers = sorted({*bundle, *asking, *(target for ahead in targets.values() for target in ahead)})
    blocks = SequenceBlocks(info, layers, bundle.context.rows, documents)
    return fit_block_calibrations(bundle_logits(bundle, [*bundle]), targets, blocks)
