"""The public functions. They check what they are given, settle dtypes, draw the dropout state and apply a Function."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import ops, rng
from ._autocast import autocast_dtype
from .autograd import DoraLinearFunction, LoraLinearFunction, LoraLinearSegmentsFunction
from .ops.support import MAX_RANK
from .quant import NF4Tensor
from .quant.bitsandbytes import Packed

_MAX_EXTENT = 2**31 - 1024  # rows and columns are counted in 32 bits, elements in 64
_QUANTIZED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """A frozen linear and its low-rank update in one product (LoRA, arXiv 2106.09685).

    ``y = x weight^T + bias + scaling * dropout(x) lora_a^T lora_b^T``, accumulated in fp32 and rounded once.

    Args:
        x: input [..., K]; float32, bfloat16 or float16 (float64 on the torch backend). Any strides, any row count.
        weight: frozen weight [N, K] in x's dtype. Under autocast x, weight and bias are cast to its dtype.
        lora_a: [r, K] in x's dtype or float32; 0 <= r <= 512. Its gradient comes in its own dtype.
        lora_b: [N, r], likewise.
        scaling: a float, or a 0-d tensor on x's device (read there: changing its value recompiles nothing).
        bias: [N] or None; a gradient is computed only where it requires one.
        dropout_p: probability of dropping an element of x on the low-rank path (rounded to a short binary
            fraction, see ``fastlora.rng.keep_threshold``).
        training: dropout applies only when True.

    Returns:
        y [..., N] in the compute dtype (x's, or autocast's).

    Exported programs hold fastlora's ops: ``import fastlora.functional`` registers them where one is loaded.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; the message names it.
        RuntimeError: ``weight`` requires grad; or, in backward, a second derivative is asked for.
    """
    dtype = check_lora_linear(x, weight, lora_a, lora_b, scaling, bias)
    keep, rng_state = _dropout(dropout_p, training, x)
    y: Tensor = LoraLinearFunction.apply(
        x, weight, lora_a, lora_b, scaling, bias, keep, rng_state, dtype
    )
    return y if x.ndim == 2 else y.view(*x.shape[:-1], weight.shape[0])


def qlora_linear(
    x: Tensor,
    qweight: NF4Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """``lora_linear`` over a frozen 4-bit weight (QLoRA, arXiv 2305.14314).

    ``y = x W^T + bias + scaling * dropout(x) lora_a^T lora_b^T``, W = ``qweight.dequantize()`` in the compute dtype, for
    as long as its product takes: it is never saved, and made again in backward. Where a kernel multiplies by the codes as
    they lie (``fastlora.explain`` tells) there is no W at all; ``FASTLORA_OFF=nf4_codes`` keeps to the formula bit for bit.

    Args:
        x: input [..., K]; float32, bfloat16 or float16. Autocast's dtype, or else x's, is the compute dtype, whatever
            dtype the weight once had.
        qweight: ``fastlora.NF4Tensor`` of shape (N, K).
        lora_a, lora_b, scaling, bias, dropout_p, training: as in ``lora_linear``.

    Returns:
        y [..., N] in the compute dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; the message names it.
        RuntimeError: in backward, a second derivative is asked for.
    """
    if not isinstance(qweight, NF4Tensor):
        raise TypeError(
            f"qweight: got {type(qweight).__name__}; accepted is a fastlora.NF4Tensor (NF4Tensor.quantize(weight) makes one)"
        )
    return packed_linear(x, qweight, lora_a, lora_b, scaling, bias, dropout_p, training)


def packed_linear(
    x: Tensor,
    qweight: NF4Tensor | Packed,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    bias: Tensor | None,
    dropout_p: float,
    training: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``qlora_linear`` over a weight that may be without its module, in a compute dtype that may be told: x is saved as it
    came whatever it is, and y has it."""
    dtype = _check_packed(x, qweight, lora_a, lora_b, scaling, bias, dtype)
    keep, rng_state = _dropout(dropout_p, training, x)
    y: Tensor = LoraLinearFunction.apply(
        x,
        qweight.codes,
        lora_a,
        lora_b,
        scaling,
        bias,
        keep,
        rng_state,
        dtype,
        qweight.form,
        *qweight.scales,
    )
    return y if x.ndim == 2 else y.view(*x.shape[:-1], qweight.shape[0])


def dora_linear(
    x: Tensor,
    weight: Tensor | NF4Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    magnitude: Tensor,
    columns: Callable[[], tuple[Tensor, Tensor]],
    bias: Tensor | None,
) -> Tensor:
    """bias + c (x W^T + scaling x lora_a^T lora_b^T) of a DoRA adapter without dropout, the scale in the product's own tiles
    where a kernel does that; arguments and errors as of ``lora_linear`` or ``qlora_linear``.

    Args:
        magnitude: m [N].
        columns: makes ||W + s B A|| by rows and c = magnitude / norm, two [N] in fp32 or fp64, which are constants; called once
            all arguments are checked.
    """
    if isinstance(weight, NF4Tensor):
        dtype = _check_packed(x, weight, lora_a, lora_b, scaling, bias)
        base = weight.codes, lora_a, lora_b, scaling, dtype, weight.form, *weight.scales
    else:
        dtype = check_lora_linear(x, weight, lora_a, lora_b, scaling, bias)
        base = weight, lora_a, lora_b, scaling, dtype
    if magnitude.shape != weight.shape[:1]:
        raise ValueError(
            f"magnitude: got shape {tuple(magnitude.shape)}; accepted is [{weight.shape[0]}]"
        )
    norm, factor = columns()
    keep_z = magnitude.requires_grad and torch.is_grad_enabled()
    y: Tensor = DoraLinearFunction.apply(magnitude, norm, factor, bias, keep_z, x, *base)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], weight.shape[0])


def _check_packed(
    x: Tensor,
    qweight: NF4Tensor | Packed,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    bias: Tensor | None,
    dtype: torch.dtype | None = None,
) -> torch.dtype:
    """Raises what ``qlora_linear`` does; the compute dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}; accepted is a torch.Tensor")
    if x.dtype not in _QUANTIZED_DTYPES:
        raise ValueError(
            f"x: got {x.dtype}; accepted beside a 4-bit weight are {', '.join(map(str, _QUANTIZED_DTYPES))}"
        )
    dtype = dtype or autocast_dtype(x.device) or x.dtype
    _check(x, qweight.shape, qweight.device, lora_a, lora_b, scaling, bias, dtype)
    return dtype


def lora_linear_segments(
    x: Tensor,
    weight: Tensor | NF4Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    offsets: Tensor,
    scalings: float | Tensor = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """``lora_linear`` or ``qlora_linear`` whose rows use different adapters, or none, in inference and training.

    ``y = x W^T + bias + scalings[e] * dropout(x) lora_a[e]^T lora_b[e]^T`` in rows ``offsets[e]`` to ``offsets[e + 1]``;
    without the last term in rows before ``offsets[0]`` and from ``offsets[E]`` on. On Triton there is no loop over
    adapters and nothing waits for the device: a CUDA graph may be replayed with other offsets. The torch backend loops,
    and on a GPU waits for offsets.

    Args:
        x: input [..., K], whose leading dimensions are taken as M rows in order; dtypes as in ``lora_linear``
            (``qlora_linear`` over a 4-bit weight).
        weight: frozen weight [N, K], a ``fastlora.NF4Tensor``, or None: y is the last term alone.
        lora_a: [E, r, K] in x's dtype or float32; 0 <= r <= 512. Its gradient comes in its own dtype, zero where an
            adapter has no rows.
        lora_b: [E, N, r], likewise.
        offsets: integers [E + 1] on x's device that never decrease, from 0 to M. Wrong values raise ValueError on the
            CPU; on a GPU they are clamped there to 0..M and to what came before them.
        scalings: a float, or a tensor [E] on x's device (read there).
        bias: [N] or None, as in ``lora_linear``; None where weight is.
        dropout_p, training: as in ``lora_linear``.

    Returns:
        y [..., N] in the compute dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; the message names it.
        RuntimeError: ``weight`` requires grad; or, in backward, a second derivative is asked for.
    """
    base: Tensor | None
    form: tuple[object, ...] = ()
    if isinstance(weight, NF4Tensor):
        dtype = _compute_dtype(x, None, _QUANTIZED_DTYPES)
        base, form = weight.codes, (weight.form, *weight.scales)
    else:
        dtype, base = _compute_dtype(x, weight), weight
        if weight is not None:
            _check_weight(weight)
    count = lora_a.shape[0] if isinstance(lora_a, Tensor) and lora_a.ndim == 3 else "E"
    if weight is None:
        if bias is not None:
            raise ValueError("bias: got one where weight is None; accepted is None: add it to y")
        if not isinstance(lora_b, Tensor) or lora_b.ndim != 3:
            got = tuple(lora_b.shape) if isinstance(lora_b, Tensor) else type(lora_b).__name__
            raise ValueError(f"lora_b: got {got}; accepted is a tensor [E, N, r]")
        shape, device = torch.Size((lora_b.shape[1], x.shape[-1] if x.ndim else 0)), x.device
    else:
        shape, device = weight.shape, weight.device
    _check(x, shape, device, lora_a, lora_b, scalings, bias, dtype, (count,))
    _check_offsets(offsets, count, x.device)
    bounds = ops.segment_bounds(offsets, math.prod(x.shape[:-1]))
    keep, rng_state = _dropout(dropout_p, training, x)
    y: Tensor = LoraLinearSegmentsFunction.apply(
        x, base, lora_a, lora_b, bounds, scalings, bias, keep, rng_state, dtype, *form
    )
    return y if x.ndim == 2 else y.view(*x.shape[:-1], shape[0])


def check_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    bias: Tensor | None,
) -> torch.dtype:
    """The compute dtype of ``lora_linear``, which raises as this does."""
    dtype = _compute_dtype(x, weight)
    _check_weight(weight)
    _check(x, weight.shape, weight.device, lora_a, lora_b, scaling, bias, dtype)
    return dtype


def _dropout(p: float, training: bool, x: Tensor) -> tuple[int, Tensor | None]:
    """(keep threshold, a fresh state where something is dropped)."""
    keep = rng.keep_threshold(p)
    if not training:
        keep = rng.KEEP_ALL
    return keep, rng.draw_state(x.device) if 0 < keep < rng.KEEP_ALL else None


def _check_weight(weight: Tensor) -> None:
    if weight.ndim != 2:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}; accepted is [N, K], as in nn.Linear"
        )
    if weight.requires_grad:
        raise RuntimeError(
            "weight: requires grad, but the low-rank update is trained beside a frozen weight; call "
            "weight.requires_grad_(False) (fastlora.get_peft_model does it for a whole model)"
        )


def _compute_dtype(
    x: Tensor, weight: Tensor | None, accepted: tuple[torch.dtype, ...] = _DTYPES
) -> torch.dtype:
    """Autocast's dtype, or else x's, which weight's must be where there is one."""
    for name, value in (("x", x), ("weight", weight)):
        if name == "weight" and value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}; accepted is a torch.Tensor")
        if value.dtype not in accepted:  # autocast must not turn quantised codes into numbers
            raise ValueError(
                f"{name}: got {value.dtype}; accepted are {', '.join(map(str, accepted))}"
            )
    wanted = autocast_dtype(x.device)
    if wanted is not None and x.dtype != torch.float64:  # which autocast leaves alone
        return wanted
    if weight is not None and x.dtype != weight.dtype:
        raise ValueError(
            f"x: got {x.dtype} where weight is {weight.dtype}; accepted is one dtype for both: cast x with "
            f"x.to({weight.dtype}), or run under torch.autocast({x.device.type!r})"
        )
    return x.dtype


def _check(
    x: Tensor,
    shape: torch.Size,
    device: torch.device,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    stack: tuple[int | str, ...] = (),
) -> None:
    """``stack`` is what comes before the factors' own dimensions, and all that scalings have."""
    n, k = shape
    sizes: tuple[object, ...]
    if x.ndim < 1 or x.shape[-1] != k:
        raise ValueError(
            f"x: got shape {tuple(x.shape)}; accepted is [..., {k}], for weight is [{n}, {k}]"
        )
    if n > _MAX_EXTENT or k > _MAX_EXTENT or x.numel() > _MAX_EXTENT * max(k, 1):
        raise ValueError(
            f"x: got shape {tuple(x.shape)} for a weight of [{n}, {k}]; accepted are up to {_MAX_EXTENT} rows and "
            "features: split the batch"
        )
    # Autocast casts whatever it meets; without it, only fp32 master weights may differ from x.
    accepted = (dtype, torch.float32) if autocast_dtype(x.device) is None else _DTYPES
    known = isinstance(lora_a, Tensor) and lora_a.ndim == len(stack) + 2
    rank = lora_a.shape[-2] if known else "r"
    for name, value, sizes in (
        ("lora_a", lora_a, (*stack, rank, k)),
        ("lora_b", lora_b, (*stack, n, rank)),
        ("bias", bias, (n,)),
    ):
        if value is None and name == "bias":
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}; accepted is a torch.Tensor")
        if tuple(value.shape) != sizes:
            wanted = ", ".join(map(str, sizes))
            raise ValueError(f"{name}: got shape {tuple(value.shape)}; accepted is [{wanted}]")
        if value.dtype not in accepted:
            names = ", ".join(map(str, accepted))
            raise ValueError(f"{name}: got {value.dtype}; accepted are {names}: cast it with .to()")
        if value.device != x.device:
            raise ValueError(
                f"{name}: is on {value.device}, x on {x.device}; {_to(value.device, x.device)}"
            )
    if device != x.device:
        raise ValueError(f"weight: is on {device}, x on {x.device}; {_to(device, x.device)}")
    if isinstance(rank, int) and rank > MAX_RANK:
        raise ValueError(f"lora_a: got rank {rank}; accepted are 0 to {MAX_RANK}")
    name, kind = ("scalings", f"tensor of shape {stack}") if stack else ("scaling", "0-d tensor")
    if isinstance(scaling, Tensor):
        if (
            tuple(scaling.shape) != stack
            or scaling.device != x.device
            or scaling.requires_grad
            or scaling.is_complex()
        ):
            raise ValueError(
                f"{name}: got a tensor of shape {tuple(scaling.shape)} on {scaling.device} (requires_grad="
                f"{scaling.requires_grad}); accepted is a float, or a real {kind} on {x.device} that needs no grad"
            )
    elif not isinstance(scaling, (int, float)):
        raise TypeError(f"{name}: got {type(scaling).__name__}; accepted is a float or a {kind}")


def _check_offsets(offsets: Tensor, count: int | str, device: torch.device) -> None:
    if not isinstance(offsets, Tensor):
        raise TypeError(f"offsets: got {type(offsets).__name__}; accepted is a torch.Tensor")
    wanted = f"int64 or int32 of shape ({count} + 1,), for lora_a has {count} adapters"
    if offsets.dtype not in (torch.int64, torch.int32) or offsets.ndim != 1:
        raise ValueError(
            f"offsets: got {offsets.dtype} of shape {tuple(offsets.shape)}; accepted are {wanted}"
        )
    if offsets.shape[0] - 1 != count:
        raise ValueError(f"offsets: got shape {tuple(offsets.shape)}; accepted are {wanted}")
    if offsets.device != device:
        raise ValueError(
            f"offsets: is on {offsets.device}, x on {device}; {_to(offsets.device, device)}"
        )


def _to(device: torch.device, wanted: torch.device) -> str:
    """What brings a tensor on ``device`` to x."""
    if device.type != "meta":
        return f"move it with .to({str(wanted)!r})"
    return (
        "it has no data: load it first. Where accelerate offloads (cpu_offload, disk_offload, dispatch_model), give it "
        "preload_module_classes=['LoRALinear', 'LoRAConv1D', 'LoRAEmbedding', 'QLoRALinear', 'LoRAWrapper'], whose parameters "
        "are their submodules'"
    )


# The same function as a torch op: called as such, an exported program keeps it as one node. Composite: it has no
# formula of its own.
_library = torch.library.Library("fastlora", "FRAGMENT")
_library.define(
    "lora_linear(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, float scaling=1.0, Tensor? bias=None, "
    "float dropout_p=0.0, bool training=True) -> Tensor"
)
_library.impl("lora_linear", lora_linear, "CompositeImplicitAutograd")
