"""The predictor in examples/nano-moe belongs to the model beside it, and predicts while it runs."""

import mlx.core as mx
import mlx_lm

import mlx_od_moe
from checkpoints import model_directory


def test_it_predicts_the_model_that_it_lies_beside():
    path = model_directory("nano-moe")
    model, tokenizer, runtime = mlx_od_moe.load(
        path, predictor=path / "predictor.safetensors", capacity="25%", guarded=False
    )
    with runtime:
        text = "def read_file(path):\n    with open(path) as file:\n        return "
        mlx_lm.generate(model, tokenizer, text, max_tokens=40)
        recall = runtime.report()["prediction"]["recall_at_k"]
        mx.synchronize()
    # Of the model's 8 experts among the 8 best of 64; guessing finds an eighth.
    assert recall[1] > 0.7
    assert recall[4] > 0.55
