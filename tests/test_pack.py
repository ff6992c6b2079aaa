"""pack: the same bytes in another place, whatever happens on the way."""

import errno
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_od_moe.pack as pack_module
from checkpoints import load_bits, model_directory, stacked, write_file, write_tensors
from mlx_od_moe.cli import main
from mlx_od_moe.durable_file import locked
from mlx_od_moe.expert_file import ExpertFile
from mlx_od_moe.pack import pack, verify


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two files, two layers of four experts, a norm, and what lies beside them."""
    path = tmp_path / "model"
    path.mkdir()
    norm = {"model.norm.weight": ("F32", (64,)), "model.odd": ("U8", (3,))}
    write_tensors(path / "model-1.safetensors", stacked() | norm)
    write_tensors(path / "model-2.safetensors", stacked("model.layers.2.mlp.switch_mlp"))
    (path / "config.json").write_text('{"model_type": "none"}')
    (path / "code.py").write_text("# code")
    (path / "pytorch_model.bin").write_text("weights of another framework")
    return path


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("name", ["nano-moe", "small-qwen3-moe"])
def test_the_packed_directory_is_a_whole_model(name, tmp_path):
    model = model_directory(name)
    file = pack(model, tmp_path / "out", progress=False)
    before, after = load_bits(model), load_bits(tmp_path / "out")
    assert set(after) == {tensor for tensor in before if ".switch_mlp." not in tensor}
    for tensor, values in after.items():
        assert np.array_equal(values, before[tensor])
    _, metadata = mx.load(str(tmp_path / "out" / "model.safetensors"), return_metadata=True)
    assert metadata == {"format": "mlx"}
    for copied in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / copied).read_bytes() == (model / copied).read_bytes()
    size = file.expert_bytes(0)
    padding = file.block_bytes(0) - size
    assert 0 <= padding < 4096
    assert file.block_bytes(0) % 4096 == 0
    for layer, path in zip(file.layers, file.files, strict=True):
        blocks = np.fromfile(path, np.uint8).reshape(file.num_experts(layer), -1)
        assert not blocks[:, size:].any()
        assert np.array_equal(blocks[7, :size], file.read_bytes(layer, 7))
    assert verify(tmp_path / "out", progress=False) > 0


@pytest.mark.parametrize(("words", "alignment"), [(8, 4096), (2048 * 5, 16384)])
def test_blocks_are_aligned_as_far_as_padding_stays_small(words, alignment, tmp_path):
    tensors = {f"model.layers.0.mlp.experts.{e}.{name}.weight": ("F32", (16, words))
               for name in ("gate_proj", "up_proj", "down_proj") for e in range(2)}  # fmt: skip
    write_tensors(tmp_path / "model.safetensors", tensors)
    file = pack(tmp_path, tmp_path / "out", progress=False)
    assert json.loads((tmp_path / "out" / "experts.json").read_text())["alignment"] == alignment
    assert file.block_bytes(0) == -(-file.expert_bytes(0) // alignment) * alignment


def test_what_is_no_expert_and_no_weight_is_copied(model, tmp_path):
    pack(model, tmp_path / "out", progress=False)
    assert sorted(contents(tmp_path / "out")) == [
        "code.py", "config.json", "experts-00000.bin", "experts-00002.bin", "experts.json",
        "model.safetensors",
    ]  # fmt: skip
    rest = load_bits(tmp_path / "out")
    assert sorted(rest) == ["model.norm.weight", "model.odd"]
    assert all(np.array_equal(rest[name], load_bits(model)[name]) for name in rest)


class Killed(BaseException):
    """Not an Exception: nothing may catch it."""


def test_a_pack_killed_at_any_point_goes_on_and_gives_the_same_bytes(model, tmp_path, monkeypatch):
    pack(model, tmp_path / "whole", progress=False)
    expected = contents(tmp_path / "whole")
    steps_left = 0.0

    def counting(function):
        def step(*arguments, **options):
            nonlocal steps_left
            steps_left -= 1
            if steps_left < 0:
                raise Killed
            return function(*arguments, **options)

        return step

    for owner, name in ((os, "fsync"), (os, "replace"), (pack_module, "_put"), (Path, "unlink")):
        monkeypatch.setattr(owner, name, counting(getattr(owner, name)))
    for first in itertools.count():
        out, killed = tmp_path / f"out-{first}", 0
        for steps in (first, 2, 9, math.inf):
            steps_left = steps
            try:
                pack(model, out, progress=False)
            except Killed:
                killed += 1
        assert contents(out) == expected
        if killed == 0:  # there are no more steps than that
            break
    assert first > 30


def test_a_pack_killed_by_the_system_goes_on(model, tmp_path):
    pack(model, tmp_path / "whole", progress=False)
    code = """
import os, signal, sys
import mlx_od_moe.pack as p
put, count = p._put, [0]
def killing(*a):
    put(*a)
    count[0] += 1
    if count[0] == 6:
        os.kill(os.getpid(), signal.SIGKILL)
p._put = killing
p.pack(sys.argv[1], sys.argv[2], progress=False)
"""
    command = [sys.executable, "-c", code, str(model), str(tmp_path / "out")]
    assert subprocess.run(command, timeout=60).returncode == -signal.SIGKILL
    with pytest.raises(ValueError, match="not packed to the end: run the same"):
        ExpertFile(tmp_path / "out")
    partial = tmp_path / "out" / ".experts-00002.bin.partial"
    partial.write_bytes(b"what a lost write may leave" * 1000)
    pack(model, tmp_path / "out", progress=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finished_pack_is_left_as_it_is(model, tmp_path):
    pack(model, tmp_path / "out", progress=False)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    pack(model, tmp_path / "out", progress=False)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == written


def test_another_models_directory_is_refused(model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "_put", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            pack(model, out, progress=False)
    raw = bytearray((model / "model-2.safetensors").read_bytes())
    raw[-1] ^= 1  # another model with the same shapes
    (model / "model-2.safetensors").write_bytes(raw)
    before = contents(out)
    with pytest.raises(ValueError, match="holds a pack of another model"):
        pack(model, out, progress=False)
    with pytest.raises(ValueError, match=r"must be new or empty, but holds .*config\.json"):
        pack(model, model, progress=False)
    assert contents(out) == before
    pack(model, tmp_path / "fine", progress=False)
    with pytest.raises(ValueError, match="packed already"):
        pack(tmp_path / "fine", tmp_path / "again", progress=False)
    with locked(tmp_path / "fine"), pytest.raises(ValueError, match="another process"):
        pack(model, tmp_path / "fine", progress=False)


def test_a_full_disk_is_said_and_leaves_what_can_go_on(model, tmp_path):
    """A real limit, on the size of files: the third block of a layer does not fit."""
    code = """
import resource, sys
from mlx_od_moe.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(["pack", "--model", sys.argv[2], "--out", sys.argv[3]]))
"""
    block = pack(model, tmp_path / "whole", progress=False).block_bytes(0)
    command = [sys.executable, "-c", code, str(int(2.5 * block)), str(model), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    message = r"the disk of .*out is full: .* Make room and run the same command again to go on"
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr
    pack(model, tmp_path / "out", progress=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_too_small_a_disk_is_refused_before_anything_is_packed(model, tmp_path, monkeypatch):
    usage = pack_module.shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(pack_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="bytes more are needed") as error:
        pack(model, tmp_path / "out", progress=False)
    assert error.value.errno == errno.ENOSPC
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("target", [".experts-00000.bin.partial", ".model.safetensors.partial"])
def test_a_disk_that_gives_back_other_bytes_is_found(target, model, tmp_path, monkeypatch):
    import mlx_od_moe.durable_file as durable_file

    sync = durable_file.sync_file

    def corrupting(file):
        sync(file)
        if Path(file.name).name == target:
            raw = bytearray(Path(file.name).read_bytes())
            raw[100] ^= 1
            Path(file.name).write_bytes(raw)

    with monkeypatch.context() as patch:
        patch.setattr(durable_file, "sync_file", corrupting)
        patch.setattr(pack_module, "sync_file", corrupting)
        with pytest.raises(OSError, match="gives back other bytes than were written"):
            pack(model, tmp_path / "out", progress=False)
    pack(model, tmp_path / "out", progress=False)
    pack(model, tmp_path / "whole", progress=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_source_that_changes_meanwhile_is_noticed(model, tmp_path, monkeypatch):
    put = pack_module._put

    def changing(*arguments):
        put(*arguments)
        os.utime(model / "model-1.safetensors", ns=(0, 0))

    monkeypatch.setattr(pack_module, "_put", changing)
    with pytest.raises(OSError, match=r"model-1.safetensors: was written to since"):
        pack(model, tmp_path / "out", progress=False)


def test_verify_names_what_is_damaged(model, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["pack", "--model", str(model), "--out", str(out)]) == 0
    assert main(["pack", "--out", str(out), "--verify"]) == 0
    assert "bytes are as they were packed" in capsys.readouterr().out
    block = ExpertFile(out).block_bytes(2)
    for name, at, message in (
        ("experts-00002.bin", 3 * block + 17, "experts-00002.bin: layer 2, expert 3: its checksum"),
        ("model.safetensors", 300, "model.safetensors: its checksum does not match"),
    ):
        raw = bytearray((out / name).read_bytes())
        raw[at] ^= 4
        (out / name).write_bytes(raw)
        assert main(["pack", "--out", str(out), "--verify"]) == 1
        assert message in capsys.readouterr().err
        raw[at] ^= 4
        (out / name).write_bytes(raw)
    assert main(["pack", "--out", str(model), "--verify"]) == 1
    assert "is not packed" in capsys.readouterr().err


def test_memory_is_bounded_by_the_expert_not_the_model(tmp_path):
    """96 MB of experts, 2 MB each, zeros that take no disk."""
    header, experts, columns = {}, 48, 174_592
    for i, name in enumerate(("gate_proj", "up_proj", "down_proj")):
        size = experts * columns * 4
        header[f"model.layers.0.mlp.switch_mlp.{name}.weight"] = {
            "dtype": "F32",
            "shape": [experts, 1, columns],
            "data_offsets": [i * size, (i + 1) * size],
        }
    path = tmp_path / "model.safetensors"
    write_file(path, header, b"")
    os.truncate(path, path.stat().st_size + 3 * size)
    code = """
import resource, sys
from mlx_od_moe.pack import pack
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pack(sys.argv[1], sys.argv[2], progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    command = [sys.executable, "-c", code, str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 24e6
