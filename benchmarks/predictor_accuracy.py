"""What each native format costs in recall, on a trained predictor and recorded traces.

python benchmarks/predictor_accuracy.py predictor.safetensors traces
"""

import sys

import numpy as np

import mlx_od_moe
from mlx_od_moe.metrics import Recall
from mlx_od_moe.training import open_traces
from mlx_od_moe.training.dataset import LayerDataset

FORMATS = ("f32", "f16", "bf16", "int8", "int4")


def main() -> None:
    bundle = mlx_od_moe.PredictorBundle.load(sys.argv[1])
    traces = open_traces(sys.argv[2])
    found = {format: [] for format in FORMATS}
    for layer, predictor in bundle.items():
        dataset = LayerDataset(traces, layer)
        for format in FORMATS:
            native = predictor.native(format)
            recall = Recall(predictor.config.lookahead, traces.top_k)
            for samples in dataset.batches(256):
                ids = native.predict(
                    samples.hidden_states.astype(np.float32),
                    k=2 * traces.top_k,
                    previous=samples.previous.astype(np.int32),
                )
                recall.add(ids, samples.chosen)
            found[format] += [(recall.at(traces.top_k), recall.at(2 * traces.top_k))]
    print(f"mean over layers and distances, {traces.samples:,} tokens")
    for format, layers in found.items():
        at_k, at_2k = (np.mean(np.concatenate(part)) for part in zip(*layers, strict=True))
        print(f"{format:5} recall@{traces.top_k} {at_k:.4f}  recall@{2 * traces.top_k} {at_2k:.4f}")


if __name__ == "__main__":
    main()
