"""Finds the MoE layers of any mlx-lm model and records their routing.

What this package knows about particular models lives here and in model_routers.py. One rule covers
them: experts are computed by a `SwitchGLU` or `SwitchMLP` module called with (x, expert ids), and
the module around it is the MoE block, whose first argument is what the router sees.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

_TOP_K = (
    "top_k",
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "k",
)


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer: `index` in the model, `path` of its experts module.

    `block` is the module whose first argument [..., hidden_size] the router sees; `experts` is the
    SwitchGLU or SwitchMLP inside, called with ids [..., top_k].
    """

    index: int
    path: str
    block: nn.Module
    experts: nn.Module
    num_experts: int
    top_k: int


@dataclass(frozen=True)
class Routing:
    """One call of a MoE layer, as lazy arrays.

    `hidden` [..., hidden_size] is the block's input itself; `expert_ids` [..., top_k] the router's
    choice, in no order; ids past the last expert stand for experts that cost nothing.
    """

    layer: int
    hidden: mx.array
    expert_ids: mx.array


def load_model(path: str | Path) -> tuple[nn.Module, Any]:
    """Load (model, tokenizer) from a local directory; nothing is downloaded.

    Raises FileNotFoundError for a missing or incomplete directory and ValueError for a model
    without MoE layers.
    """
    from mlx_lm.utils import load

    path = Path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"[load_model] {path} must be a model directory with config.json")
    model, tokenizer = load(str(path))
    find_moe_layers(model)
    return model, tokenizer


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """List the MoE layers by index. Raises ValueError where there are none, or two in a layer."""
    from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

    modules = dict(model.named_modules())
    layers: dict[int, MoELayer] = {}
    for path, module in modules.items():
        if isinstance(module, SwitchGLU | SwitchMLP):
            layer = _moe_layer(modules, path, module)
            if layer.index in layers:
                other = layers[layer.index].path
                raise ValueError(f"[find_moe_layers] {other} and {path} share layer {layer.index}")
            layers[layer.index] = layer
    if not layers:
        raise ValueError(
            f"[find_moe_layers] {type(model).__module__} has no MoE layers: no SwitchGLU or "
            "SwitchMLP module was found"
        )
    return [layers[index] for index in sorted(layers)]


def _moe_layer(modules: dict[str, nn.Module], path: str, experts: nn.Module) -> MoELayer:
    parent_path = path.rpartition(".")[0]
    block, around = modules[parent_path], modules[parent_path]
    if _takes_routing(block):
        # gemma4, deepseek_v41: the thin module around the experts is given the ids, so the
        # router beside it is the one that sees the state.
        around = modules[parent_path.rpartition(".")[0]]
        block = around.get("router") or around["gate"]
    linear = experts["down_proj"] if "down_proj" in experts else experts["fc2"]
    index = next((int(part) for part in path.split(".") if part.isdigit()), None)
    top_k = setting((block, around), _TOP_K)
    if index is None or not isinstance(top_k, int):
        raise ValueError(f"[find_moe_layers] {path}: its layer index or top-k was not found")
    return MoELayer(index, path, block, experts, linear.num_experts, top_k)


def _takes_routing(module: nn.Module) -> bool:
    parameters = list(inspect.signature(type(module).__call__).parameters.values())[1:]
    return sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters) > 1


def setting(owners: tuple[nn.Module, ...], names: tuple[str, ...]) -> Any:
    """The first attribute of these names on the modules, their routers or their configs."""
    places: list[Any] = []
    for owner in owners:
        places += [owner, owner.get("gate"), owner.get("router")]
    for place in list(places):
        places += [getattr(place, "args", None), getattr(place, "config", None)]
    for place in places:
        for name in names:
            value = getattr(place, name, None)
            if value is not None and not isinstance(value, mx.array):
                return value
    return None


@contextmanager
def hooked(module: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Let `call(original, *args, **kwargs)` stand in for `module.__call__`, for this instance."""
    cls = type(module)

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        return call(partial(cls.__call__, self), *args, **kwargs)

    hook = type(cls.__name__, (cls,), {"__call__": __call__, "__module__": cls.__module__})
    # Python looks `__call__` up on the class, so a swapped class it must be.
    module.__class__ = hook
    try:
        yield
    finally:
        module.__class__ = cls


class RoutingRecorder:
    """What the hooks of `record_routing` have seen since the last `take`."""

    def __init__(self) -> None:
        self._inputs: dict[int, mx.array] = {}
        self._routings: list[Routing] = []

    def take(self) -> list[Routing]:
        """Return the calls recorded so far, in order, and forget them."""
        taken, self._routings = self._routings, []
        return taken

    def _hook(self, stack: ExitStack, layer: MoELayer) -> None:
        def block(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._inputs[layer.index] = args[0] if args else next(iter(kwargs.values()))
            return call(*args, **kwargs)

        def experts(call: Callable[..., Any], x: mx.array, ids: mx.array, *rest: Any) -> Any:
            hidden = self._inputs[layer.index]
            self._routings.append(Routing(layer.index, hidden, chosen.pop() if chosen else ids))
            return call(x, ids, *rest)

        def router(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            routed = call(*args, **kwargs)
            chosen.append(routed[0])
            return routed

        chosen: list[mx.array] = []
        stack.enter_context(hooked(layer.block, block))
        stack.enter_context(hooked(layer.experts, experts))
        if hasattr(layer.block, "zero_expert_num"):
            # longcat_flash hands its experts id 0 in place of the experts that do nothing.
            stack.enter_context(hooked(layer.block["router"], router))


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecorder]:
    """Record the routing of every forward pass inside the `with`, in the model's own arrays.

    Nothing is evaluated: outputs, parameters and laziness stay as they are, and the classes are
    put back at the end. Take often: what is not taken is kept alive.
    """
    recorder = RoutingRecorder()
    with ExitStack() as stack:
        for layer in find_moe_layers(model):
            recorder._hook(stack, layer)
        yield recorder
