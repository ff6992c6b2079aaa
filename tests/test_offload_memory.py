"""A model takes the memory of its slots and of the rest of it, and no more."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_moe

from checkpoints import model_directory
from tiny_models import BASE

MB = 1 << 20
CONFIG = BASE | {
    "model_type": "qwen3_moe",
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "moe_intermediate_size": 1024,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "vocab_size": 4096,
    "quantization": {"group_size": 64, "bits": 4},
}
# The peak is that of this process alone: what is loaded before is subtracted.
RUN = """
import resource, sys
import mlx_od_moe, mlx.core as mx, mlx_lm.utils, mlx_lm.models.qwen3_moe, transformers
from mlx_lm.tokenizer_utils import load as load_tokenizer
from pathlib import Path
load_tokenizer(Path(sys.argv[1]))
unit = 1 if sys.platform == "darwin" else 1024
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
before = peak()
model, _, runtime = mlx_od_moe.load(sys.argv[1], capacity="12.5%")
with runtime:
    mx.eval(model(mx.arange(96)[None] * 40))
    for token in range(20):
        mx.eval(model(mx.array([[token * 200]])))
    print(peak() - before, runtime.store.capacity_bytes)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of 400 MB of experts, all random."""
    import mlx.nn as nn

    path = tmp_path_factory.mktemp("large")
    model = qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict(CONFIG))
    nn.quantize(model, 64, 4)
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (path / "config.json").write_text(json.dumps(CONFIG))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_directory("nano-moe") / file, path)
    return path


def test_the_peak_is_capacity_and_what_is_no_expert(folder):
    tensors = mx.load(str(folder / "model.safetensors"))
    rest = sum(a.nbytes for n, a in tensors.items() if ".switch_mlp." not in n)
    experts = sum(a.nbytes for n, a in tensors.items() if ".switch_mlp." in n)
    assert experts > 200 * MB
    command = [sys.executable, "-c", RUN, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    peak, capacity = map(int, done.stdout.split())
    assert capacity <= experts / 8
    assert peak <= capacity + rest + 64 * MB
