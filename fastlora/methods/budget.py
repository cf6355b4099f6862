"""Ranks from a budget: how many parameters LoRA trains of a model, and the rank that meets a share of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torch import nn

from ..layers.wrapper import linear_features
from ..ops.support import MAX_RANK
from ..quant import NF4Tensor
from .lora import LoraConfig
from .matching import base_view, is_target, pattern_value, resolve_targets


def rank_for_share(model: nn.Module, config: LoraConfig, share: float) -> int:
    """The largest rank with which LoRA on ``config``'s modules trains at most ``share`` of all parameters.

    Args:
        model: the base, without adapters.
        config: what to adapt; its ``r`` is not looked at, a ``rank_pattern`` stays.
        share: trained over all parameters, adapters included, as ``print_trainable_parameters`` tells; in (0, 1).

    Raises:
        ValueError: ``share`` is no share, no module matches, or rank 1 trains more already.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"share: got {share!r}; accepted is above 0 and below 1")
    for field, plain in (("modules_to_save", None), ("bias", "none")):
        if getattr(config, field) not in (plain, []):
            raise ValueError(
                f"share: counts the factors of LoRA alone, and {field}={getattr(config, field)!r} trains more; give r"
            )
    config = dataclasses.replace(config, target_modules=resolve_targets(config, model))
    sizes = {
        name: features
        for name, module in base_view(model).items()
        if name and is_target(config, name) and (features := linear_features(module))
    }
    if not sizes:
        raise ValueError(f"target_modules: {config.target_modules!r} matches no linear module")
    fixed = sum(
        pattern_value(config.rank_pattern, name, 0) * (k + n) for name, (k, n) in sizes.items()
    )
    fixed += sum(n * (config.use_dora + config.lora_bias) for _, n in sizes.values())
    a_rank = sum(k + n for name, (k, n) in sizes.items() if not pattern_value(config.rank_pattern, name, 0))  # fmt: skip
    base = _count(model.parameters()) + sum(
        m.shape.numel() - _count(m.parameters())
        for m in model.modules()
        if isinstance(m, NF4Tensor)
    )
    # trained / (base + trained) <= share
    allowed = share * base / (1.0 - share) - fixed
    rank = min(MAX_RANK, int(allowed // a_rank)) if a_rank else 0
    if rank < 1:
        least = a_rank + fixed
        raise ValueError(
            f"share: got {share:.4%}; rank 1 on these {len(sizes)} modules trains {least / (base + least):.4%} already; give "
            "a larger share, or fewer target_modules"
        )
    return rank


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
