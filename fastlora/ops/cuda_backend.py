"""The ``cuda`` backend: the hand-written kernels of csrc/, called through the op library."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._counters import count
from ..rng import KEEP_ALL
from .support import Fit, Form


def mask(rng_state: Tensor, rows: int, cols: int, keep: int) -> Tensor:
    """``reference.mask`` by csrc/dropout."""
    count("mask", "cuda")
    return torch.ops.fastlora._dropout_mask(rng_state, rows, cols, keep)


def quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """``reference.quantize_nf4`` by csrc/nf4."""
    count("quantize", "cuda")
    return torch.ops.fastlora._nf4_quantize(weight, block_size)


def dequantize(codes: Tensor, scales: Sequence[Tensor], form: Form, dtype: torch.dtype) -> Tensor:
    """``reference.dequantize_nf4`` by csrc/nf4, quantised scales on the way."""
    count("dequantize", "cuda")
    return library_dequantize(codes, scales, form, dtype)


def library_dequantize(
    codes: Tensor, scales: Sequence[Tensor], form: Form, dtype: torch.dtype
) -> Tensor:
    """The library's op, which the ``torch`` backend has on the CPU."""
    out = torch.empty(form.rows, form.cols, dtype=dtype, device=codes.device)
    absmax, nested = scales[0], scales[1:] or (None, None, None)
    sizes = form.block_size, form.nested_block_size or 1
    torch.ops.fastlora._nf4_dequantize(codes, absmax, *nested, *sizes, form.fp4, 0, out)
    return out


def _nf4_miss(x: Tensor, codes: Tensor, form: Form) -> str | None:
    """Why no kernel of csrc/nf4 can multiply x (dY) by the codes as they are."""
    m, k = x.shape[0], form.cols
    if m < 1 or k == 0 or form.rows == 0 or form.block_size < 64 or k % form.block_size:
        return "needs whole blocks of 64 elements or more in a row"
    if max(m, k, form.rows) >= 2**30 or form.rows * (k // 64) >= 2**31:
        return f"counts to 2^30 rows and columns, and 2^37 elements; got {form.rows} x {k}"
    if (x.stride(1), x.stride(0) % 8, x.data_ptr() % 16, codes.data_ptr() % 16) != (1, 0, 0, 0):
        return "needs codes, and rows of x, at multiples of 16 bytes"
    return None


# csrc/nf4/sm80.cu: up to so many rows it is faster than sm90.cu; more it takes for GPUs that have no other.
_FEW_NF4_ROWS = 8
_MOST_NF4_FEW_ROWS = 64


def nf4_few_fit(x: Tensor, codes: Tensor, form: Form) -> Fit:
    """How the tensors suit csrc/nf4/sm80.cu."""
    m = x.shape[0]
    if m > _MOST_NF4_FEW_ROWS:
        return Fit(f"is for up to {_MOST_NF4_FEW_ROWS} rows, got {m}")
    blocks, most = form.cols // form.block_size, _most_few_blocks(x.device)
    if blocks > most:
        return Fit(
            f"takes up to {most} blocks in a row here, whose scales it makes ahead, got {blocks}"
        )
    slower = "with more than a few rows csrc/nf4/sm90.cu is faster" if m > _FEW_NF4_ROWS else None
    return Fit(_nf4_miss(x, codes, form), slower)


def _most_few_blocks(device: torch.device) -> int:
    """Blocks in a row whose scales, of 16 features, csrc/nf4/sm80.cu has shared memory for beside all else (FewTile::kScales)."""
    shared = _properties(device).shared_memory_per_block_optin if device.type == "cuda" else 0
    room = shared - (197632 if shared >= 197632 + 32 * 1024 else 82944)
    return max(0, (room // (16 * 4) - 1) | 1)  # an odd number apart


@functools.cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def _nf4_factors_miss(x: Tensor, a: Tensor | None, b: Tensor | None) -> str | None:
    """Why the kernels of csrc/nf4 cannot make h themselves."""
    if a is None or b is None:
        return None
    if not 1 <= a.shape[0] <= 16:
        return f"takes 1 to 16 ranks, got {a.shape[0]}"
    if {a.dtype, b.dtype} - {x.dtype, torch.float32}:
        return f"takes factors in x's dtype or float32, got {a.dtype} and {b.dtype}"
    if not (a.is_contiguous() and b.is_contiguous()) or a.data_ptr() % 16:
        return "needs contiguous factors, and A at a multiple of 16 bytes"
    return None


# Above, a weight in floats costs less than decoding it again for every 256 rows (benchmarks/NOTES.md). Forward up to twice as
# many, where tiles of 256 rows x 128 columns leave few SMs idle in the last round.
_MOST_NF4_GEMM_ROWS = 1024


def _nf4_slower(x: Tensor, columns: int, forward: bool) -> str | None:
    m = x.shape[0]
    if m <= _MOST_NF4_GEMM_ROWS:
        return None
    if forward and m <= 2 * _MOST_NF4_GEMM_ROWS and x.device.type == "cuda":
        tiles, sms = -(-m // 256) * -(-columns // 128), _properties(x.device).multi_processor_count
        if tiles >= 0.9 * sms * -(-tiles // sms):
            return None
    return f"{m} rows are for a weight in floats"


def nf4_gemm_fit(x: Tensor, codes: Tensor, scales: Sequence[Tensor], form: Form) -> Fit:
    """How the tensors suit csrc/nf4/sm90.cu."""
    blocks = form.cols // form.block_size
    by_four = blocks % 4 == 0 and form.nested_block_size % 4 == 0
    if not by_four or scales[0].data_ptr() % (4 * scales[0].element_size()):
        return Fit("needs a multiple of four blocks in a row, and of quantised scales in a block")
    return Fit(_nf4_read_miss(x, codes, form), _nf4_slower(x, form.rows, True))


def nf4_dx_fit(dy: Tensor, codes: Tensor, form: Form, rng_state: Tensor | None) -> Fit:
    """How the tensors suit it for dX, which takes scales one by one."""
    if rng_state is not None:
        return Fit("has no dropout: g A is dropped over a weight in floats")
    return Fit(_nf4_read_miss(dy, codes, form), _nf4_slower(dy, form.cols, False))


def _nf4_read_miss(x: Tensor, codes: Tensor, form: Form) -> str | None:
    """Why TMA cannot read the operands."""
    overlap = x.shape[0] > 1 and x.stride(0) < x.shape[1]
    return _nf4_miss(x, codes, form) or ("x's rows overlap" if overlap else None)


def nf4_linear(
    op: str,
    x: Tensor,
    codes: Tensor,
    scales: Sequence[Tensor],
    form: Form,
    a: Tensor | None,
    b: Tensor | None,
    h: Tensor | None,
    bias: Tensor | None,
    scaling: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(y, h) over a 4-bit weight by ``nf4_few`` or ``nf4_gemm``. With ``a`` it makes h, if ``nf4_makes_h``; else it takes
    the ``h`` given, and h comes back with shape [0]."""
    count(op, "cuda")
    rest = a, b, h, _bias_like(bias, x), _float32(scaling), scale
    weight = _nf4_weight(codes, scales, form, form.rows)
    if op == "nf4_few":
        y, made = torch.ops.fastlora._nf4_linear_sm80(x, *weight, *rest, None)
    else:
        y, made = torch.ops.fastlora._nf4_linear_sm90(x, *weight, *rest, None)
    return y, made


def nf4_dx(
    dy: Tensor,
    codes: Tensor,
    scales: Sequence[Tensor],
    form: Form,
    g: Tensor | None,
    a: Tensor | None,
) -> Tensor:
    """dX = dY W + g A over a 4-bit weight; g and ``a`` [r, K] are given, or neither."""
    count("nf4_dx", "cuda")
    if a is not None:
        a = (a if a.dtype == torch.float32 else a.to(dy.dtype)).contiguous()
        a = a.clone() if a.data_ptr() % 8 else a
    weight = _nf4_weight(codes, scales, form, form.cols)
    return torch.ops.fastlora._nf4_dx_sm90(dy, *weight, a, g, None)


def nf4_makes_h(x: Tensor, a: Tensor, b: Tensor, rng_state: Tensor | None) -> bool:
    """Whether csrc/nf4 makes h itself, and ``down`` is not needed."""
    return rng_state is None and _nf4_factors_miss(x, a, b) is None


def _nf4_weight(
    codes: Tensor, scales: Sequence[Tensor], form: Form, columns: int
) -> tuple[object, ...]:
    """A weight as the library's ops take it, which make a result of so many columns."""
    nested = scales[1:] or (None, None, None)
    sizes = columns, form.block_size, form.nested_block_size or 1, form.fp4
    return codes, scales[0], *nested, *sizes


def _rows_miss(name: str, t: Tensor, along: int) -> str | None:
    """Why TMA cannot read the matrix by contiguous lines along dimension ``along``."""
    if t.stride(along) != 1 and t.shape[along] != 1:
        return f"{name} is not contiguous along dimension {along}"
    if t.shape[1 - along] != 1 and t.stride(1 - along) < t.shape[along]:
        return f"{name}'s lines overlap"
    if t.data_ptr() % 16 or (t.stride(1 - along) % 8 and t.shape[1 - along] != 1):
        return f"{name} must start at, and have lines apart by, multiples of 16 bytes"
    return None


def gemm_fit(x: Tensor, w: Tensor, h: Tensor | None, l: Tensor | None, words: Tensor | None) -> Fit:
    """How the tensors of a gemm suit csrc/gemm/sm90.cu."""
    m, k = x.shape
    n = w.shape[0]
    if k == 0 or n % 8 or max(m, n, k) > 2**31 - 1024:
        return Fit(f"needs K >= 1, N a multiple of 8 and sizes below 2^31, got {(m, n, k)}")
    if (h is None) != (l is None):
        return Fit("h and l come together")
    along = 1 if w.stride(1) == 1 else 0
    miss = _rows_miss("x", x, 1) or _rows_miss("w", w, along)
    if h is not None and l is not None and h.shape[1]:
        if l.dtype != x.dtype:
            return Fit(f"l is {l.dtype} beside {x.dtype}")
        miss = miss or _rows_miss("h", h, 1) or _rows_miss("l", l, along)
    return Fit(miss, _slower(m, n, words))


def _slower(m: int, n: int, words: Tensor | None) -> str | None:
    """Where the Triton kernel was measured faster (benchmarks/NOTES.md)."""
    if m <= 64 or -(-m // 128) * -(-n // 256) < 100:
        return "with this few tiles the Triton kernel is faster: this one does not split K"
    if m > 4096 or (words is not None and m > 1024):
        return "with this many rows the Triton kernel is as fast, and faster with a mask"
    return None


def gemm(
    x: Tensor,
    w: Tensor,
    h: Tensor | None,
    l: Tensor | None,
    bias: Tensor | None,
    words: Tensor | None,
    config: list[int] | None = None,
) -> Tensor:
    """``reference.gemm`` by csrc/gemm. ``config`` is a flat ``fastlora._core.TileConfig`` (for sweeps)."""
    count("gemm", "cuda")
    return torch.ops.fastlora._gemm_sm90(x, w, h, l, _bias_like(bias, x), words, config)


def _bias_like(bias: Tensor | None, x: Tensor) -> Tensor | None:
    if bias is None:
        return None
    bias = bias.to(x.dtype).contiguous()
    return bias.clone() if bias.data_ptr() % 4 else bias


# ---- csrc/lora: a linear with everything low-rank around it, in one launch a direction -----------------------
# csrc/few: for few rows y and h, or dX and g, in one launch.


def _few(m: int, columns: int, r: int, drops: bool) -> bool:
    """Whether csrc/few is for this product: what it makes of 64 rows x 128 columns fits the SMs at once, or nearly."""
    return not drops and r <= 64 and (m <= 128 or -(-m // 64) * -(-columns // 128) <= 132)


def _lora_slower(m: int, columns: int, backward: bool, drops: bool) -> str | None:
    """Where the ops one by one were measured faster (benchmarks/NOTES.md)."""
    tiles = -(-m // 256) * -(-columns // 256)  # for 66 pairs of SMs
    if tiles < 48 or 58 < tiles < 100:
        return "with this few tiles, and no SMs that would be idle, the ops one by one are faster"
    if drops and (not backward or tiles < 300):
        return "with dropout the ops one by one are faster here"
    return None


def _few_slower(m: int, columns: int, factor: Tensor, r: int) -> str | None:
    """``factor``: the one that meets x (dY) first."""
    if r > 16 and factor.dtype == torch.float32 and (m > 64 or columns > 8192):
        return "rounding so many float32 ranks for every tile takes longer than the ops one by one"
    return None


def dx_fit(dy: Tensor, w: Tensor, a: Tensor, b: Tensor, rng_state: Tensor | None) -> Fit:
    """How dX and g suit csrc/few by themselves."""
    m, k, r = dy.shape[0], w.shape[1], a.shape[0]
    if not _few(m, k, r, rng_state is not None):
        return Fit("is for few rows, ranks up to 64 and no dropout")
    slower = _few_slower(m, k, b, r)
    if k > 8192:
        slower = "with this many columns the ops one by one are faster"
    return Fit(lora_fit(dy, w, a, b, None, backward=True).miss, slower)


def lora_dx(
    dy: Tensor, w: Tensor, a: Tensor, b: Tensor, scaling: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(dX [M, K], g [M, r]) of few rows in one launch."""
    count("lora_dx", "cuda")
    few = torch.ops.fastlora._lora_few_sm90
    dx, g = few(dy, w, a, b, None, _float32(scaling), scale, True, None)
    return dx, g


def lora_fit(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    rng_state: Tensor | None,
    *,
    backward: bool = False,
    h: Tensor | None = None,
    saved_x: Tensor | None = None,
) -> Fit:
    """How a linear suits csrc/lora or csrc/few. Backward ``x`` is dY, and ``saved_x`` and h are there if asked for."""
    n, k = w.shape
    m, r = x.shape[0], a.shape[0]
    if rng_state is not None and r > 64:
        return Fit(f"takes ranks up to 64 with dropout, got {r}")
    if m == 0 or n % 8 or k % 8 or r % 8 or not n * k * r or max(m, n, k) > 2**31 - 1024:
        return Fit(
            f"needs rows, N, K and ranks in multiples of 8, and sizes below 2^31, got {(m, n, k, r)}"
        )
    drops = rng_state is not None
    if not backward and _few(m, n, r, drops):
        slower = _few_slower(m, n, a, r)
    else:
        slower = _lora_slower(m, k if backward else n, backward, drops)
    tensors = [t for t in (x, w, a, b, h, saved_x) if t is not None]
    if (
        all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors)
        and a.dtype in (x.dtype, torch.float32)
        and b.dtype in (x.dtype, torch.float32)
    ):
        return Fit(None, slower)  # the usual case, which is worth few microseconds
    miss = _rows_miss("x", x, 1) or _rows_miss("w", w, 1)
    for name, factor in (("lora_A", a), ("lora_B", b)):
        if factor.dtype == torch.float32:
            if not factor.is_contiguous() or factor.data_ptr() % 16:
                miss = miss or f"{name} in float32 must be contiguous and start at a multiple of 16"
        elif factor.dtype != x.dtype:
            miss = miss or f"{name} is {factor.dtype} beside {x.dtype}"
        else:
            miss = miss or _rows_miss(name, factor, 1)
    for name, saved in (("x", saved_x), ("h", h)):
        if saved is not None:
            miss = miss or _rows_miss(name, saved, 1)
    return Fit(miss, slower)


def _float32(scaling: Tensor | None) -> Tensor | None:
    return None if scaling is None else scaling.float()


def lora_forward(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: Tensor | None,
    scale: float,
    rng_state: Tensor | None = None,
    keep: int = KEEP_ALL,
    config: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, h) in one launch. ``config`` as in ``gemm``."""
    count("lora_forward", "cuda")
    bias = _bias_like(bias, x)
    if config is None and _few(x.shape[0], w.shape[0], a.shape[0], rng_state is not None):
        few = torch.ops.fastlora._lora_few_sm90
        y, h = few(x, w, a, b, bias, _float32(scaling), scale, False, None)
        return y, h
    run = torch.ops.fastlora._lora_forward_sm90
    y, h = run(x, w, a, b, bias, _float32(scaling), scale, rng_state, keep, config)
    return y, h


def scaled_fit(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Fit:
    """How a linear suits csrc/lora where its columns are scaled as they are stored; csrc/few has no such store."""
    fit = lora_fit(x, w, a, b, None)
    if _few(x.shape[0], w.shape[0], a.shape[0], False):
        return Fit(fit.miss, "few rows are csrc/few's, and the scale a pass of its own")
    return fit


def lora_scaled(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: Tensor | None,
    scale: float,
    factor: Tensor,
    with_z: bool,
    config: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h, z) in one launch; z of shape [0] where it is not asked for. ``config`` as in ``gemm``."""
    count("lora_scaled", "cuda")
    run = torch.ops.fastlora._lora_scaled_sm90
    columns = factor.float().contiguous()  # fp64 over a base in fp64 that autocast made 16 bits
    rest = _bias_like(bias, x), _float32(scaling), scale, columns, with_z, config
    y, h, z = run(x, w, a, b, *rest)
    return y, h, z


def lora_backward(
    dy: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    scaling: Tensor | None,
    scale: float,
    dtype_bias: torch.dtype | None,
    rng_state: Tensor | None = None,
    keep: int = KEEP_ALL,
    config: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dX, dA, dB, dbias) in one launch; shape [0] without x, without h, without a dtype."""
    count("lora_backward", "cuda")
    wide = dtype_bias is not None and dtype_bias != dy.dtype  # rounded once, from fp32
    run = torch.ops.fastlora._lora_backward_sm90
    biased = dtype_bias is not None
    dx, d_a, d_b, d_bias = run(
        dy, w, a, b, x, h, _float32(scaling), scale, rng_state, keep, biased, wide, config
    )
    return dx, d_a, d_b, d_bias if dtype_bias is None else d_bias.to(dtype_bias)
