"""ExpertFile refuses files that contradict themselves, and notices those that change."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import stacked, write_file, write_tensors
from mlx_od_moe.expert_file import ExpertFile

LAYER = "model.layers.0.mlp.switch_mlp"


def change(header, name, **fields):
    header[f"{LAYER}.{name}"] |= fields


def drop(header, name):
    del header[f"{LAYER}.{name}"]


def rename(header, name, to):
    header[to] = header.pop(f"{LAYER}.{name}")


WRONG = {
    "an unknown dtype": (
        lambda h: change(h, "up_proj.weight", dtype="F4"),
        r"up_proj.weight': unknown dtype 'F4'",
    ),
    "a dtype of another width": (
        lambda h: change(h, "up_proj.weight", dtype="U8"),
        r"up_proj.weight': its shape needs 1024 bytes, but it has 4096",
    ),
    "a product that overflows": (
        lambda h: change(h, "up_proj.weight", shape=[2**32, 2**32, 2**32]),
        r"up_proj.weight': its shape is larger than the file",
    ),
    "a negative dimension": (
        lambda h: change(h, "up_proj.weight", shape=[-4, -32, 8]),
        r"up_proj.weight': its shape is larger than the file",
    ),
    "data past the end": (
        lambda h: change(h, "up_proj.weight", data_offsets=[2**52, 2**52 + 4096]),
        r"up_proj.weight': its data lie at",
    ),
    "data twice": (
        lambda h: change(h, "up_proj.weight", data_offsets=[0, 4096]),
        r"tensors overlap: .*(gate|up)_proj.weight",
    ),
    "fewer experts than its sisters": (
        lambda h: change(h, "up_proj.weight", shape=[2, 64, 8]),
        r"(gate|up)_proj.*(sisters hold 4 experts)",
    ),
    "scales of other rows": (
        lambda h: change(h, "up_proj.scales", shape=[4, 16, 4]),
        r"up_proj.scales': .* does not fit its weight \[32, 8\]",
    ),
    "biases unlike the scales": (
        lambda h: change(h, "up_proj.biases", dtype="F16"),
        r"up_proj.biases': it is not like the scales",
    ),
    "no scales": (lambda h: drop(h, "up_proj.scales"), r"up_proj.weight': .*scales are missing"),
    "no biases": (lambda h: drop(h, "up_proj.biases"), r"up_proj.scales': .*biases .*missing"),
    "no weight": (lambda h: drop(h, "up_proj.weight"), r"mlp.switch_mlp': lacks up_proj.weight"),
    "a projection of the other kind": (
        lambda h: rename(h, "up_proj.biases", f"{LAYER}.fc1.weight"),
        r"switch_mlp'|fc1.weight'",
    ),
    "an unknown parameter": (
        lambda h: rename(h, "up_proj.biases", f"{LAYER}.up_proj.lora_a"),
        r"up_proj.lora_a': .*not known",
    ),
    "experts in floats of 8 bits": (
        lambda h: change(h, "up_proj.weight", dtype="F8_E4M3", shape=[4, 32, 32]),
        r"up_proj.weight': its dtype is F8_E4M3: .*mlx_lm.convert",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_contradictions_are_refused_with_file_tensor_and_rule(name, tmp_path):
    path = tmp_path / "model.safetensors"
    write_tensors(path, stacked())
    assert ExpertFile(tmp_path).num_experts(0) == 4
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    alter, message = WRONG[name]
    alter(header)
    write_file(path, header, raw[8 + length :])
    with pytest.raises(ValueError, match=message) as error:
        ExpertFile(tmp_path)
    assert str(error.value).startswith(f"[ExpertFile] {path}: ")


def test_two_experts_modules_in_a_layer_are_refused(tmp_path):
    other = "model.layers.0.moe.experts"
    write_tensors(tmp_path / "model.safetensors", stacked() | stacked(other))
    with pytest.raises(ValueError, match=f"'{LAYER}' and '{other}' share a layer"):
        ExpertFile(tmp_path)


SINGLE = "model.layers.3.mlp.experts.{}.{}.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"gate_proj": (0, 1, 3), "up_proj": (0, 1, 2, 3)}, "gate_proj.weight of expert 2"),
        ({"gate_proj": (0, 1, 2), "up_proj": (0, 1, 2, 3)}, "gate_proj.weight of expert 3"),
        ({"gate_proj": (0, 1), "up_proj": (0, 999999)}, "999999|1000000 experts"),
        ({"gate_proj": (0, 1)}, "lacks (up|down)_proj"),
    ],
)
def test_holes_among_single_experts_are_named(tensors, message, tmp_path):
    made = {SINGLE.format(e, name): ("F32", (4, 4)) for name in tensors for e in tensors[name]}
    if len(tensors) > 1:
        made |= {SINGLE.format(e, "down_proj"): ("F32", (4, 4)) for e in range(4)}
    write_tensors(tmp_path / "model.safetensors", made)
    with pytest.raises(ValueError, match=message):
        ExpertFile(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.gate_up_proj_blocks",
        "model.layers.0.mlp.experts.0.gate_proj.weight_scale_inv",
        "model.layers.0.mlp.experts.0.gate_proj.qweight",
        "model.layers.0.block_sparse_moe.input_linear.weight",
    ],
)
def test_experts_that_need_converting_are_named(name, tmp_path):
    write_tensors(tmp_path / "model.safetensors", {name: ("U8", (4, 8, 8))})
    with pytest.raises(ValueError, match=rf"tensor '{name}'.*mlx_lm\.convert"):
        ExpertFile(tmp_path)


def test_directories_without_a_model_say_so(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=str(path)):
            ExpertFile(path)
    write_tensors(tmp_path / "model.safetensors", {"model.norm.weight": ("F32", (8,))})
    with pytest.raises(ValueError, match="no tensor holds routed experts"):
        ExpertFile(tmp_path)


def test_the_index_and_the_files_must_agree(tmp_path):
    tensors = stacked()
    write_tensors(tmp_path / "model.safetensors", tensors)
    index = tmp_path / "model.safetensors.index.json"

    def refused(weights, message):
        index.write_text(json.dumps({"weight_map": weights}))
        with pytest.raises(ValueError, match=message):
            ExpertFile(tmp_path)

    refused({"a": "model-2.safetensors"}, r"index.json: tensor 'a' .*model-2.safetensors.*missing")
    refused({"a": "model.safetensors"}, r"index.json: tensor 'a' .*but does not")
    refused(3, "index.json: a value should be an object")
    index.unlink()
    write_tensors(tmp_path / "model-2.safetensors", dict(list(tensors.items())[:1]))
    with pytest.raises(ValueError, match=r"gate_proj.weight' lies in two files"):
        ExpertFile(tmp_path)


# One model, damaged in any way: bytes of its header altered, and then perhaps the end cut off.
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_a_damaged_header_is_read_rightly_or_refused(data, tmp_path_factory):
    """It raises ValueError, and nothing else, or the experts can be read."""
    path = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    write_tensors(path, stacked(experts=2))
    whole = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    flips = st.tuples(st.integers(0, header - 1), st.integers(0, 255))
    for at, value in data.draw(st.lists(flips, max_size=4)):
        whole[at] = value
    end = data.draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole))))
    path.write_bytes(whole[:end])
    try:
        file = ExpertFile(path.parent)
    except ValueError:
        return
    for layer in file.layers:
        for expert in range(file.num_experts(layer)):
            assert file.read_bytes(layer, expert).nbytes == file.expert_bytes(layer)


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def extend(path):
    os.truncate(path, path.stat().st_size + 1)


def replace(path):
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    os.replace(copy, path)


def overwrite(path):
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    os.utime(path, ns=(0, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate, "was truncated since it was opened"),
        (extend, "was extended since it was opened"),
        (replace, "was replaced since it was opened"),
        (overwrite, "was written to since it was opened"),
        (Path.unlink, "was removed since it was opened"),
    ],
)
def test_a_file_that_changes_while_it_is_open_is_noticed(change, message, tmp_path):
    path = tmp_path / "model.safetensors"
    write_tensors(path, stacked())
    file = ExpertFile(tmp_path)
    file.check()
    before = file.read_bytes(0, 0)
    change(path)
    with pytest.raises(OSError, match=message) as error:
        file.check()
    assert str(path) in str(error.value)
    if change in (replace, Path.unlink):  # what was opened is still there to be read
        assert np.array_equal(file.read_bytes(0, 0), before)


def test_reading_past_a_truncation_raises_and_names_it(tmp_path):
    path = tmp_path / "model.safetensors"
    write_tensors(path, stacked())
    file = ExpertFile(tmp_path)
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(OSError, match=rf"{path}: was truncated since it was opened"):
        file.read(0, 3)


def test_what_does_not_exist_is_refused(tmp_path):
    write_tensors(tmp_path / "model.safetensors", stacked())
    file = ExpertFile(tmp_path)
    with pytest.raises(ValueError, match="layer 7 has no experts"):
        file.read(7, 0)
    for expert in (-1, 4):
        with pytest.raises(ValueError, match=rf"layer 0 has experts 0 ... 3, not {expert}"):
            file.read(0, expert)
    with pytest.raises(ValueError, match="outside the file"):
        file.read_rest(file.rest[0], 0, 10**9) if file.rest else file.native.read_bytes(0, 0, 10**9)
