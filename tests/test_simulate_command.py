"""`mlx-od-moe simulate`: what it is told, what it writes, what it refuses."""

import json

import pytest

from mlx_od_moe.cli import main
from mlx_od_moe.simulate import parse_capacity
from planted_traces import plant_predictor


@pytest.mark.parametrize(
    ("text", "experts"), [("25%", 16), ("20%", 12), ("100%", 64), ("18", 18), ("2.4GB", 25)]
)
def test_capacity_is_understood(text, experts):
    assert parse_capacity(text, layers=4, num_experts=64, expert_bytes=24_000_000) == experts


def test_the_first_layer_may_have_more_room(tmp_path):
    out = tmp_path / "result.json"
    arguments = ["simulate", "--assume-routes", "5x64x8", "--tokens", "200", "--json", str(out)]
    assert main([*arguments, "--first-capacity", "32"]) == 0
    result = json.loads(out.read_text())
    assert result["capacity"] == [32, 12, 12, 12, 12]
    first, *others = result["runs"][0]["hit_rate_per_layer"]
    assert first > max(others) + 0.1


def test_capacity_that_means_nothing_is_refused():
    for text, why in (("much", "give 25%"), ("8GB", "needs the bytes of one expert")):
        with pytest.raises(ValueError, match=why):
            parse_capacity(text, 4, 64)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return plant_predictor(tmp_path_factory.mktemp("recorded"))


def test_the_command_replays_and_writes(recorded, tmp_path, capsys):
    out, figure = tmp_path / "result.json", tmp_path / "figure.png"
    arguments = ["simulate", "--trace", str(recorded[0]), "--predictor", str(recorded[1])]
    arguments += ["--capacity", "50%", "--policy", "lru", "belady", "--widths", "6", "6"]
    arguments += ["--thresholds", ".05", ".05", "--experts-per-layer-time", "2", "4"]
    assert main([*arguments, "--json", str(out), "--plot", str(figure)]) == 0
    result = json.loads(out.read_text())
    runs = {(r["policy"], r["method"], r["reads_per_layer"]): r for r in result["runs"]}
    assert len(runs) == 2 * 2 * 4
    assert result["hit_rate"] == runs["lru", "predicted", 2.0]["hit_rate"]
    ours, without = (runs["lru", method, 4.0]["hit_rate"] for method in ("predicted", "none"))
    assert ours > without + 0.1
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert f"{ours:.3f}" in capsys.readouterr().out


def test_the_command_plans_a_machine(tmp_path, capsys):
    out = tmp_path / "plan.json"
    arguments = ["simulate", "--assume-routes", "6x64x8", "--tokens", "200", "--capacity", "1.5GB"]
    arguments += ["--assume-recall", ".98", ".97", ".96", ".95", "--bandwidth", "6", "--layer-ms"]
    arguments += ["4", "--latency", "0.1", "--expert-bytes", "8e6", "--no-oracles"]
    assert main([*arguments, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    run = next(r for r in result["runs"] if r["method"] == "predicted")
    assert result["capacity"] == [31] * 6
    assert run["reads_per_layer"] == pytest.approx(3)
    seconds = 200 / run["tokens_per_second"]
    assert seconds == pytest.approx(200 * 6 * 0.004 * (1 + run["stall"]))
    assert run["demand_bytes"] == 8e6 * run["counts"]["misses"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --trace or --assume-routes"),
        (["--assume-routes", "60"], "give layers x experts x top_k"),
        (["--assume-routes", "2x4x8"], "1 to num_experts experts a token"),
        (["--assume-routes", "2x8x2", "--bandwidth", "6"], "go together"),
        (["--assume-routes", "2x8x2", "--experts-per-layer-time", "0"], "must be positive"),
        (["--assume-routes", "2x8x2", "--capacity", "10%"], "capacity"),
        (["--assume-routes", "2x8x2", "--predictor", "p.safetensors"], "needs hidden states"),
        (["--assume-routes", "2x8x2", "--first-capacity", "3"], "leaves 1 for each other layer"),
        (["--trace", "missing.npz"], "missing.npz"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message, capsys):
    assert main(["simulate", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("mlx-od-moe simulate: ")
