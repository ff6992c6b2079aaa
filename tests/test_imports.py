"""Imports go one way: read from the source, so that no path through the code can hide one."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "mlx_od_moe"
# Not modules that the source tree holds: the extension and what the build writes.
BUILT = {"_ext", "_build"}

# What the modules that everything rests on may import of ours, and nothing else.
FOUNDATION = {
    "_blas": set(),
    "_malloc": set(),
    "calibration": set(),
    "confidence": set(),
    "metrics": {"confidence"},
    "token_table": set(),
    "predictor_file": set(),
    "moe": set(),
    "progress": set(),
    "durable_file": {"_ext"},
    "expert_file": {"_ext"},
    "store_metrics": set(),
    "expert_store": {"_ext", "expert_file", "store_metrics"},
    "model_shell": {"expert_file", "expert_store", "moe"},
    "compute_threads": set(),
    "switch": {"_ext", "compute_threads", "expert_store", "moe"},
    "forward_pass": {"cache_rows", "switch"},
    "guard": set(),
    "run_counts": {"expert_store"},
    "slot_shares": {"expert_file"},
    "route_recorder": {"durable_file"},
    "generate_command": {"_ext", "offload", "route_recorder", "runtime"},
    "usage": {"durable_file", "expert_store", "progress"},
    "fingerprint": {"model_routers", "moe", "predictor_bundle"},
    "token_experts": {"token_table"},
    "cache_rows": set(),
    "sequences": {"cache_rows", "shadow_runner"},
    "sole_user": {"_ext"},
    "next_token_runner": {"_ext", "predictor_bundle", "shadow_runner", "token_experts"},
    "prefetcher": {
        "_ext",
        "cache_rows",
        "expert_store",
        "next_token_runner",
        "predictor_bundle",
        "sequences",
        "shadow_runner",
        "token_experts",
    },
    "offload": {
        "expert_file",
        "expert_store",
        "fingerprint",
        "model_shell",
        "predictor_bundle",
        "runtime",
        "slot_shares",
        "usage",
    },
    "runtime": {
        "_ext",
        "cache_rows",
        "compute_threads",
        "expert_store",
        "forward_pass",
        "guard",
        "moe",
        "predictor_bundle",
        "prefetcher",
        "progress",
        "run_counts",
        "sole_user",
        "switch",
        "usage",
    },
    "packed_format": {"_ext", "expert_file"},
    "pack": {"_ext", "durable_file", "expert_file", "packed_format", "progress"},
    "row_ops": {"_ext"},
    "router": {"predictor_file", "row_ops"},
    "context": {"_ext", "predictor_file", "row_ops"},
    "projection": {"predictor_file"},
    "predictor_config": {"context"},
    "native_predictor": {"_ext", "predictor_file"},
    "shadow_model": {
        "calibration",
        "context",
        "native_predictor",
        "predictor_config",
        "predictor_file",
        "projection",
        "router",
    },
    "next_token": {"predictor_config", "predictor_file", "shadow_model"},
    "predictor_bundle": {
        "calibration",
        "context",
        "native_predictor",
        "next_token",
        "predictor_config",
        "predictor_file",
        "projection",
        "router",
        "shadow_model",
        "token_experts",
    },
    "shadow_runner": {
        "_ext",
        "native_predictor",
        "predictor_bundle",
        "predictor_file",
        "shadow_model",
    },
    "model_routers": {"moe", "predictor_file", "router"},
    "server.settings": set(),
    "server.request_checks": set(),
    "server.runs": {"server.request_checks"},
    "server.generator": {"_ext", "server.request_checks", "server.runs", "server.settings"},
    "server.metrics_page": {"runtime", "server.runs", "store_metrics"},
    "server.monitor": {"runtime", "server.metrics_page", "server.runs"},
    "server.handler": {"server.request_checks", "server.runs"},
    "server.http_server": {
        "runtime",
        "server.generator",
        "server.handler",
        "server.metrics_page",
        "server.monitor",
        "server.request_checks",
        "server.runs",
        "server.settings",
    },
    "bench.timing": {"_blas"},
    "bench.peers": set(),
    "bench.queue": {"_ext", "bench.timing"},
}
# What is made of the rest, and may import training.
FRONT = {
    "assumed_routing",
    "baselines",
    "calibrate_command",
    "cli",
    "demo",
    "evaluate",
    "evaluate_first_layers",
    "report",
    "routing_trace",
    "serve_command",
    "simulate",
    "simulate_command",
    "__main__",
}


def module_name(path: Path) -> str:
    """Inside the package, with dots; "" is the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def runtime_nodes(node: ast.AST) -> list[ast.AST]:
    """All nodes, in functions too, but for what only a type checker imports."""
    if is_for_types_only(node):
        return []
    return [node, *(n for child in ast.iter_child_nodes(node) for n in runtime_nodes(child))]


def imports_in(source: str, name: str, is_package: bool) -> set[str]:
    """Our modules that the module `name` with that source imports."""
    package = name.split(".") if is_package else name.split(".")[:-1]
    found: set[str] = set()
    for node in runtime_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = [part for part in package if part][: len(package) + 1 - node.level]
                base = ".".join(["mlx_od_moe", *above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for imported in names:
            if imported.split(".")[0] == "mlx_od_moe":
                found.add(known(imported.removeprefix("mlx_od_moe").removeprefix(".")))
    return found


def known(name: str) -> str:
    """The module that a dotted name lies in: a.b.function is of a.b."""
    while name and name not in MODULES and name not in BUILT:
        name = name.rpartition(".")[0]
    return name


IMPORTS = {
    name: imports_in(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")
    for name, path in MODULES.items()
}


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("shadow_model", "from .router import Router", {"router"}),
        ("evaluate", "def f():\n    from .training.fit import measure", {"training.fit"}),
        ("training.fit", "from ..metrics import rank", {"metrics"}),
        ("training.fit", "from .. import metrics", {"metrics"}),
        ("training.fit", "from .losses import LOSSES", {"training.losses"}),
        ("training.fit", "from . import losses", {"training.losses"}),
        ("cli", "from . import __version__", {""}),
        ("cli", "import mlx_od_moe.metrics as m", {"metrics"}),
        ("cli", "from mlx_od_moe.training import fit", {"training.fit"}),
        ("cli", "if TYPE_CHECKING:\n    from .moe import MoELayer", set()),
        ("cli", "import mlx.core as mx\nfrom mlx_lm import load", set()),
    ],
)
def test_this_test_sees_every_way_to_import(name, source, expected):
    assert imports_in(source, name, is_package=False) == expected


@pytest.mark.parametrize("name", FOUNDATION)
def test_the_foundation_imports_only_what_lies_below(name):
    assert IMPORTS[name] <= FOUNDATION[name]


def test_imports_make_no_circle():
    """Raises CycleError, which names the circle."""
    order = [*graphlib.TopologicalSorter(IMPORTS).static_order()]
    assert set(MODULES) <= set(order)


def test_only_the_front_imports_training():
    users = {name for name, found in IMPORTS.items() if any(map(is_training, found))}
    assert {name for name in users if not is_training(name)} <= FRONT


def test_training_imports_nothing_of_the_front():
    for name in filter(is_training, MODULES):
        assert not IMPORTS[name] & FRONT, name


def is_training(name: str) -> bool:
    return name.split(".")[0] == "training"


def test_nothing_imports_the_command_line():
    users = {name for name, found in IMPORTS.items() if "cli" in found}
    assert users <= {"__main__"}


def test_importing_the_package_loads_neither_training_nor_models():
    code = "import mlx_od_moe, sys; print(*sys.modules, sep='\\n')"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "mlx_od_moe.shadow_model" in loaded
    heavy = {"mlx_lm", "transformers", "matplotlib", "mlx_od_moe.training", "mlx_od_moe.cli"}
    assert not heavy & set(loaded)


CPP = [p for p in (ROOT / "cpp").rglob("*") if p.suffix in (".h", ".cpp")]


def includes(path: Path) -> list[str]:
    source = path.read_text(encoding="utf-8")
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', source, re.MULTILINE)


def test_only_the_bindings_include_nanobind():
    users = {p.name for p in CPP if any(i.startswith("nanobind/") for i in includes(p))}
    assert "bindings.cpp" in users
    assert all(name.startswith("bindings") for name in users), users


def test_queue_store_and_kernels_include_no_mlx():
    """Prefetch threads never see an MLX array, and ThreadSanitizer never sees MLX."""
    without = re.compile(
        r"prediction_|shadow_runner|runner_layers|sequence_|context_memory|ring|parking|placement"
        r"|read_probe|mlx_od_moe/expert_|eviction|resident_|schedule|prefetch|simulator|kernels|workers"
    )
    checked = [p for p in CPP if without.search(str(p.relative_to(ROOT)))]
    assert checked
    assert not [p for p in checked if any(i.startswith("mlx/") for i in includes(p))]
