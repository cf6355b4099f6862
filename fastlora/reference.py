"""Every op in plain torch: the specification, the fallback on any device, and the oracle of the tests.

Run on fp64 inputs these functions are the truth the kernels are measured against; run on the caller's dtype they
are the ``torch`` backend. Shapes: x [M, K], w [N, K], lora_a [r, K], lora_b [N, r].

    down   h  = scale * drop(x) l^T               [M, r]
    gemm   y  = x w^T + bias + drop(h l^T)        [M, N]
    wgrad  dA = g^T drop(x) [r, K],  dB = dy^T h [N, r],  dbias = sum_m dy [N]
    mask   the dropout mask of ``fastlora.rng``, as words that the other three take

    bottleneck_down            p = x l^T + bias,  a = act(p)            [M, r]
    bottleneck_down_backward   g = (dY l^T) * act'(p),  a = act(p)      [M, r]
    bottleneck_up              y = residual + h l^T + bias              [M, N]

``segment_*`` are the same for runs of rows with a factor of their own: l [E, ., .], segment e of rows bounds[e] to
bounds[e + 1]. They loop over segments, and on a GPU wait for bounds.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from . import rng
from .activations import KINDS

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_MASK32 = 0xFFFFFFFF


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _LOW_PRECISION else dtype


# ---- dropout -------------------------------------------------------------------------------------------------


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """32x32 -> (high, low) words, in int64 whose products wrap: the right bits survive."""
    product = b * a
    return (product >> 32) & _MASK32, product & _MASK32


def philox(rng_state: Tensor, rows: int, calls: int) -> Tensor:
    """Philox4x32-7 outputs for every (row, call): int64 [rows, calls, 4], each word in 0..2^32-1."""
    seed, offset = rng_state[0], rng_state[1]
    key0, key1 = seed & _MASK32, (seed >> 32) & _MASK32
    shape, device = (rows, calls), rng_state.device
    c0 = (offset & _MASK32).expand(shape)
    c1 = ((offset >> 32) & _MASK32).expand(shape)
    c2 = torch.arange(calls, device=device).expand(shape)
    c3 = torch.arange(rows, device=device)[:, None].expand(shape)
    for _ in range(7):
        hi0, lo0 = _mulhilo(0xD2511F53, c0)
        hi1, lo1 = _mulhilo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ key0, lo1, hi0 ^ c3 ^ key1, lo0
        key0, key1 = (key0 + 0x9E3779B9) & _MASK32, (key1 + 0xBB67AE85) & _MASK32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def mask(rng_state: Tensor, rows: int, cols: int, keep: int) -> Tensor:
    """The dropout mask of ``fastlora.rng``: int32 words of ``rng.mask_shape``, a set bit where an element is kept."""
    unit_rows, unit_cols = rng.mask_shape(rows, cols)
    planes = philox(rng_state, unit_rows, 4 * unit_cols).view(unit_rows, unit_cols, 16)
    carry = torch.zeros_like(planes[:, :, 0])
    for i in range(16):  # number + keep, 32 elements at a time
        plane = planes[:, :, i]
        carry = (plane | carry) if keep >> i & 1 else (plane & carry)
    if keep == rng.KEEP_ALL:
        carry = torch.full_like(carry, _MASK32)
    return torch.where(carry >= 2**31, carry - 2**32, carry).to(torch.int32)


def unpack_mask(words: Tensor, rows: int, cols: int) -> Tensor:
    """Mask words -> bool [rows, cols]."""
    unit_rows, unit_cols = words.shape
    element = torch.arange(32, dtype=torch.int32, device=words.device).view(4, 1, 1, 8)
    bits = (words.view(unit_rows // 8, 1, 8, unit_cols, 1) >> element) & 1
    return bits.view(4 * unit_rows, 8 * unit_cols)[:rows, :cols].bool()


def _drop(x: Tensor, words: Tensor | None) -> Tensor:
    return x if words is None else torch.where(unpack_mask(words, *x.shape), x, 0)


# ---- the three op families -----------------------------------------------------------------------------------


def down(
    x: Tensor, l: Tensor, scaling: Tensor | None, scale: float, words: Tensor | None = None
) -> Tensor:
    """h = scale * [scaling] * drop(x) l^T, accumulated in fp32 and rounded once: [M, r] in x's dtype."""
    acc = _accumulator(x.dtype)
    h = _drop(x, words).to(acc) @ l.to(x.dtype).to(acc).t()
    h = h * scale if scaling is None else h * (scaling.to(acc) * scale)
    return h.to(x.dtype)


def gemm(
    x: Tensor,
    w: Tensor,
    h: Tensor | None,
    l: Tensor | None,
    bias: Tensor | None,
    words: Tensor | None = None,
) -> Tensor:
    """y = x w^T + bias + drop(h l^T): [M, N] in x's dtype. ``words`` mask the low-rank term only."""
    y = torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))
    if h is None or l is None or h.shape[1] == 0:
        return y
    l_t = l.to(x.dtype).t()
    return y.addmm_(h, l_t) if words is None else y.add_(_drop(h @ l_t, words))


def wgrad(
    x: Tensor | None,
    g: Tensor | None,
    dy: Tensor | None,
    h: Tensor | None,
    words: Tensor | None,
    dtype_a: torch.dtype,
    dtype_b: torch.dtype,
    dtype_bias: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dA [r, K], dB [N, r], dbias [N]); each is None where its inputs (or its dtype) are."""
    d_a = d_b = d_bias = None
    if x is not None and g is not None:
        acc = _accumulator(x.dtype)
        d_a = (g.to(acc).t() @ _drop(x, words).to(acc)).to(dtype_a)
    if dy is not None and h is not None:
        acc = _accumulator(dy.dtype)
        d_b = (dy.to(acc).t() @ h.to(acc)).to(dtype_b)
    if dy is not None and dtype_bias is not None:
        d_bias = dy.sum(0, dtype=_accumulator(dy.dtype)).to(dtype_bias)
    return d_a, d_b, d_bias


# ---- bottlenecks: torch's own products -----------------------------------------------------------------------


def bottleneck_down(
    x: Tensor, l: Tensor, bias: Tensor, kind: str, both: bool
) -> tuple[Tensor, Tensor | None]:
    """(act(p), and with ``both`` p) of p = x l^T + bias: [M, r] in x's dtype."""
    p = torch.nn.functional.linear(x, l.to(x.dtype), bias.to(x.dtype))
    a = KINDS[kind].forward(p)
    return a, p if both else None


def bottleneck_down_backward(
    dy: Tensor, l: Tensor, p: Tensor, kind: str, both: bool
) -> tuple[Tensor, Tensor | None]:
    """((dy l^T) * act'(p), and with ``both`` act(p)): [M, r] in dy's dtype."""
    act = KINDS[kind]
    return act.backward(dy @ l.to(dy.dtype).t(), p), act.forward(p) if both else None


def bottleneck_up(h: Tensor, l: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """residual + h l^T + bias: [M, N] in residual's dtype, without one in h's."""
    y = torch.nn.functional.linear(h, l.to(h.dtype), None if bias is None else bias.to(h.dtype))
    # y comes first: of the two it gives the sum its strides.
    return y if residual is None else torch.add(y, residual).to(residual.dtype)


# ---- segments: rows bounds[e]..bounds[e + 1] have the factors e ----------------------------------------------


def segment_bounds(offsets: Tensor, rows: int) -> Tensor:
    """Offsets of any values -> int32 of 0..rows that never decrease: what every kernel goes by."""
    return offsets.long().clamp(0, rows).cummax(0).values.to(torch.int32)


def _segments(bounds: Tensor) -> list[tuple[int, slice]]:
    """(e, its rows) of the segments that have any."""
    pairs = enumerate(itertools.pairwise(bounds.tolist()))
    return [(e, slice(begin, end)) for e, (begin, end) in pairs if begin < end]


def segment_down(
    x: Tensor,
    l: Tensor,
    bounds: Tensor,
    scalings: Tensor | None,
    scale: float,
    words: Tensor | None = None,
) -> Tensor:
    """h = scale * [scalings[e]] * drop(x) l[e]^T, l [E, r, K]: [M, r], zero in rows of no segment."""
    h = x.new_zeros(x.shape[0], l.shape[1])
    dropped = _drop(x, words)
    for e, rows in _segments(bounds):
        h[rows] = down(dropped[rows], l[e], None if scalings is None else scalings[e], scale)
    return h


def segment_up(
    h: Tensor, l: Tensor, bounds: Tensor, words: Tensor | None = None, y: Tensor | None = None
) -> Tensor:
    """y += drop(h l[e]^T), l [E, N, r], in place; without y the term alone, zero in rows of no segment: [M, N]."""
    if y is None:
        y = h.new_zeros(h.shape[0], l.shape[1])
    kept = None if words is None else unpack_mask(words, *y.shape)
    for e, rows in _segments(bounds):
        low = h[rows] @ l[e].to(h.dtype).t()
        y[rows] += low if kept is None else torch.where(kept[rows], low, 0)
    return y


def segment_wgrad(
    x: Tensor | None,
    g: Tensor | None,
    dy: Tensor | None,
    h: Tensor | None,
    bounds: Tensor,
    words: Tensor | None,
    dtype_a: torch.dtype,
    dtype_b: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """(dA [E, r, K], dB [E, N, r]) of each segment's rows, zero where it has none; None where their inputs are."""
    count = bounds.shape[0] - 1
    d_a = d_b = None
    if x is not None and g is not None:
        d_a = x.new_zeros(count, g.shape[1], x.shape[1], dtype=dtype_a)
        x = _drop(x, words)
    if dy is not None and h is not None:
        d_b = dy.new_zeros(count, dy.shape[1], h.shape[1], dtype=dtype_b)
    for e, rows in _segments(bounds):
        cut_x, cut_g, cut_dy, cut_h = (None if t is None else t[rows] for t in (x, g, dy, h))
        a_e, b_e, _ = wgrad(cut_x, cut_g, cut_dy, cut_h, None, dtype_a, dtype_b, None)
        if d_a is not None and a_e is not None:
            d_a[e] = a_e
        if d_b is not None and b_e is not None:
            d_b[e] = b_e
    return d_a, d_b


# ---- public functions ----------------------------------------------------------------------------------------


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor = 1.0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    keep: int = rng.KEEP_ALL,
) -> Tensor:
    """``fastlora.lora_linear`` by its formula, differentiable by torch itself: the oracle of forward and backward.

    ``mask`` (bool, broadcastable to x) and ``keep`` state the dropout explicitly.
    """
    dropped = x if mask is None else torch.where(mask, x, 0) * rng.keep_scale(keep)
    base = torch.nn.functional.linear(x, weight, bias)
    return base + (dropped @ lora_a.to(x.dtype).t()) @ lora_b.to(x.dtype).t() * scaling


def lora_linear_segments(
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    offsets: Tensor,
    scalings: float | Tensor = 1.0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    keep: int = rng.KEEP_ALL,
) -> Tensor:
    """``fastlora.lora_linear_segments`` by its formula, likewise."""
    flat = x.reshape(-1, x.shape[-1])
    dropped = flat if mask is None else torch.where(mask, flat, 0) * rng.keep_scale(keep)
    low = dropped.new_zeros(flat.shape[0], lora_b.shape[1])
    parts, end = [], 0
    for e, rows in _segments(offsets):
        scaling = scalings[e] if isinstance(scalings, Tensor) else scalings
        part = (dropped[rows] @ lora_a[e].to(x.dtype).t()) @ lora_b[e].to(x.dtype).t() * scaling
        parts += [low[end : rows.start], part]
        end = rows.stop
    y = torch.cat([*parts, low[end:]])
    if weight is not None:
        y = y + torch.nn.functional.linear(flat, weight, bias)
    return y.view(*x.shape[:-1], lora_b.shape[1])


def row_norms(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: Tensor | None,
    scale: float,
    magnitude: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """||W_n + s B_n A|| of weight [N, K], A [r, K], B [N, r] and s = scale * [scaling]: fp32 [N], fp64 over fp64; and of
    ``magnitude`` [N] what it is over them, zero where they are."""
    out = torch.promote_types(weight.dtype, torch.float32)
    s = scale if scaling is None else scale * scaling.double()
    a, slabs = lora_a.double(), []
    for w, b in zip(weight.split(1024), lora_b.split(1024), strict=True):
        slabs.append(torch.linalg.vector_norm(w.double() + (b.double() @ a) * s, dim=1).to(out))
    norms = torch.cat(slabs)
    if magnitude is None:
        return norms, None
    return norms, _column_factors(norms, magnitude, norms).to(out)


def scaled_gemm(
    x: Tensor, w: Tensor, h: Tensor, l: Tensor, bias: Tensor | None, factor: Tensor
) -> Tensor:
    """y = bias + factor * (x w^T + h l^T), ``factor`` [N]: [M, N] in x's dtype."""
    return scale_columns(gemm(x, w, h, l, None), factor, None, bias)


def _column_factors(z: Tensor, magnitude: Tensor, norm: Tensor | None) -> Tensor:
    wide = torch.promote_types(torch.promote_types(z.dtype, magnitude.dtype), torch.float32)
    if norm is None:
        return magnitude.to(wide)
    return torch.where(norm > 0, magnitude.to(wide) / norm.to(wide), 0)


def scale_columns(
    z: Tensor, magnitude: Tensor, norm: Tensor | None = None, rest: Tensor | None = None
) -> Tensor:
    """y = rest + c * z [M, N] in z's dtype, rounded once: c = magnitude / norm [N], zero where the norm is, or without a norm
    magnitude; rest [N] or [M, N]. Nothing of z's size is made in the factors' dtype."""
    factor, y = _column_factors(z, magnitude, norm), torch.empty(z.shape, dtype=z.dtype, device=z.device)  # fmt: skip
    return torch.mul(z, factor, out=y) if rest is None else torch.addcmul(rest, z, factor, out=y)


def scale_columns_backward(
    dy: Tensor,
    z: Tensor | None,
    magnitude: Tensor,
    norm: Tensor | None,
    need_z: bool,
    need_sums: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(c * dY, sum_m dY * z [/ norm] in magnitude's dtype, sum_m dY in fp32 or fp64); None what is not asked for, the second
    without z."""
    factor = _column_factors(dy, magnitude, norm)
    dz = scale_columns(dy, magnitude, norm) if need_z else None
    d_magnitude = None
    if z is not None:
        total = torch.zeros_like(factor)
        for left, right in zip(dy.split(1024), z.split(1024), strict=True):
            total += (left.to(factor.dtype) * right).sum(0)
        if norm is not None:
            total = torch.where(norm > 0, total / norm, 0)
        d_magnitude = total.to(magnitude.dtype)
    sums = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)) if need_sums else None
    return dz, d_magnitude, sums


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    scaling: float | Tensor = 1.0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    keep: int = rng.KEEP_ALL,
) -> Tensor:
    """DoRA (arXiv 2402.09353) by PEFT's formula: W x + bias + (c - 1) W x' + c s B A x' of x' = drop(x), with c =
    magnitude / ||W + s B A|| by rows, whose norm is a constant in backward. A row of zeros has c = 0.

    ``mask`` and ``keep`` as in ``lora_linear``.
    """
    dropped = x if mask is None else torch.where(mask, x, 0) * rng.keep_scale(keep)
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    norm = torch.linalg.vector_norm(weight + (b @ a) * scaling, dim=1).detach()
    factor = torch.where(norm > 0, magnitude.to(x.dtype) / norm, 0)
    base = torch.nn.functional.linear(x, weight, bias)
    scaled = torch.nn.functional.linear(dropped, weight)
    update = (dropped @ a.t()) @ b.t() * scaling
    return base + (factor - 1) * scaled + factor * update


# ---- NF4 (QLoRA, arXiv 2305.14314; laid out as bitsandbytes stores it) ---------------------------------------

NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NF4_THRESHOLD = (
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544,
    -0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767,
    0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683,
    0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
)  # fmt: skip


FP4_CODE = tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))


def code_values(fp4: bool = False) -> Tensor:
    """The values of the 16 codes, fp32."""
    return torch.tensor(FP4_CODE if fp4 else NF4_CODE, dtype=torch.float32, device="cpu")


def quantize_nf4(weight: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Weight [N, K] -> (packed uint8 [ceil(N K / 2)], absmax fp32 [ceil(N K / block_size)]).

    Blocks run along the row-major flattening; element 2j sits in the high nibble of byte j. A block of zeros gets
    code 7 (0.0), as bitsandbytes does on CPU. NaN gets code 0, and takes no part in absmax.
    """
    flat = weight.detach().reshape(-1).float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
    absmax = torch.where(blocks.isnan(), 0, blocks.abs()).amax(1)
    scaled = blocks * (1.0 / absmax.clamp_min(1e-38))[:, None]
    code = torch.zeros_like(scaled, dtype=torch.uint8)
    for threshold in NF4_THRESHOLD:
        code += scaled > threshold
    code = code.view(-1)[: flat.numel()]
    code = torch.nn.functional.pad(code, (0, flat.numel() % 2), value=7)
    return (code[0::2] << 4) | code[1::2], absmax


def quantize_scales(values: Tensor, code: Tensor, block_size: int = 256) -> tuple[Tensor, Tensor]:
    """Scales less their offset -> (the nearest of 256 sorted codes, uint8 of values' shape; absmax of each block).

    Where all of a block are zero, 0 / 0 is, and gets code 0, which its absmax makes zero again.
    """
    flat = values.reshape(-1).float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
    absmax = torch.where(blocks.isnan(), 0, blocks.abs()).amax(1)
    x = (blocks * (1.0 / absmax)[:, None]).view(-1)[: flat.numel()]
    below, above, pivot = (torch.full_like(x, i, dtype=torch.long) for i in (0, 255, 127))
    for step in (64, 32, 16, 8, 4, 2, 1):
        right = x > code[pivot]
        below, above = torch.where(right, pivot, below), torch.where(right, above, pivot)
        pivot = torch.where(right, pivot + step, pivot - step)
    up = x > (code[above] + code[pivot]) * 0.5
    down = x < (code[below] + code[pivot]) * 0.5
    nearest = torch.where(
        x > code[pivot], torch.where(up, above, pivot), torch.where(down, below, pivot)
    )
    return nearest.to(torch.uint8).view(values.shape), absmax


def dequantize_scales(
    codes: Tensor, nested_absmax: Tensor, code: Tensor, offset: Tensor, block_size: int
) -> Tensor:
    """code[q] * nested_absmax + offset in fp32, rounded after each: of codes' shape."""
    flat = codes.reshape(-1)
    scale = nested_absmax.repeat_interleave(block_size)[: flat.numel()]
    return (code[flat.long()] * scale + offset).view(codes.shape)


def dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    shape: tuple[int, int],
    block_size: int,
    dtype: torch.dtype,
    fp4: bool = False,
) -> Tensor:
    """Packed codes and fp32 absmax -> weight of ``shape``: value[code] * absmax in fp32, rounded once to ``dtype``."""
    numel = shape[0] * shape[1]
    packed = packed.reshape(-1)
    code = torch.stack((packed >> 4, packed & 0xF), dim=-1).view(-1)[:numel].long()
    value = code_values(fp4).to(packed.device)[code]
    scale = absmax.reshape(-1).repeat_interleave(block_size)[:numel]
    return (value * scale).view(shape).to(dtype)
