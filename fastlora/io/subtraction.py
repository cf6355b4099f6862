"""PiSSA and OLoRA adapters as plain LoRA, which any base takes.

Both begin with W = W_res + s B0 A0 and train W_res + s B A. Over W itself that is the update s (B A - B0 A0), of rank 2r:

    A' = [A; A0],   B' = [B, -B0],   r' = 2r,   lora_alpha so that s stays
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from ..layers.inits import changes_base_weight
from ..methods import LoraConfig, PeftConfig
from ..ops.support import MAX_RANK


def check_convertible(config: PeftConfig) -> LoraConfig:
    """``config`` if an adapter of it can be converted; ValueError otherwise."""
    name = "path_initial_model_for_weight_conversion"
    init = getattr(config, "init_lora_weights", None)
    if not isinstance(config, LoraConfig) or init == "loftq" or not changes_base_weight(init or ""):
        raise ValueError(
            f"{name}: is for init_lora_weights 'pissa' and 'olora', this adapter has {init!r}; save it without"
        )
    patterns = config.rank_pattern or config.alpha_pattern
    if config.use_rslora and patterns:
        raise ValueError(
            f"{name}: does not go with use_rslora beside rank_pattern or alpha_pattern, whose scaling a doubled rank changes"
        )
    if 2 * max(config.r, *config.rank_pattern.values(), 0) > MAX_RANK:
        raise ValueError(f"{name}: doubles the rank; accepted are ranks up to {MAX_RANK // 2}")
    return config


def doubled(config: LoraConfig) -> LoraConfig:
    """The configuration of the converted adapter."""
    made = copy.deepcopy(config)
    made.init_lora_weights = True
    made.r = 2 * config.r
    made.lora_alpha = config.lora_alpha * (2**0.5 if config.use_rslora else 2)
    made.rank_pattern = {key: 2 * value for key, value in config.rank_pattern.items()}
    made.alpha_pattern = {key: 2 * value for key, value in config.alpha_pattern.items()}
    return made


def subtract(now: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the converted adapter: keys as in its file.

    Raises:
        ValueError: ``initial`` lacks a factor, or has it in another shape.
    """
    made = {}
    for key, value in now.items():
        at = 0 if key.endswith("lora_A.weight") else 1 if key.endswith("lora_B.weight") else None
        if at is None:
            made[key] = value
            continue
        first = initial.get(key)
        if first is None or first.shape != value.shape:
            found = "nothing" if first is None else list(first.shape)
            raise ValueError(
                f"path_initial_model_for_weight_conversion: has {found} for {key}, accepted is {list(value.shape)}: the "
                "adapter as it was before training, saved then"
            )
        first = first.to(value.device, value.dtype)
        made[key] = torch.cat((value.detach(), -first if at else first), at)
    return made
