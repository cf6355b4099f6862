"""Hard inputs: integers that sum exactly, every awkward memory layout, and covering sets of test cases."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "every_other_row", "transposed", "expanded", "odd_offset", "column_slice")


def integers(
    *shape: int, low: int = -4, high: int = 4, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Integer-valued uniforms, element 0 never zero: sums of their products are exact in fp32."""
    values = torch.randint(low, high + 1, shape, device=device).to(dtype)
    if values.numel():
        values.view(-1)[0] = high
    return values


def with_layout(values: Tensor, layout: str) -> Tensor:
    """A [M, K] tensor in another memory layout. "expanded" repeats the first row; the others keep the values.

    Raises:
        ValueError: ``layout`` is not one of LAYOUTS.
    """
    rows, cols = values.shape
    if layout == "contiguous":
        return values.contiguous()
    if layout == "every_other_row":
        wide = values.new_empty(2 * rows, cols)
        wide[::2] = values
        return wide[::2]
    if layout == "transposed":
        return values.t().contiguous().t()
    if layout == "expanded":
        return values[:1].expand(rows, cols) if rows else values
    if layout == "odd_offset":
        flat = values.new_empty(values.numel() + 1)
        flat[1:] = values.reshape(-1)
        return flat[1:].view(rows, cols)
    if layout == "column_slice":
        wide = values.new_empty(rows, cols + 3)
        wide[:, 1 : cols + 1] = values
        return wide[:, 1 : cols + 1]
    raise ValueError(f"layout: got {layout!r}; accepted are {', '.join(LAYOUTS)}")


def covering_cases(
    axes: Mapping[str, Sequence[Any]], strength: int = 3, seed: int = 0, limit: int = 2000
) -> list[dict[str, Any]]:
    """Few cases in which every combination of values of any ``strength`` axes occurs at least once.

    Greedy: of 24 random candidates, each step keeps the one that covers most of what is still missing.

    Args:
        axes: name -> the values it takes.
        strength: how many axes are covered jointly (3: every triple).
        seed: fixes the result.
        limit: never more cases than this (the coverage is then incomplete).
    """
    rng = random.Random(seed)
    names = list(axes)
    groups = list(itertools.combinations(range(len(names)), strength))
    missing = {
        (group, values)
        for group in groups
        for values in itertools.product(*(range(len(axes[names[i]])) for i in group))
    }
    cases: list[dict[str, Any]] = []
    while missing and len(cases) < limit:
        group, values = (
            min(missing) if len(cases) % 2 else rng.choice(tuple(itertools.islice(missing, 64)))
        )
        best: tuple[int, tuple[int, ...]] | None = None
        for _ in range(24):
            candidate = [rng.randrange(len(axes[name])) for name in names]
            for i, value in zip(group, values, strict=True):
                candidate[i] = value
            gain = sum((g, tuple(candidate[i] for i in g)) in missing for g in groups)
            if best is None or gain > best[0]:
                best = gain, tuple(candidate)
        assert best is not None
        chosen = best[1]
        missing -= {(g, tuple(chosen[i] for i in g)) for g in groups}
        cases.append({name: axes[name][chosen[i]] for i, name in enumerate(names)})
    return cases
