"""ExpertFile believes no manifest of a packed directory that contradicts itself or its files."""

import json
import os
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import stacked, write_tensors
from mlx_od_moe.expert_file import ExpertFile
from mlx_od_moe.pack import pack, verify


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A packed directory; tests that alter it work on copies."""
    model, out = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("out")
    write_tensors(model / "model.safetensors", stacked() | stacked("model.layers.1.mlp.switch_mlp"))
    pack(model, out, progress=False)
    return out


WRONG = {
    "another format": (lambda m: m.update(format="gguf"), "its format must be mlx-od-moe-experts"),
    "a later version": (lambda m: m.update(version=2), "version 1, but is .* version 2"),
    "no version": (lambda m: m.pop("version"), "'version' is missing"),
    "an odd alignment": (lambda m: m.update(alignment=5000), "a power of two .* got 5000"),
    "no layers": (lambda m: m.update(layers=[]), "it names no layers"),
    "a layer twice": (lambda m: m["layers"][1].update(layer=0), "layer 0: layers must ascend"),
    "a negative layer": (lambda m: m["layers"][0].update(layer=-1), "layer -1"),
    "a path": (lambda m: m["layers"][0].update(file="../x"), "layer 0: '../x' is no file name"),
    "a file twice": (
        lambda m: m["layers"][1].update(file="experts-00000.bin"),
        "layer 1: its file is another's too",
    ),
    "no experts": (lambda m: m["layers"][0].update(num_experts=0), "num_experts must be 1 ..."),
    "too many experts": (lambda m: m["layers"][0].update(num_experts=10**9), "num_experts must be"),
    "more experts than the file": (
        lambda m: m["layers"][0].update(num_experts=5, checksums=[0] * 5),
        r"experts-00000.bin: has 16384 bytes, but the experts of layer 0 need 20480",
    ),
    "blocks that are not aligned": (
        lambda m: m["layers"][0].update(block_bytes=4097),
        "block_bytes is 4097, no multiple of the alignment 4096",
    ),
    "blocks that overflow": (
        lambda m: m["layers"][0].update(block_bytes=2**52),
        "should be 0 ...",
    ),
    "parts longer than a block": (
        lambda m: m["layers"][0]["parts"][0].update(shape=[4096]),
        "layer 0: its parts are longer than its blocks",
    ),
    "a part that overflows": (
        lambda m: m["layers"][0]["parts"][0].update(shape=[2**40, 2**40]),
        "layer 0: its shape is larger than the file",
    ),
    "an unknown dtype": (
        lambda m: m["layers"][0]["parts"][0].update(dtype="Q4_K"),
        "layer 0: unknown dtype 'Q4_K'",
    ),
    "a part twice": (
        lambda m: m["layers"][0]["parts"][1].update(name="gate_proj.weight"),
        "layer 0: part 'gate_proj.weight' occurs twice",
    ),
    "a checksum too few": (
        lambda m: m["layers"][0]["checksums"].pop(),
        "layer 0: it has 3 checksums for 4 experts",
    ),
    "a checksum of 33 bits": (
        lambda m: m["layers"][0]["checksums"].__setitem__(0, 2**32),
        "layer 0: the number 4294967296 should be 0 ... 4294967295",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_contradictions_are_refused_with_the_file_and_the_rule(name, good, tmp_path):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    manifest = json.loads((good / "experts.json").read_text())
    alter, message = WRONG[name]
    alter(manifest)
    (tmp_path / "experts.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message) as error:
        ExpertFile(tmp_path)
    assert str(error.value).startswith(f"[ExpertFile] {tmp_path}")


def test_files_that_are_missing_or_cut_short_are_named(good, tmp_path):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "experts-00001.bin"
    os.truncate(path, 4096)
    with pytest.raises(ValueError, match=f"{path}: has 4096 bytes, but .* layer 1 need 16384"):
        ExpertFile(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=str(path)):
        ExpertFile(tmp_path)


def test_what_verify_needs_is_asked_for(good, tmp_path):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    manifest = json.loads((good / "experts.json").read_text())
    (tmp_path / "experts.json").write_text(json.dumps(manifest | {"rest": {"bytes": 3}}))
    with pytest.raises(ValueError, match="'rest' lacks its bytes or its checksum"):
        verify(tmp_path, progress=False)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_manifest_is_read_rightly_or_refused(data, good):
    text = bytearray((good / "experts.json").read_bytes())
    flips = st.tuples(
        st.integers(0, len(text) - 1), st.sampled_from(b'0123456789"{}[],:-x\x00\xff')
    )
    for at, value in data.draw(st.lists(flips, min_size=1, max_size=3)):
        text[at] = value
    text = text[: data.draw(st.one_of(st.just(len(text)), st.integers(0, len(text))))]
    damaged = good / "experts.json"
    whole = damaged.read_bytes()
    try:
        damaged.write_bytes(text)
        file = ExpertFile(good)
        for layer in file.layers:
            assert file.read_bytes(layer, 0).nbytes == file.expert_bytes(layer)
    except (ValueError, OSError):
        pass
    finally:
        damaged.write_bytes(whole)
