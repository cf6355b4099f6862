"""Everything that computes a LoRA linear, behind one interface: what the benchmarks compare.

A provider is built for a case on given operands and offers ``forward()`` and ``forward_backward()``. All providers of
a case share one set of operands, so they compute the same function and can be checked against one truth. The backward
starts from a fixed upstream gradient and ends at x, A and B. The base of every ratio is ``frozen``: the GEMMs of the
frozen linear alone (``x W^T``, ``dY W``), without autograd; a ratio of 1.00 is a LoRA that costs nothing.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

BASE = "frozen"
YARDSTICK = "torch-eager"
BACKENDS = ("torch", "triton", "cuda")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One LoRA linear: x [m, k], W [n, k], A [r, k], B [n, r].

    Args:
        dtype: of x, W and bias, a key of ``DTYPES``.
        adapter_dtype: of A and B, a key of ``DTYPES``; None: ``dtype``.
        dropout: probability on the low-rank path, 0 <= p < 1; 0 where not ``train``.
        bias: whether the frozen linear has one (it stays frozen).
        train: True times forward (recording for backward) and forward + backward; False the forward under
            ``no_grad``, as in generation.

    Raises:
        ValueError: a size below 1, an unknown dtype, a dropout outside [0, 1) or without training.
    """

    m: int
    k: int
    n: int
    r: int = 16
    dtype: str = "bfloat16"
    adapter_dtype: str | None = None
    dropout: float = 0.0
    bias: bool = False
    train: bool = True

    def __post_init__(self) -> None:
        for label in ("m", "k", "n", "r"):
            if getattr(self, label) < 1:
                raise ValueError(
                    f"{label}: got {getattr(self, label)}; accepted are sizes of 1 and more"
                )
        for dtype in (self.dtype, self.adapter_dtype or self.dtype):
            if dtype not in DTYPES:
                raise ValueError(f"dtype: got {dtype!r}; accepted are {', '.join(DTYPES)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: got {self.dropout}; accepted is 0 <= dropout < 1")
        if self.dropout and not self.train:
            raise ValueError(
                f"dropout: got {self.dropout} with train=False; generation has no dropout"
            )

    @property
    def name(self) -> str:
        """M x K -> N and whatever differs from a plain training case: ``8192x4096x4096-r16-p0.05``."""
        parts = [f"{self.m}x{self.k}x{self.n}", f"r{self.r}"]
        if self.dtype != "bfloat16":
            parts.append(self.dtype)
        if self.adapter_dtype not in (None, self.dtype):
            parts.append(f"adapters-{self.adapter_dtype}")
        if self.dropout:
            parts.append(f"p{self.dropout:g}")
        parts += ["bias"] * self.bias + ["generation"] * (not self.train)
        return "-".join(parts)

    @property
    def passes(self) -> tuple[str, ...]:
        return ("fwd", "fwd+bwd") if self.train else ("fwd",)

    def without_dropout(self) -> Case:
        return replace(self, dropout=0.0)


@dataclass(frozen=True)
class Operands:
    """What a case is computed on: x [m, k], weight [n, k], lora_a [r, k], lora_b [n, r], bias [n] or None, grad [m, n].

    Normal values, scaled so that the low-rank term is as large as the frozen one in y and in dX: a provider that
    forgets it is wrong by as much as it can be. A and B hold values of ``case.dtype`` even where they are stored in
    fp32, so that a provider which casts them down still computes the same function.
    """

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    grad: Tensor
    scaling: float = 2.0

    @classmethod
    def draw(cls, case: Case, device: torch.device, seed: int = 0) -> Operands:
        generator = torch.Generator(device).manual_seed(seed)
        dtype = DTYPES[case.dtype]
        stored = DTYPES[case.adapter_dtype or case.dtype]

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).mul_(std).to(dtype)

        return cls(
            x=normal(case.m, case.k),
            weight=normal(case.n, case.k, std=case.k**-0.5),
            lora_a=normal(case.r, case.k, std=case.k**-0.5).to(stored),
            lora_b=normal(case.n, case.r, std=case.r**-0.5 / cls.scaling).to(stored),
            bias=normal(case.n) if case.bias else None,
            grad=normal(case.m, case.n),
        )


class Built(Protocol):
    """A provider at work on one case. ``forward`` returns y; ``forward_backward`` (y, dX) or (y, dX, dA, dB)."""

    def forward(self) -> Tensor: ...

    def forward_backward(self) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Provider:
    """A contender of the benchmarks.

    Args:
        name: what tables, files and ``--providers`` call it.
        about: one line for the reader of a result.
        build: makes it ready for a case.
        refuses: why it cannot take a case, None where it can. Shown in the report.
        within: a context it must run in; entered outside the timed region.
        adapter: False where only the frozen linear is computed.
        ours: a fastlora row: its kernels and launch counters are recorded.
    """

    name: str
    about: str
    build: Callable[[Case, Operands], Built]
    refuses: Callable[[Case, torch.device], str | None] = lambda case, device: None
    within: Callable[[], AbstractContextManager[object]] = nullcontext
    adapter: bool = True
    ours: bool = False

    @contextmanager
    def context(self, case: Case) -> Iterator[None]:
        """What ``forward`` and ``forward_backward`` run in: ``within``, and ``no_grad`` outside training."""
        with torch.set_grad_enabled(case.train), self.within():
            yield


# ---- torch ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frozen:
    """The frozen linear's own GEMMs, called directly."""

    operands: Operands

    def forward(self) -> Tensor:
        o = self.operands
        return o.x @ o.weight.t() if o.bias is None else F.linear(o.x, o.weight, o.bias)

    def forward_backward(self) -> tuple[Tensor, ...]:
        return self.forward(), self.operands.grad @ self.operands.weight


def _build_frozen(case: Case, operands: Operands) -> Built:
    return Frozen(operands)


class Trainable:
    """``call(x)`` as y, with autograd from y to x, A and B."""

    def __init__(
        self,
        call: Callable[[Tensor], Tensor],
        case: Case,
        operands: Operands,
        adapters: tuple[Tensor, Tensor],
    ) -> None:
        self.call, self.grad = call, operands.grad
        self.x = operands.x.detach().requires_grad_(case.train)
        self.leaves = (self.x, *adapters)

    def forward(self) -> Tensor:
        return self.call(self.x)

    def forward_backward(self) -> tuple[Tensor, ...]:
        y = self.forward()
        # grad() and not backward(): nothing accumulates, so every call does the same work.
        return (y, *torch.autograd.grad(y, self.leaves, self.grad))


def _adapters(operands: Operands) -> tuple[Tensor, Tensor]:
    return operands.lora_a.detach().requires_grad_(), operands.lora_b.detach().requires_grad_()


def _build_eager(case: Case, operands: Operands) -> Built:
    o = operands
    a, b = _adapters(o)

    def call(x: Tensor) -> Tensor:
        h = F.linear(F.dropout(x, case.dropout), a.to(x.dtype))
        return F.linear(x, o.weight, o.bias) + F.linear(h, b.to(x.dtype)) * o.scaling

    return Trainable(call, case, o, (a, b))


class _MmAddmm(torch.autograd.Function):
    """y = x W^T + bias, then y += s (x A^T) B^T in place; the backward composed of the same two calls.

    g = dY B,  dX = dY W then += s g A,  dA = s g^T x,  dB = s dY^T (x A^T), with x A^T computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        low_a, low_b = a.to(x.dtype), b.to(x.dtype)
        y = torch.matmul(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
        y.addmm_(x @ low_a.t(), low_b.t(), alpha=scaling)
        ctx.save_for_backward(x, weight, low_a, low_b)
        ctx.scaling, ctx.dtypes = scaling, (a.dtype, b.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        g = dy @ b
        dx = torch.matmul(dy, weight)
        dx.addmm_(g, a, alpha=ctx.scaling)
        da = torch.empty_like(a).addmm_(g.t(), x, alpha=ctx.scaling, beta=0)
        db = torch.empty_like(b).addmm_(dy.t(), x @ a.t(), alpha=ctx.scaling, beta=0)
        return dx, None, None, da.to(ctx.dtypes[0]), db.to(ctx.dtypes[1]), None


def _build_mm_addmm(case: Case, operands: Operands) -> Built:
    o = operands
    a, b = _adapters(o)
    return Trainable(
        lambda x: _MmAddmm.apply(x, o.weight, o.bias, a, b, o.scaling), case, o, (a, b)
    )


def _refuses_dropout(case: Case, device: torch.device) -> str | None:
    return "the composition takes no dropout" if case.dropout else None


# ---- peft ----------------------------------------------------------------------------------------------------


def _build_peft(case: Case, operands: Operands, fp32_adapters: bool, compiled: bool) -> Built:
    from peft import LoraConfig, get_peft_model

    linear = torch.nn.Linear(case.k, case.n, bias=case.bias, device="meta")
    linear.weight = torch.nn.Parameter(operands.weight, requires_grad=False)
    if operands.bias is not None:
        linear.bias = torch.nn.Parameter(operands.bias, requires_grad=False)
    config = LoraConfig(
        r=case.r,
        lora_alpha=round(operands.scaling * case.r),
        lora_dropout=case.dropout,
        target_modules=["linear"],
    )
    holder = torch.nn.Sequential(OrderedDict(linear=linear))
    model: Any = get_peft_model(holder, config, autocast_adapter_dtype=fp32_adapters)
    # The layer itself is timed: the model around it is paid once per model, not once per linear.
    layer = model.base_model.model.linear
    layer.train(case.train)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        a.copy_(operands.lora_a)
        b.copy_(operands.lora_b)
    dtype = DTYPES[case.dtype]
    call: Callable[[Tensor], Tensor] = layer
    if compiled:
        torch._dynamo.reset()  # each case compiles afresh and never meets the recompilation limit
        call = torch.compile(layer, dynamic=False)
    if fp32_adapters and dtype != torch.float32:
        inner = call
        device_type = operands.x.device.type

        def call(x: Tensor) -> Tensor:
            # Entered per call: a training step casts A and B once per layer, and so does this.
            with torch.autocast(device_type, dtype):
                return inner(x)

    return Trainable(call, case, operands, (a, b))


def _refuses_wide(case: Case, device: torch.device) -> str | None:
    if "float32" in (case.dtype, case.adapter_dtype):
        return "stands for 16-bit adapters; this case has fp32 ones"
    return None


# ---- fastlora ------------------------------------------------------------------------------------------------


def _build_fastlora(case: Case, operands: Operands) -> Built:
    from .. import lora_linear

    o = operands
    a, b = _adapters(o)

    def call(x: Tensor) -> Tensor:
        return lora_linear(x, o.weight, a, b, o.scaling, o.bias, case.dropout, case.train)

    return Trainable(call, case, o, (a, b))


def _within_backend(name: str) -> AbstractContextManager[object]:
    from .. import backend

    return backend(name, strict=True)


def _backend_misses(backend: str, case: Case, device: torch.device) -> str | None:
    from ..ops import support

    ops = ("lora",) if backend == "cuda" else support.OPS  # cuda: a whole linear in one launch
    reasons = (support.miss(op, backend, device, DTYPES[case.dtype], case.r) for op in ops)
    return next((reason for reason in reasons if reason), None)


def fastlora_provider(backend: str) -> Provider:
    """fastlora held to one backend: where that backend has no kernel it says so, it never falls back."""
    return Provider(
        f"fastlora-{backend}",
        f"fastlora.lora_linear, {backend} backend, strict",
        _build_fastlora,
        refuses=functools.partial(_backend_misses, backend),
        within=functools.partial(_within_backend, backend),
        ours=True,
    )


def all_providers() -> dict[str, Provider]:
    """Every contender by name, the base first."""
    peft = functools.partial(_build_peft, fp32_adapters=False, compiled=False)
    listed = [
        Provider(BASE, "the frozen GEMMs alone: x W^T, dY W", _build_frozen, adapter=False),
        Provider(
            "frozen-again", "the same once more: the noise of the run", _build_frozen, adapter=False
        ),
        Provider(YARDSTICK, "F.linear and two more for the low rank, autograd", _build_eager),
        Provider(
            "peft-default",
            "peft's lora.Linear as it comes: fp32 adapters, autocast",
            functools.partial(peft, fp32_adapters=True),
        ),
        Provider(
            "peft-16bit",
            "peft's lora.Linear, adapters in the base's 16-bit dtype",
            peft,
            _refuses_wide,
        ),
        Provider(
            "peft-16bit-compile",
            "the same under torch.compile",
            functools.partial(peft, compiled=True),
            _refuses_wide,
        ),
        Provider(
            "mm-addmm",
            "matmul + in-place addmm_, hand-derived backward: Unsloth's composition",
            _build_mm_addmm,
            _refuses_dropout,
        ),
        *(fastlora_provider(backend) for backend in BACKENDS),
        Provider(
            "fastlora",
            "fastlora.lora_linear as it comes: the dispatcher's choice of backends",
            _build_fastlora,
            ours=True,
        ),
    ]
    return {provider.name: provider for provider in listed}
