"""Several LoRA adapters made one: ``PeftModel.add_weighted_adapter``.

With D_i = s_i B_i A_i the update of adapter i and w_i its weight, the exact sum is D = sum_i w_i D_i.

    cat                 A = the w_i s_i A_i below one another, B = the B_i side by side: exactly D, of rank sum r_i
    svd                 the best factors of D of the rank asked for; from the factors alone, D is never made
    linear              A = sum_i sign sqrt|w_i s_i| A_i, B likewise: has cross terms B_i A_j, so it is not D
    ties, dare_ties,    linear's sums, of factors that are pruned first: TIES (arXiv 2306.01708) keeps the largest and lets the
    dare_linear,        majority decide on signs, DARE (arXiv 2311.03099) keeps a random share and scales it up,
    magnitude_prune     magnitude_prune keeps the largest
    *_svd               the same of the D_i themselves, whose elements must then exist: a layer at a time
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers import LoRALayer, TrainableCopy
from ..methods import LoraConfig
from ..methods.checks import check_choice, check_finite
from ..methods.matching import base_view, shortest_names
from ..ops.support import MAX_RANK
from .adapters import Adapters

COMBINATIONS = (
    "cat",
    "svd",
    "linear",
    "ties",
    "ties_svd",
    "dare_ties",
    "dare_linear",
    "dare_ties_svd",
    "dare_linear_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
)
_PRUNING = tuple(name for name in COMBINATIONS if name not in ("cat", "svd", "linear"))


class Part(NamedTuple):
    """One adapter of a layer in a combination: A [r, K], B [N, r], its scaling and its weight."""

    a: Tensor
    b: Tensor
    scaling: float
    weight: float

    @property
    def factor(self) -> float:
        return self.weight * self.scaling


class Recipe(NamedTuple):
    """How parts become one: see ``add_weighted_adapter``."""

    kind: str
    rank: int
    clamp: float | None
    density: float | None
    majority_sign_method: str


def add_weighted_adapter(
    model: Adapters,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str = "cat",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> None:
    """See ``PeftModel.add_weighted_adapter``."""
    _check_lists(model, adapters, weights)
    check_choice("combination_type", combination_type, COMBINATIONS)
    check_choice("majority_sign_method", majority_sign_method, ("total", "frequency"))
    kind = "linear" if len(adapters) == 1 else combination_type  # which is exact then
    configs = [_combinable(model, name) for name in adapters]
    ranks = [max(config.r, *config.rank_pattern.values(), 0) for config in configs]
    _check_prunable(kind, density)
    rank = _rank(kind, ranks, svd_rank)
    recipe = Recipe(kind, rank, svd_clamp, density, majority_sign_method)
    config = dataclasses.replace(
        configs[0],
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        init_lora_weights=True,
        eva_config=None,
        ensure_weight_tying=any(config.ensure_weight_tying for config in configs),
        target_modules=_targets(model, adapters),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=None,
        rank_pattern={},
        alpha_pattern={},
    )

    def fill() -> None:
        for name, layer in model.get_base_model().named_modules():
            if isinstance(layer, LoRALayer) and adapter_name in layer.r:
                try:
                    _fill_layer(layer, adapters, weights, adapter_name, recipe)
                except ValueError as error:
                    raise ValueError(f"module {name!r}: {error}") from error

    model.add_loaded(adapter_name, config, fill)


# What is checked before anything is made.


def _check_lists(model: Adapters, adapters: list[str], weights: list[float]) -> None:
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"adapters, weights: got {len(adapters)} and {len(weights)}; accepted is one weight for each of one adapter or more"
        )
    for name in adapters:
        if name not in model.peft_config:
            raise ValueError(f"adapters: got {name!r}; this model has {sorted(model.peft_config)}")
    for weight in weights:
        check_finite("weights", weight)
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, TrainableCopy) and (own := set(adapters) & set(module.adapters)):
            raise ValueError(
                f"adapters: {sorted(own)} trained {name!r} whole (modules_to_save), and copies cannot be combined; leave "
                "it out of modules_to_save"
            )


def _combinable(model: Adapters, name: str) -> LoraConfig:
    config = model.peft_config[name]
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"adapters: {name!r} is {config.peft_type}; add_weighted_adapter combines LoRA adapters"
        )
    for field in ("use_dora", "lora_bias", "target_parameters", "trainable_token_indices"):
        if getattr(config, field):
            raise ValueError(
                f"adapters: {name!r} has {field}={getattr(config, field)!r}, whose update is more than a product of two "
                "factors; merge it (merge_and_unload) instead"
            )
    return config


def _check_prunable(kind: str, density: float | None) -> None:
    needed = kind in _PRUNING
    if needed and (
        isinstance(density, bool)
        or not isinstance(density, (int, float))
        or not 0.0 < float(density) <= 1.0
    ):
        raise ValueError(
            f"density: got {density!r}; {kind!r} keeps a share of the values: accepted is above 0, up to 1"
        )


def _rank(kind: str, ranks: list[int], svd_rank: int | None) -> int:
    if kind == "cat":
        rank = sum(ranks)
    elif kind.endswith("svd"):
        rank = max(ranks) if svd_rank is None else svd_rank
    elif len(set(ranks)) > 1:
        raise ValueError(
            f"combination_type: {kind!r} adds factors, which must have one rank; got {ranks}. 'cat' and 'svd' take any"
        )
    else:
        rank = ranks[0]
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        what = "svd_rank" if kind.endswith("svd") else "combination_type: 'cat' gives rank"
        raise ValueError(f"{what}: got {rank!r}; accepted is 1 to {MAX_RANK}; 'svd' reduces it")
    return rank


def _targets(model: Adapters, adapters: list[str]) -> list[str]:
    """The modules that any of them adapts."""
    view = base_view(model.get_base_model())
    found = [
        name
        for name, layer in view.items()
        if isinstance(layer, LoRALayer) and any(adapter in layer.r for adapter in adapters)
    ]
    return shortest_names(found, view)


# One layer.


def _fill_layer(
    layer: LoRALayer, adapters: list[str], weights: list[float], new: str, recipe: Recipe
) -> None:
    parts = [
        Part(*layer.factors(name), float(layer.scaling[name]), weight)
        for name, weight in zip(adapters, weights, strict=True)
        if layer.r.get(name)
    ]
    with torch.no_grad():
        if parts:
            layer.write_factors(new, *combine(parts, recipe))
        else:  # none of the adapters acts here, nor does their sum
            layer.lora_A[new].zero_()


def combine(parts: list[Part], recipe: Recipe) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r] of the combination; r is at most ``recipe.rank``."""
    kind = recipe.kind
    if kind == "cat":
        a = torch.cat([part.a * part.factor for part in parts])
        return a, torch.cat([part.b.to(a.dtype) for part in parts], dim=1)
    if kind == "svd":
        return _clamped(*_svd_of_factors(parts, recipe.rank), recipe.clamp)
    if kind.endswith("_svd"):
        deltas = [part.b.double() @ part.a.double() * part.scaling for part in parts]
        total = _sum(kind.removesuffix("_svd"), deltas, [part.weight for part in parts], recipe)
        u, s, vh = torch.linalg.svd(total, full_matrices=False)
        return _clamped(vh[: recipe.rank], (u * s)[:, : recipe.rank], recipe.clamp)
    if len({part.a.shape[0] for part in parts}) > 1:
        raise ValueError(
            f"combination_type: {kind!r} adds factors, which have ranks {[part.a.shape[0] for part in parts]} here (rank_pattern); "
            "'cat' and 'svd' take any"
        )
    # The sign goes to one side alone, or it would cancel.
    roots = [math.sqrt(abs(part.factor)) for part in parts]
    signed = [math.copysign(root, part.factor) for root, part in zip(roots, parts, strict=True)]
    a = _sum(kind, [part.a for part in parts], signed, recipe)
    return a, _sum(kind, [part.b for part in parts], roots, recipe)


def _sum(kind: str, tensors: list[Tensor], weights: list[float], recipe: Recipe) -> Tensor:
    """sum_i weights_i pruned(tensors_i); with "ties" in ``kind`` the mean of those that have the majority's sign."""
    prune: Callable[[Tensor, float], Tensor] | None = None
    if kind != "linear" and recipe.density != 1:
        prune = _keep_random if kind.startswith("dare") else _keep_largest
    kept = torch.stack(
        [
            t if prune is None or recipe.density is None else prune(t, recipe.density)
            for t in tensors
        ]
    )
    factors = torch.tensor(weights, device=kept.device).view(-1, 1, 1)
    if "ties" not in kind:
        return (kept * factors).sum(0)
    votes = kept if recipe.majority_sign_method == "total" else kept.sign()
    majority = torch.where(votes.sum(0) >= 0, 1, -1)
    agree = kept.sign() == majority
    return (kept * factors * agree).sum(0) / agree.sum(0).clamp(min=1)


def _keep_largest(tensor: Tensor, density: float) -> Tensor:
    keep = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    mask = tensor.new_zeros(tensor.numel())
    mask[keep] = 1
    return tensor * mask.view(tensor.shape)


def _keep_random(tensor: Tensor, density: float) -> Tensor:
    """Of torch's generator, so that a seed repeats it."""
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


def _svd_of_factors(parts: list[Part], rank: int) -> tuple[Tensor, Tensor]:
    """B = U S, A = V^T of the sum, by QR of the factors side by side: all that is decomposed is as small as their rank."""
    q_b, r_b = torch.linalg.qr(torch.cat([part.b.double() * part.factor for part in parts], dim=1))
    q_a, r_a = torch.linalg.qr(torch.cat([part.a.double() for part in parts]).t())
    u, s, vh = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    return vh[:rank] @ q_a.t(), q_b @ (u * s)[:, :rank]


def _clamped(a: Tensor, b: Tensor, clamp: float | None) -> tuple[Tensor, Tensor]:
    """Both factors within the ``clamp`` quantile of their values."""
    if clamp is None:
        return a, b
    values = torch.cat([b.flatten(), a.flatten()]).sort().values
    at = clamp * (values.numel() - 1)  # torch.quantile stops at 16 million values
    below = values[math.floor(at)]
    limit = below + (values[math.ceil(at)] - below) * (at - math.floor(at))
    return a.clamp(-limit, limit), b.clamp(-limit, limit)
