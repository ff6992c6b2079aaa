"""bench runtime measures what it says, in few tokens."""

import json

import pytest

from checkpoints import model_directory
from mlx_od_moe.cli import main
from test_prefetcher import make_bundle

SHORT = ("--tokens", "6", "--prompt-tokens", "4", "--rounds", "2")


def test_rows_are_what_they_say(capsys, tmp_path):
    make_bundle().save(tmp_path / "predictor.safetensors")
    command = ["bench", "runtime", *SHORT, "--disk", "50MB/s"]
    command += ["--predictor", str(tmp_path / "predictor.safetensors")]
    assert main([*command, "--json", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    rows = result["rows"]
    assert [*rows] == ["stock", "lazy", "resident", "lru", "no prefetch", "prefetch", "oracle"]
    assert all(len(row["seconds_per_token"]) == 2 for row in rows.values())
    assert rows["oracle"]["hit_rate"] > rows["no prefetch"]["hit_rate"]
    assert rows["oracle"]["wasted_per_useful"] < 0.1
    assert rows["resident"]["hit_rate"] > rows["lru"]["hit_rate"]
    assert rows["lru"]["bytes_per_token"] == pytest.approx(
        (1 - rows["lru"]["hit_rate"]) * 8 * 8 * 20736, rel=0.05
    )
    assert [*rows["prefetch"]["recall_at_k"]] == ["1", "2", "3", "4"]
    assert "of oracle" in capsys.readouterr().out


def test_a_fair_disk_is_found(capsys):
    assert main(["bench", "runtime", *SHORT, "--rows", "lru"]) == 0
    out = capsys.readouterr().out
    assert "MB/s" in out
    assert "lru waits for" in out


def test_a_text_that_is_too_short_is_refused(capsys, tmp_path):
    (tmp_path / "text").write_text("few words")
    command = ["bench", "runtime", "--text", str(tmp_path / "text"), "--disk", "none"]
    assert main([*command, "--model", str(model_directory("nano-moe"))]) == 1
    assert "too short" in capsys.readouterr().err


@pytest.mark.parametrize(("readers", "status"), [(3, 0), (0, 1)])
def test_the_stores_readers_can_be_chosen(capsys, readers, status):
    command = ["bench", "runtime", *SHORT, "--disk", "none", "--rows", "lru"]
    assert main([*command, "--readers", str(readers)]) == status
    assert ("readers must be 1 ... 64, got 0" in capsys.readouterr().err) == bool(status)
