"""The adapters library's formulas, written down a second time over the tensors of a file: the oracle of the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

Norm = Callable[[Tensor], Tensor] | None


def update(t: dict[str, Tensor], config: Any, x: Tensor) -> Tensor:
    """scaling * up(act(down(x))), gated."""
    before = x
    if config.ln_before:
        x = F.layer_norm(x, x.shape[-1:], t["adapter_down.0.weight"], t["adapter_down.0.bias"])
    i = 1 if config.ln_before else 0
    hidden = ACT2FN[config.non_linearity](
        x @ t[f"adapter_down.{i}.weight"].T + t[f"adapter_down.{i}.bias"]
    )
    y = hidden @ t["adapter_up.weight"].T + t["adapter_up.bias"]
    y = y * (t["scaling"] if isinstance(config.scaling, str) else config.scaling)
    if config.use_gating:
        gate = torch.sigmoid(before @ t["gate.weight"].T + t["gate.bias"])
        y = y * gate.mean(dim=1).unsqueeze(-1)
    return y


def adapted(t: dict[str, Tensor], config: Any, h: Tensor, s: Tensor, norm: Norm) -> Tensor:
    """h, the sublayer's output, adapted; s is what the block adds it to, and norm stands behind that sum, if any does."""

    def after(y: Tensor) -> Tensor:
        weights = t["adapter_norm_after.weight"], t["adapter_norm_after.bias"]
        return F.layer_norm(y, y.shape[-1:], *weights)

    if config.is_parallel:
        y = update(t, config, s)
        return h + (after(y) if config.ln_after else y)
    x = residual = h
    if config.original_ln_before:
        total = h + s
        x = total if norm is None else norm(total)
        if config.residual_before_ln == "post_add":
            residual = total
        elif config.residual_before_ln is False:
            residual = x
    y = update(t, config, x)
    if config.ln_after and config.adapter_residual_before_ln:
        return after(y + residual)
    return (after(y) if config.ln_after else y) + residual


def of_place(tensors: dict[str, Tensor], place: str, name: str = "default") -> dict[str, Tensor]:
    """The tensors of one place of a file, in fp64, by the names within."""
    start = f"{place}.adapters.{name}."
    return {k.removeprefix(start): v.double() for k, v in tensors.items() if k.startswith(start)}
