"""First values of A [r, K] and B [N, r], as PEFT defines them for each ``init_lora_weights``.

PEFT creates A and B as two ``nn.Linear`` on the CPU and initialises them afterwards; drawing the
same numbers in the same order here makes one seed give one adapter in both libraries.

    True         A ~ kaiming uniform (a = sqrt 5), B = 0           (LoRA, arXiv 2106.09685)
    False        A and B ~ kaiming uniform: not a no-op, for tests
    "gaussian"   A ~ N(0, 1/r^2), B = 0
    "pissa"      W = U S V^T: A = sqrt(S_r / s) V_r^T, B = U_r sqrt(S_r / s), W -= s B A
                                                                   (arXiv 2404.02948)
    "pissa_niter_N"  the same with N subspace iterations of a randomised SVD
    "olora"      W = Q R: A = R_r, B = Q_r, W -= s B A             (arXiv 2406.01775)
    "orthogonal" Q orthogonal [r, r]: A in the span of its odd rows, B in that of its even ones, so that B A = 0
    "eva"        A as nn.Linear has it, B = 0, until ``fastlora.initialize_lora_eva_weights`` sees data
                                                                   (arXiv 2410.07170)
    "loftq"      over NF4: W ~ Q + s B A, Q quantised and B A of least error in turn (arXiv 2310.08659)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..quant import NF4Tensor

INITS = (
    "True",
    "False",
    "'gaussian'",
    "'orthogonal'",
    "'eva'",
    "'pissa'",
    "'pissa_niter_<n>'",
    "'olora'",
    "'loftq'",
)
# These need the base's weight as it was before the adapter, and change it.
_CHANGING = ("pissa", "olora", "loftq")
_PISSA = re.compile(r"pissa(?:_niter_(\d+))?")
_SPLITTABLE = (torch.float32, torch.float16, torch.bfloat16)


class Factors(NamedTuple):
    """A [r, K] and B [N, r] in fp32, the base weight [N, K] to use from now on (None: keep), and the update's own bias [N]
    where it has one."""

    a: Tensor
    b: Tensor
    residual: Tensor | None = None
    bias: Tensor | None = None


def check_init(init: bool | str) -> bool | str:
    """An ``init_lora_weights`` in its canonical spelling; ValueError if it is not in ``INITS``."""
    if isinstance(init, bool):
        return init
    if isinstance(init, str):
        if _PISSA.fullmatch(init):
            return init
        if init.lower() in ("gaussian", "olora", "orthogonal", "eva", "loftq"):
            return init.lower()
    raise ValueError(
        f"init_lora_weights: got {init!r}; accepted are {', '.join(INITS)}. For PEFT's other "
        "initialisations use peft.get_peft_model and then fastlora.accelerate(model)"
    )


def changes_base_weight(init: bool | str) -> bool:
    """Whether this init moves part of the base weight into the adapter."""
    return isinstance(init, str) and init.lower().startswith(_CHANGING)


def check_lora_bias(lora_bias: bool, use_dora: bool, init: bool | str) -> None:
    """ValueError if ``lora_bias`` does not go with the others; PEFT's rules."""
    if lora_bias and use_dora:
        raise ValueError("lora_bias: got True with use_dora=True; accepted is one of them")
    if lora_bias and not isinstance(init, bool):
        raise ValueError(
            f"lora_bias: got True with init_lora_weights={init!r}; accepted beside it are True and False"
        )


def initial_factors(
    init: bool | str,
    weight: Tensor | None,
    in_features: int,
    out_features: int,
    r: int,
    scaling: float,
    lora_bias: bool = False,
) -> Factors:
    """A and B of one new adapter, without touching ``weight``.

    Args:
        init: one of ``INITS``.
        weight: the base weight [N, K]; None where it cannot be read (a quantised base).
        in_features, out_features, r: K, N and the rank.
        scaling: s, which PiSSA and OLoRA need.
        lora_bias: whether the update has a bias of its own.

    Raises:
        ValueError: unknown init; PiSSA or OLoRA with r above min(N, K), or over a weight that is
            quantised, on the meta device or not fp32, fp16 or bf16; an odd r with "orthogonal"; "loftq", which
            quantises and is QLoRALinear.from_linear's.
    """
    init = check_init(init)
    if changes_base_weight(init):
        weight = _readable(init, weight, r)
    a = nn.init.kaiming_uniform_(
        torch.empty(r, in_features, dtype=torch.float32, device="cpu"), a=math.sqrt(5)
    )
    b = nn.init.kaiming_uniform_(
        torch.empty(out_features, r, dtype=torch.float32, device="cpu"), a=math.sqrt(5)
    )
    bias = None
    if lora_bias:
        bias = torch.empty(out_features, dtype=torch.float32, device="cpu")
        nn.init.uniform_(bias, -1 / math.sqrt(r), 1 / math.sqrt(r))
    if init is False:
        return Factors(a, b, None, bias)
    if init is True:
        bias = None if bias is None else nn.init.zeros_(bias)
        return Factors(nn.init.kaiming_uniform_(a, a=math.sqrt(5)), nn.init.zeros_(b), None, bias)
    if init == "gaussian":
        return Factors(nn.init.normal_(a, std=1 / r), nn.init.zeros_(b))
    if init == "eva":
        return Factors(a, nn.init.zeros_(b))
    if init == "orthogonal":
        return _orthogonal(in_features, out_features, r)
    assert isinstance(init, str)
    assert weight is not None
    if init == "loftq":
        raise ValueError(
            "init_lora_weights: 'loftq' quantises the weight itself; use QLoRALinear.from_linear, or "
            "LoraConfig(quantize='nf4'), where the layer is among those that are quantised"
        )
    return _split(init, weight, r, scaling)


def _orthogonal(in_features: int, out_features: int, r: int) -> Factors:
    if r % 2:
        raise ValueError(
            f"r: got {r} with init_lora_weights='orthogonal', which halves it; accepted are even ranks"
        )

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float32, device="cpu")

    q = torch.linalg.qr(normal(r, r))[0]
    a = (normal(in_features, r // 2) @ q[0::2]).t() / 10
    b = normal(r // 2, out_features).t() @ q[1::2] / 10
    return Factors(a.contiguous(), b.contiguous())


def _readable(init: bool | str, weight: Tensor | None, r: int) -> Tensor:
    if weight is None or weight.dtype not in _SPLITTABLE:
        found = "a quantised base" if weight is None else f"a base in {weight.dtype}"
        raise ValueError(
            f"init_lora_weights: got {init!r} over {found}, whose weight it would have to split; "
            "accepted bases are float32, float16 and bfloat16: initialise before quantising, or "
            "use init_lora_weights=True"
        )
    if weight.device.type == "meta":
        raise ValueError(
            f"init_lora_weights: {init!r} needs the values of the base weight, which is on the "
            "meta device"
        )
    if r > min(weight.shape):
        raise ValueError(
            f"r: got {r} with init_lora_weights={init!r} over a weight of shape "
            f"{tuple(weight.shape)}; accepted is at most {min(weight.shape)}"
        )
    return weight.detach()


def loftq(
    weight: Tensor, quantize: Callable[[Tensor], NF4Tensor], r: int, scaling: float, iterations: int
) -> tuple[NF4Tensor, Factors]:
    """Q and s B A whose sum is near ``weight`` [N, K]: Q quantises what B A leaves, B A is the best of rank r for what Q
    leaves, in turn ``iterations`` times.

    Raises:
        ValueError: as ``initial_factors`` for PiSSA.
    """
    full = _readable("loftq", weight, r).to(torch.float32)
    _check_divisor("loftq", scaling)
    target = weight.detach()
    for _ in range(iterations):
        base = quantize(target)
        a, b = _leading(full - base.dequantize(torch.float32), r, scaling)
        target = full - scaling * (b @ a)
    return base, Factors(a, b)


def _check_divisor(init: str, scaling: float) -> None:
    if not 0 < scaling < math.inf:
        raise ValueError(
            f"lora_alpha: gives a scaling of {scaling} with init_lora_weights={init!r}, which divides by it; accepted "
            "is a positive, finite lora_alpha"
        )


def _split(init: str, weight: Tensor, r: int, scaling: float) -> Factors:
    _check_divisor(init, scaling)
    full = weight.to(torch.float32)
    if init == "olora":
        q, upper = torch.linalg.qr(full)
        a, b = upper[:r].contiguous(), q[:, :r].contiguous()
    else:
        match = _PISSA.fullmatch(init)
        assert match is not None
        a, b = _leading(full, r, scaling, None if match[1] is None else int(match[1]))
    return Factors(a, b, (full - scaling * (b @ a)).to(weight.dtype))


def _leading(
    matrix: Tensor, r: int, scaling: float, iterations: int | None = None
) -> tuple[Tensor, Tensor]:
    """A and B with s B A the best approximation of rank r, by a whole SVD or ``iterations`` of a randomised one."""
    if iterations is None:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(matrix, r, niter=iterations)
        vh = v.t()
    root = torch.sqrt(s[:r] / scaling)
    return root[:, None] * vh[:r], u[:, :r] * root
