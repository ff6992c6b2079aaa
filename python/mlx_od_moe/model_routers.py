"""Reads the routers of a model's MoE layers and proves each on the model's own choices."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .moe import MoELayer, Routing, find_moe_layers, hooked, record_routing, setting
from .predictor_file import write_safetensors
from .router import Router, RouterConfig

_CORRECTIONS = ("e_score_correction_bias", "expert_bias", "router_bias")
_SCORINGS = ("score_func", "scoring_func", "score_function", "moe_router_score_func")
_GROUPS = ("n_group", "topk_group")
# Share of the recorded choices that a router's scores must reproduce. Not 1: a bfloat16 router
# breaks near-ties in another way than float32.
_CONTROL = 0.98


@dataclass(frozen=True)
class LayerRouter:
    """A layer's router in float32, and the weight of the RMSNorm that made the block's input.

    `norm` is [hidden_size] float32; None where no RMSNorm's output is the block's input.
    """

    router: Router
    norm: mx.array | None


def read_routers(
    model: nn.Module, tokens: mx.array | None = None, moe_layers: Sequence[MoELayer] | None = None
) -> dict[int, LayerRouter]:
    """Read the router of each MoE layer and prove it on one forward pass over `tokens`.

    `tokens` is [1, n], the more of them and the more like real text the better. A layer whose
    recorded choices its router's scores do not reproduce is left out with a warning. `moe_layers`:
    what find_moe_layers returned, for a model whose experts have gone to a store since.
    """
    tokens = mx.arange(32)[None] if tokens is None else tokens
    layers = {layer.index: layer for layer in moe_layers or find_moe_layers(model)}
    found: dict[int, LayerRouter] = {}
    for routing, norm in _probe(model, tokens):
        hidden = _float_rows(routing.hidden)
        ids = routing.expert_ids.reshape(-1, routing.expert_ids.shape[-1])
        candidates = _candidates(layers[routing.layer], hidden.shape[1])
        agreement = [_agreement(candidate, hidden, ids) for candidate in candidates]
        best = max(agreement, default=0.0)
        if best >= _CONTROL:
            found[routing.layer] = LayerRouter(candidates[agreement.index(best)], norm)
        else:
            warnings.warn(
                f"layer {routing.layer}: its router is left out, because no known scoring of its "
                f"weights reproduces its choices (best: {best:.1%})",
                stacklevel=2,
            )
    return found


def save_routers(path: Path, routers: Mapping[int, LayerRouter]) -> None:
    """Write routers to a safetensors file, whole or not at all; nothing where there are none.

    Tensors `{layer}.weight`, `.bias`, `.correction`, `.norm`; the metadata holds the one scoring
    rule of the file, so a layer with another rule is left out with a warning.
    """
    rules = {layer: _rule(entry.router.config) for layer, entry in routers.items()}
    arrays: dict[str, mx.array] = {}
    for layer, entry in routers.items():
        if rules[layer] != next(iter(rules.values())):
            warnings.warn(f"layer {layer}: left out, its routing rule differs", stacklevel=2)
            continue
        linear = entry.router.linear
        parts = {"weight": linear.weight, "bias": linear.get("bias"), "norm": entry.norm}
        parts["correction"] = entry.router.get("correction")
        arrays |= {f"{layer}.{part}": value for part, value in parts.items() if value is not None}
    if arrays:
        write_safetensors(path, arrays, next(iter(rules.values())))


def _rule(config: RouterConfig) -> dict[str, str]:
    rule = {"scoring": config.scoring}
    if config.n_group > 1:
        rule |= {"n_group": str(config.n_group), "topk_group": str(config.topk_group)}
    return rule


def router_weight(layer: MoELayer, hidden_size: int) -> mx.array | None:
    """A layer's router weight [num_experts, hidden_size] in float32; None where none was found."""
    candidates = _candidates(layer, hidden_size)
    return candidates[0].linear.weight if candidates else None


def _probe(model: nn.Module, tokens: mx.array) -> list[tuple[Routing, mx.array | None]]:
    """One forward: each layer's routing, and the weight of the norm that made its input."""
    from mlx_lm.models.cache import make_prompt_cache

    outputs: list[tuple[Any, nn.Module]] = []

    def keep(norm: nn.Module) -> Callable[..., Any]:
        def call(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            outputs.append((output, norm))
            return output

        return call

    with record_routing(model) as recorder, ExitStack() as stack:
        for module in [m for _, m in model.named_modules() if "Norm" in type(m).__name__]:
            stack.enter_context(hooked(module, keep(module)))
        model(tokens, cache=make_prompt_cache(model))
        routings = recorder.take()
    mx.eval([(r.hidden, r.expert_ids) for r in routings])
    made = {id(output): norm for output, norm in outputs}
    return [(r, _norm_weight(made.get(id(r.hidden)), r.hidden.shape[-1])) for r in routings]


def _norm_weight(norm: nn.Module | None, hidden_size: int) -> mx.array | None:
    """An RMSNorm returns its weight for ones; what is not odd (LayerNorm) has no such weight."""
    if norm is None:
        return None
    ones = mx.ones((1, hidden_size), mx.float32)
    plus, minus = _float_rows(norm(ones))[0], _float_rows(norm(-ones))[0]
    odd = mx.any(plus != 0).item() and mx.array_equal(plus, -minus).item()
    return plus if odd else None


def _candidates(layer: MoELayer, hidden_size: int) -> list[Router]:
    """The routers that a layer's parameters allow; several where the rule is not named."""
    found = _router_linear(layer, hidden_size)
    if found is None:
        return []
    owner, module = found
    weight = dense_weight(module)
    if "scale" in owner and owner["scale"].shape == (hidden_size,):
        # gemma4's router norms its input itself; the division by its length keeps the ranking.
        weight = weight * owner["scale"].astype(mx.float32)
    correction = _correction((owner, layer.block, module), layer.num_experts)
    declared = setting((owner, layer.block), _SCORINGS)
    scorings = ["softmax", "sigmoid"] if correction is None else ["sigmoid", "softmax"]
    scorings = [declared] * (declared in scorings) + scorings
    candidates = [_router(weight, module.get("bias"), correction, s, 1, 1) for s in scorings]
    n_group, topk_group = (setting((owner, layer.block), (n,)) or 1 for n in _GROUPS)
    if n_group > 1 and "sigmoid" in scorings:
        grouped = _router(weight, module.get("bias"), correction, "sigmoid", n_group, topk_group)
        candidates.insert(0, grouped)
    return candidates


def _router(
    weight: mx.array,
    bias: mx.array | None,
    correction: mx.array | None,
    scoring: str,
    n_group: int,
    topk_group: int,
) -> Router:
    num_experts, hidden_size = weight.shape
    if scoring != "sigmoid":
        correction = None
    groups = (n_group, topk_group)
    config = RouterConfig(
        hidden_size, num_experts, bias is not None, correction is not None, scoring, *groups
    )
    router = Router(config)
    router.linear.weight = weight
    if bias is not None:
        router.linear.bias = bias.astype(mx.float32)
    if correction is not None:
        router.correction = correction
    return router


def _router_linear(layer: MoELayer, hidden_size: int) -> tuple[nn.Module, nn.Module] | None:
    """The module that holds the weight [num_experts, hidden_size], after the one that owns it."""
    shape = (layer.num_experts, hidden_size)
    owners = [layer.block.get("gate"), layer.block.get("router"), layer.block]
    for owner in (owner for owner in owners if isinstance(owner, nn.Module)):
        for _, module in owner.named_modules():
            weight = module.get("weight")
            if isinstance(weight, mx.array) and weight.ndim == 2 and _dense_shape(module) == shape:
                return owner, module
    return None


def _dense_shape(module: nn.Module) -> tuple[int, ...]:
    rows, columns = module["weight"].shape
    return (rows, columns * 32 // module.bits) if "scales" in module else (rows, columns)


def dense_weight(module: nn.Module) -> mx.array:
    """A linear module's weight in float32, quantised or not."""
    if "scales" not in module:
        return module["weight"].astype(mx.float32)
    scales, biases = module["scales"], module.get("biases")
    form = (module.group_size, module.bits, module.mode)
    return mx.dequantize(module["weight"], scales, biases, *form).astype(mx.float32)


def _correction(owners: tuple[nn.Module, ...], num_experts: int) -> mx.array | None:
    for owner in owners:
        for name in _CORRECTIONS:
            value = owner.get(name)
            if isinstance(value, mx.array) and value.size == num_experts:
                return value.reshape(-1).astype(mx.float32)
    return None


def _agreement(router: Router, hidden: mx.array, ids: mx.array) -> float:
    """Share of the ids that are among the best by the router's scores."""
    ranked = mx.argsort(-router.scores(hidden), axis=-1)[:, : ids.shape[1]]
    hits = np.array(mx.any(ids[:, :, None] == ranked[:, None, :], axis=-1))
    return float(hits.mean())


def _float_rows(array: mx.array) -> mx.array:
    return array.reshape(-1, array.shape[-1]).astype(mx.float32)


def load_routers(path: Path) -> dict[int, LayerRouter]:
    """Read what `save_routers` wrote, {layer: router}; empty where there is no such file.

    Raises ValueError naming the file where it cannot be read.
    """
    if not path.exists():
        return {}
    try:
        loaded: Any = mx.load(str(path), return_metadata=True)
        arrays, rule = loaded
        options = {name: int(rule[name]) for name in _GROUPS if name in rule}
        layers = sorted({int(name.split(".")[0]) for name in arrays})
        return {layer: _load_router(arrays, layer, rule["scoring"], options) for layer in layers}
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"[{path}] not a readable file of routers: {error}") from error


def _load_router(
    arrays: Mapping[str, mx.array], layer: int, scoring: str, options: Mapping[str, int]
) -> LayerRouter:
    weight = arrays[f"{layer}.weight"]
    bias, correction = arrays.get(f"{layer}.bias"), arrays.get(f"{layer}.correction")
    config = RouterConfig(
        hidden_size=weight.shape[1],
        num_experts=weight.shape[0],
        bias=bias is not None,
        correction=correction is not None,
        scoring=scoring,
        **options,
    )
    router = Router(config)
    router.linear.weight = weight
    if bias is not None:
        router.linear.bias = bias
    if correction is not None:
        router.correction = correction
    return LayerRouter(router, arrays.get(f"{layer}.norm"))
