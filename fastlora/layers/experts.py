"""transformers' experts with adapters: low-rank terms of all experts by ``lora_linear_segments``, and no delta of any expert.

transformers marks modules that hold stacked expert weights (``use_experts_implementation``), and computes all of them by one
scheme: rows are sorted by expert; up projection, gate or activation, down projection; routing weights; sum over each token's
experts. What differs the module says: ``has_gate``, ``has_bias``, ``is_transposed``, ``has_post_expert_norm``, ``_apply_gate``.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import lora_linear_segments
from .plain import FLOATS, is_undisturbed

if TYPE_CHECKING:
    from .parameter import LoRAParameter

_MARKS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "num_experts")


def reads_experts(
    module: nn.Module,
    layers: Mapping[str, LoRAParameter],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> bool:
    """Whether ``experts_forward`` computes what ``module`` would: transformers marked it, its projections are in floats,
    adapters are on them alone, and it is called with rows [M, K], experts [M, k] and routing weights [M, k]."""
    marked = all(hasattr(module, mark) for mark in _MARKS) and hasattr(module, "_apply_gate")
    if not marked or getattr(module, "_is_expert_parallel", True) or not is_undisturbed(module):
        return False
    projections = (_up_name(module), "down_proj")
    weights = [module._parameters.get(name) for name in projections]
    if not set(layers) <= set(projections) or any(
        w is None or w.dtype not in FLOATS for w in weights
    ):
        return False
    called = len(args) == 3 and not kwargs and all(isinstance(arg, Tensor) for arg in args)
    return called and args[0].ndim == 2 and all(w.ndim == 3 for w in weights if w is not None)


def _up_name(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def experts_forward(
    module: Any,
    layers: Mapping[str, LoRAParameter],
    x: Tensor,
    experts: Tensor,
    routing: Tensor,
) -> Tensor:
    """What ``module`` gives for x [M, K], the experts [M, k] of each row and their routing weights [M, k].

    Args:
        layers: the adapters by Parameter; those of one that is not there do not act.
    """
    tokens, k = experts.shape
    chosen = experts.reshape(-1)
    order = chosen.argsort(stable=True)
    counts = torch.bincount(chosen, minlength=module.num_experts)[: module.num_experts]
    sizes = counts.tolist()  # the one point where the host waits
    order = order[: sum(sizes)]  # numbers from num_experts on, which are last, are of no expert
    rows = x[order // k]
    up = _up_name(module)
    h = _grouped(module, up, layers.get(up), rows, sizes)
    h = module._apply_gate(h) if module.has_gate else module.act_fn(h)
    y = _grouped(module, "down_proj", layers.get("down_proj"), h, sizes)
    if module.has_post_expert_norm:
        y = module.post_expert_norm(y)
    y = y * routing.reshape(-1)[order, None]
    back = y.new_zeros(tokens * k, y.shape[-1]).index_copy(0, order, y)
    return back.view(tokens, k, y.shape[-1]).sum(1).to(x.dtype)


def _grouped(
    module: Any, name: str, layer: LoRAParameter | None, x: Tensor, sizes: list[int]
) -> Tensor:
    """x [S, K], ``sizes[e]`` rows for each expert e in turn -> [S, N]: x W_e^T + bias_e + the acting adapters' terms.

    The frozen product is expert by expert, of those that have rows; an adapter's term is one grouped product for all.
    """
    weight = getattr(module, name)
    weights = (weight.mT if module.is_transposed else weight).unbind(0)
    biases = getattr(module, f"{name}_bias").unbind(0) if module.has_bias else [None] * len(weights)
    parts = x.split(sizes)
    used = [e for e, size in enumerate(sizes) if size] or [0]  # of no rows at all, an empty product
    y = torch.cat([F.linear(parts[e], weights[e], biases[e]) for e in used])
    adapters = layer.acting_adapters() if layer is not None else []
    if not adapters:
        return y
    assert layer is not None
    offsets = torch.tensor([0, *accumulate(sizes)], device=x.device)
    for adapter in adapters:
        a, b = layer.split_factors(adapter)
        scaling = layer.scaling[adapter]
        if isinstance(scaling, Tensor):
            scaling = scaling.expand(len(sizes))
        y = y + lora_linear_segments(x, None, a, b.contiguous(), offsets, scaling)
    return y
