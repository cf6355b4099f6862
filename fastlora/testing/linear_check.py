"""A contender is checked against fp64 before it is timed: a fast wrong answer is an error, not a result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .providers import DTYPES, Case, Operands

OUTPUTS = ("y", "dx", "da", "db")


class WrongResult(Exception):
    """A provider computes something else than the formula."""


@dataclass(frozen=True)
class Truth:
    """fp64 values of (y, dX, dA, dB), split: ``frozen`` holds the parts without the adapter (None: there is none)."""

    frozen: tuple[Tensor | None, ...]
    low_rank: tuple[Tensor, ...]

    @classmethod
    def of(cls, operands: Operands, train: bool) -> Truth:
        """By the formulas of architecture.md without dropout; only y where not ``train``."""
        o = operands
        x, w, a, b = (t.double() for t in (o.x, o.weight, o.lora_a, o.lora_b))
        h = o.scaling * (x @ a.t())
        y = x @ w.t() if o.bias is None else torch.addmm(o.bias.double(), x, w.t())
        if not train:
            return cls((y,), (h @ b.t(),))
        dy = o.grad.double()
        g = o.scaling * (dy @ b)
        return cls((y, dy @ w, None, None), (h @ b.t(), g @ a, g.t() @ x, dy.t() @ h))

    def errors(self, outputs: Sequence[Tensor], with_adapter: bool = True) -> dict[str, float]:
        """``||out - truth|| / ||truth||`` of every output given, in the order of ``OUTPUTS``."""
        errors = {}
        for name, out, frozen, low in zip(
            OUTPUTS, outputs, self.frozen, self.low_rank, strict=False
        ):
            truth = low if frozen is None else frozen + low if with_adapter else frozen
            errors[name] = ((out.double() - truth).norm() / truth.norm()).item()
        return errors


def check_exact(errors: Mapping[str, float], yardstick: Mapping[str, float], dtype: str) -> None:
    """Raise ``WrongResult`` where an error is beyond 4x plain torch's on the same operands plus one rounding.

    Looser than the accuracy fastlora promises (its tests hold it to 2x): this is here to catch a wrong formula, and
    the peers round more often.
    """
    for name, error in errors.items():
        limit = 4.0 * yardstick[name] + torch.finfo(DTYPES[dtype]).eps
        if not error <= limit:  # so written that NaN fails
            raise WrongResult(
                f"{name} is off by {error:.2e} of its norm from fp64 (accepted: {limit:.2e})"
            )


def check_dropout(outputs: Sequence[Tensor], truth: Truth, case: Case) -> None:
    """Raise ``WrongResult`` where ``outputs``, computed with dropout, do not have its mean or its variance.

    Masks differ between providers, their statistics do not. Every output is linear in the mask, so against its
    low-rank part L the deviation D = out - truth has <D, L> / <L, L> near 0 (dropout is unbiased: scaled by 1/(1-p),
    applied where it belongs) and <D, D> / <L, L> near p / (1 - p) (it is there, once).
    """
    p = case.dropout
    expected = p / (1.0 - p)
    # The spread of both statistics falls with the number of independent mask elements that reach an output.
    slack = 8.0 * math.sqrt(expected / (case.r * min(case.m, case.k, case.n)))
    for name, out, frozen, low in zip(OUTPUTS, outputs, truth.frozen, truth.low_rank, strict=False):
        deviation = out.double() - low if frozen is None else out.double() - frozen - low
        power = low.square().sum()
        mean = ((deviation * low).sum() / power).item()
        variance = (deviation.square().sum() / power).item()
        spread = 0.05 + 8.0 * slack
        if not (
            abs(mean) <= slack and max(0.1, 1.0 - spread) <= variance / expected <= 1.0 + spread
        ):
            raise WrongResult(
                f"{name} under dropout {p}: mean shift {mean:+.3f} (accepted: {slack:.3f}), "
                f"variance {variance:.4f} (expected {expected:.4f})"
            )
