"""Ranks from a budget: the rank with which LoRA trains a share of a model's parameters.

What an adapter trains is counted by making it, twice, in a copy of the model that has no memory (on the meta device): so the count is
that of the model itself, embeddings, heads, trained copies, biases and rows with it. Between ranks it is a straight line.
"""

from __future__ import annotations

import bisect
import copy
import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.inits import check_init
from ..methods import LoraConfig
from ..ops.support import MAX_RANK
from .entry import get_peft_model
from .peft_model import count_parameters


def rank_for_share(model: nn.Module, config: LoraConfig, share: float) -> int:
    """The largest rank with which ``config`` trains at most ``share`` of all parameters; an even one where the factors begin
    "orthogonal".

    Args:
        model: the base, without adapters; it is not changed.
        config: what to adapt; its ``r`` is not looked at, a ``rank_pattern`` stays.
        share: trained over all parameters, adapters included, as ``print_trainable_parameters`` tells; in (0, 1).

    Raises:
        ValueError: ``share`` is no share; what trains whatever the rank exceeds it (``modules_to_save``, a task's head,
            biases, rows); or rank 1 does.
        TypeError, NotImplementedError: as ``get_peft_model``.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"share: got {share!r}; accepted is above 0 and below 1")
    halves_rank = check_init(config.init_lora_weights) == "orthogonal"
    # How factors begin, and how the base is kept, makes no difference to how many there are.
    settings: dict[str, Any] = {"init_lora_weights": True, "eva_config": None, "loftq_config": {}}
    config = dataclasses.replace(config, **settings, quantize=None)
    (one, whole), (two, _) = (_counted(model, dataclasses.replace(config, r=r)) for r in (1, 2))
    a_rank = two - one
    fixed, rest = one - a_rank, whole - a_rank  # at rank 0
    if not a_rank:
        raise ValueError(
            "rank_pattern: every adapted module has a rank of its own; there is none to choose"
        )
    if fixed > share * rest:
        raise ValueError(
            f"share: got {share:.4%}; what trains whatever the rank (modules_to_save, a task's head, biases, rows, ranks of "
            f"rank_pattern) is {fixed / rest:.4%} already. Give a larger share, or train fewer of these"
        )

    def trains(r: int) -> float:
        return (fixed + r * a_rank) / (rest + r * a_rank)

    first = 2 if halves_rank else 1
    ranks = range(first, MAX_RANK + 1, first)
    fitting = bisect.bisect_right(ranks, share, key=trains)
    if fitting < 1:
        raise ValueError(
            f"share: got {share:.4%}; rank {first} trains {trains(first):.4%} already; give a larger share, or fewer target_modules"
        )
    return ranks[fitting - 1]


def _counted(model: nn.Module, config: LoraConfig) -> tuple[int, int]:
    """What ``config`` trains of ``model``, and of how many parameters."""
    twin = _without_memory(model)
    before = count_parameters(twin)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the model itself will warn
        trained, total = get_peft_model(twin, config).get_nb_trainable_parameters()
    # Of what others keep in 4 bits the twin has the bytes alone.
    return trained, count_parameters(model)[1] + total - before


def _without_memory(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose tensors are on the meta device."""
    twins: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty: Tensor = torch.empty_like(tensor, device="meta", requires_grad=False)
        trained = isinstance(tensor, nn.Parameter)
        twins[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if trained else empty
    return copy.deepcopy(model, twins)
