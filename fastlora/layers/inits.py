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
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

INITS = ("True", "False", "'gaussian'", "'pissa'", "'pissa_niter_<n>'", "'olora'")
_PISSA = re.compile(r"pissa(?:_niter_(\d+))?")
_SPLITTABLE = (torch.float32, torch.float16, torch.bfloat16)


class Factors(NamedTuple):
    """A [r, K] and B [N, r] in fp32, and the base weight [N, K] to use from now on (None: keep)."""

    a: Tensor
    b: Tensor
    residual: Tensor | None = None


def check_init(init: bool | str) -> bool | str:
    """An ``init_lora_weights`` in its canonical spelling; ValueError if it is not in ``INITS``."""
    if isinstance(init, bool):
        return init
    if isinstance(init, str):
        if _PISSA.fullmatch(init):
            return init
        if init.lower() in ("gaussian", "olora"):
            return init.lower()
    raise ValueError(
        f"init_lora_weights: got {init!r}; accepted are {', '.join(INITS)}. For PEFT's other "
        "initialisations use peft.get_peft_model and then fastlora.accelerate(model)"
    )


def changes_base_weight(init: bool | str) -> bool:
    """Whether this init moves part of the base weight into the adapter."""
    return isinstance(init, str) and init.lower() != "gaussian"


def initial_factors(
    init: bool | str,
    weight: Tensor | None,
    in_features: int,
    out_features: int,
    r: int,
    scaling: float,
) -> Factors:
    """A and B of one new adapter, without touching ``weight``.

    Args:
        init: one of ``INITS``.
        weight: the base weight [N, K]; None where it cannot be read (a quantised base).
        in_features, out_features, r: K, N and the rank.
        scaling: s, which PiSSA and OLoRA need.

    Raises:
        ValueError: unknown init; PiSSA or OLoRA with r above min(N, K), or over a weight that is
            quantised, on the meta device or not fp32, fp16 or bf16.
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
    if init is False:
        return Factors(a, b)
    if init is True:
        return Factors(nn.init.kaiming_uniform_(a, a=math.sqrt(5)), nn.init.zeros_(b))
    if init == "gaussian":
        return Factors(nn.init.normal_(a, std=1 / r), nn.init.zeros_(b))
    assert isinstance(init, str)
    assert weight is not None
    return _split(init, weight, r, scaling)


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


def _split(init: str, weight: Tensor, r: int, scaling: float) -> Factors:
    if not 0 < scaling < math.inf:
        raise ValueError(
            f"lora_alpha: gives a scaling of {scaling} with init_lora_weights={init!r}, which divides by it; accepted "
            "is a positive, finite lora_alpha"
        )
    full = weight.to(torch.float32)
    if init == "olora":
        q, upper = torch.linalg.qr(full)
        a, b = upper[:r].contiguous(), q[:, :r].contiguous()
    else:
        match = _PISSA.fullmatch(init)
        assert match is not None
        if match[1] is None:
            u, s, vh = torch.linalg.svd(full, full_matrices=False)
        else:
            u, s, v = torch.svd_lowrank(full, r, niter=int(match[1]))
            vh = v.t()
        root = torch.sqrt(s[:r] / scaling)
        a, b = root[:, None] * vh[:r], u[:, :r] * root
    return Factors(a, b, (full - scaling * (b @ a)).to(weight.dtype))
