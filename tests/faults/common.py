"""Operands, the fp64 truth beside them, and programs in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

import fastlora
from fastlora import reference
from fastlora.testing.compare import relative_error

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("y", "dX", "dA", "dB", "dbias")
ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def operands(
    m: int = 12,
    k: int = 24,
    n: int = 20,
    r: int = 4,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    adapters: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, lora_a, lora_b; none of them requires grad."""
    x = torch.randn(m, k, device=device).to(dtype)
    w = (torch.randn(n, k, device=device) / max(k, 1) ** 0.5).to(dtype)
    a = (torch.randn(r, k, device=device) / max(k, 1) ** 0.5).to(adapters or dtype)
    b = torch.randn(n, r, device=device).to(adapters or dtype)
    return x, w, a, b


def step(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    dy: Tensor | None = None,
    scaling: float | Tensor = 0.5,
    bias: Tensor | None = None,
    **kwargs: object,
) -> list[Tensor]:
    """[y, dX, dA, dB, (dbias)] of ``fastlora.lora_linear``; memory layouts stay as given."""
    leaves = [t.detach().requires_grad_() for t in (x, a, b) + (() if bias is None else (bias,))]
    y = fastlora.lora_linear(
        leaves[0], w, *leaves[1:3], scaling, None if bias is None else leaves[3], **kwargs
    )
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y) if dy is None else dy)]


def truth(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    dy: Tensor | None = None,
    scaling: float | Tensor = 0.5,
    bias: Tensor | None = None,
    **dropout: object,
) -> list[Tensor]:
    """The same by the formula, in fp64."""
    wide = [t.detach().double().contiguous() for t in (x, a, b)]
    wide += [] if bias is None else [bias.detach().double().contiguous()]
    for t in wide:
        t.requires_grad_()
    y = reference.lora_linear(
        wide[0], w.double(), *wide[1:3], scaling, None if bias is None else wide[3], **dropout
    )
    dy = torch.ones_like(y) if dy is None else dy.double()
    return [y.detach(), *torch.autograd.grad(y, wide, dy)]


def weight64(q: fastlora.NF4Tensor) -> Tensor:
    """The weight [N, K] of an NF4Tensor by the formula, in fp64 on the CPU: no op of fastlora's."""
    codes, *scales = (t.detach().cpu().view(-1) for t in (q.codes, *q.scales))
    absmax, *nested = (t.view(torch.float32) if t.dtype == torch.int32 else t for t in scales)
    if nested:
        wide, values, offset = (t.double() for t in nested)
        per_block = wide.repeat_interleave(q.nested_block_size)[: absmax.numel()]
        absmax = values[absmax.long()] * per_block + offset
    code = torch.stack((codes >> 4, codes & 15), 1).view(-1)[: q.shape.numel()].long()
    value = torch.tensor(reference.NF4_CODE, dtype=torch.float64)[code]
    scale = absmax.double().repeat_interleave(q.block_size)[: q.shape.numel()]
    return (value * scale).view(q.shape)


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Every tensor of ``got`` within ``tolerance`` of its fp64 truth, in the norm; NaN is never close."""
    for name, ours, exact in zip(NAMES, got, expected):
        assert ours.shape == exact.shape, (name, ours.shape, exact.shape)
        error = relative_error(ours.detach(), exact.detach())
        assert error <= tolerance, f"{name}: relative error {error:.3e}"


def assert_right(x: Tensor, *others: Tensor, **kwargs: object) -> None:
    """``step`` on these operands, as they lie in memory, is the formula."""
    assert_close(step(x, *others, **kwargs), truth(x, *others, **kwargs), ROUNDING[x.dtype])


def run_python(program: str, *arguments: str, timeout: float = 120, **env: str) -> str:
    """Standard output of ``program`` in a fresh interpreter with the tree on its path."""
    path = os.pathsep.join([env.pop("PYTHONPATH", ""), str(ROOT)]).strip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()
