"""The trace format: whole shards or none, clear errors; and the dummy traces' planted structure."""

import errno
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_od_moe.training import traces
from mlx_od_moe.training.collect_training_data import collect_expert_usage
from mlx_od_moe.training.traces import open_traces


def load(directory: Path) -> dict[str, np.ndarray]:
    shards = [dict(np.load(shard)) for shard in open_traces(directory).shards]
    return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}


def test_a_full_disk_is_named_and_leaves_whole_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def replace(source: Path, target: Path, real: Any = os.replace) -> None:
        if Path(target).name == "shard-00001.npz":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)
        written.append(Path(target))

    monkeypatch.setattr(traces.os, "replace", replace)
    dummy = {"samples": 300, "hidden_size": 16, "num_experts": 12, "shard_tokens": 100}
    with pytest.raises(OSError, match=r"run the same collection again: .*shard-00001\.npz"):
        collect_expert_usage(out=tmp_path, progress=False, **dummy)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["collection.json", "shard-00000.npz"]
    monkeypatch.undo()
    assert collect_expert_usage(out=tmp_path, progress=False, **dummy).samples == 300


def test_states_are_stored_as_they_are_and_choices_compressed(tmp_path: Path) -> None:
    made = {"samples": 50, "hidden_size": 16, "num_experts": 12, "progress": False}
    shard = collect_expert_usage(out=tmp_path, **made).shards[0]
    kinds = {member.filename: member.compress_type for member in zipfile.ZipFile(shard).infolist()}
    assert kinds["hidden_states_0.npy"] == zipfile.ZIP_STORED
    assert kinds["routed_experts_0.npy"] == zipfile.ZIP_DEFLATED
    before = load(tmp_path)
    np.savez_compressed(shard, **np.load(shard))  # as shards were once written
    assert all((before[name] == array).all() for name, array in load(tmp_path).items())


def test_foreign_and_truncated_traces_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no traces"):
        open_traces(tmp_path / "nowhere")
    info = collect_expert_usage(
        out=tmp_path, samples=50, hidden_size=16, num_experts=12, progress=False
    )
    data = info.shards[0].read_bytes()
    info.shards[0].write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"shard-00000\.npz is truncated"):
        open_traces(tmp_path)
    np.savez(info.shards[0], token_ids=np.zeros(3, np.int32))
    with pytest.raises(ValueError, match=r"shard-00000\.npz is truncated or no trace shard"):
        open_traces(tmp_path)
    (tmp_path / "collection.json").write_text(json.dumps({"format": "other", "version": 9}))
    with pytest.raises(ValueError, match="must be 'mlx-od-moe-traces' version 1"):
        open_traces(tmp_path)


def test_dummy_choices_follow_from_the_state_and_not_from_frequency(tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "num_experts": 64, "samples": 3000, "num_layers": 2}
    info = collect_expert_usage(out=tmp_path / "a", progress=False, **shape)
    assert info.recorded_layers == (0, 1)
    assert not info.routers.exists()
    rows = load(info.path)
    assert len(np.unique(rows["document"])) == 50
    assert np.array_equal(rows["expert_choices_0"][:, 0], rows["routed_experts_1"])
    states = rows["hidden_states_1"].astype(np.float32)
    for d in range(4):
        chosen = np.zeros((3000, 64), np.float32)
        np.put_along_axis(chosen, rows["expert_choices_1"][:, d].astype(int), 1, axis=1)
        linear = np.linalg.lstsq(states[:2500], chosen[:2500], rcond=None)[0]
        top = np.argsort(-(states[2500:] @ linear), axis=1)[:, :8]
        frequent = np.argsort(-chosen[:2500].sum(0))[:8]
        assert np.take_along_axis(chosen[2500:], top, axis=1).mean() > 0.55
        assert chosen[2500:, frequent].mean() < 0.2  # 8 of 64 at random: 0.125
    again = collect_expert_usage(out=tmp_path / "b", progress=False, **shape)
    assert same_rows(info.path, again.path)
    other = collect_expert_usage(out=tmp_path / "c", seed=1, progress=False, **shape)
    assert not same_rows(info.path, other.path)


def same_rows(a: Path, b: Path) -> bool:
    one, other = load(a), load(b)
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)
