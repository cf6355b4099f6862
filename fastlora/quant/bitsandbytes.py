"""bitsandbytes' ``Params4bit`` as an ``NF4Tensor`` and back, over the same memory. bitsandbytes is imported to go there only."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import reference
from ..ops import Form

_NF4Tensor = TypeVar("_NF4Tensor")


class Packed(NamedTuple):
    """What ops take of a 4-bit weight [N, K], without a module around it; named as in ``NF4Tensor``."""

    codes: Tensor
    scales: tuple[Tensor, ...]
    form: Form

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.form.rows, self.form.cols))

    @property
    def device(self) -> torch.device:
        return self.codes.device


def obstacle(param: Any, read_code: bool = True) -> str | None:
    """Why ``param`` cannot be read as it lies, or None. Without ``read_code`` no value of a tensor is looked at."""
    state = getattr(param, "quant_state", None)
    if state is None:
        return "is not quantised: bitsandbytes does that when a layer is moved to its device"
    if getattr(state, "packing_format_for_cpu", False):
        return "was packed anew by bitsandbytes' CPU kernels; take it before its first forward"
    if state.quant_type not in ("nf4", "fp4"):
        return f"is of type {state.quant_type!r}; read are 'nf4' and 'fp4'"
    if state.shape is None or len(state.shape) != 2:
        return f"has shape {state.shape}; a matrix is read"
    if read_code:
        standard = reference.code_values(state.quant_type == "fp4")
        if state.code is None or not torch.equal(state.code.float().cpu(), standard):
            return f"has a code of its own; read is {state.quant_type}'s"
    return None


def pack(param: Any) -> Packed:
    """A Params4bit without ``obstacle`` as it lies."""
    state = param.quant_state
    n, k = state.shape
    codes = param.detach().view(torch.uint8).view(-1)[: (n * k + 1) // 2]
    scales: tuple[Tensor, ...] = (state.absmax,)
    nested = 0
    if state.nested:
        second = state.state2
        nested = second.blocksize
        scales = (state.absmax, second.absmax, second.code, state.offset.view(1))
    elif state.absmax.dtype != torch.float32:
        scales = (state.absmax.float(),)
    return Packed(codes, scales, Form(n, k, state.blocksize, nested, state.quant_type == "fp4"))


def wrap(param: Any, cls: type[_NF4Tensor]) -> _NF4Tensor:
    """``param`` (Params4bit, quantised) as an NF4Tensor over its memory.

    Raises:
        TypeError: it has no ``quant_state``.
        ValueError: it is not quantised, or in a way that is not read.
    """
    if not hasattr(param, "quant_state"):
        raise TypeError(
            f"param: got {type(param).__name__}; accepted is a bitsandbytes.nn.Params4bit"
        )
    reason = obstacle(param)
    if reason is not None:
        raise ValueError(f"param: {reason}")
    state = param.quant_state
    codes, scales, form = pack(param)
    return cls(  # type: ignore[call-arg]
        codes,
        scales,
        tuple(state.shape),
        state.dtype,
        state.blocksize,
        form.nested_block_size,
        state.quant_type,
    )


def unwrap(tensor: Any) -> Any:
    """An NF4Tensor as a quantised ``Params4bit`` over its memory."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    scales = [t.data.view(-1) for t in tensor.scales]
    floats = [t.view(torch.float32) if t.dtype == torch.int32 else t for t in scales]
    second = offset = None
    if tensor.nested_block_size:
        absmax, nested_absmax, nested_code, offset = floats
        second = QuantState(
            absmax=nested_absmax,
            code=nested_code,
            blocksize=tensor.nested_block_size,
            dtype=torch.float32,
        )
        offset = offset.view(())
    else:
        (absmax,) = floats
    fp4 = tensor.quant_type == "fp4"
    state = QuantState(
        absmax=absmax,
        shape=tensor.shape,
        code=reference.code_values(fp4).to(tensor.device),
        blocksize=tensor.block_size,
        quant_type=tensor.quant_type,
        dtype=tensor.dtype,
        offset=offset,
        state2=second,
    )
    return Params4bit(
        tensor.codes.data.view(-1, 1),
        requires_grad=False,
        quant_state=state,
        blocksize=tensor.block_size,
        compress_statistics=state.nested,
        quant_type=tensor.quant_type,
        quant_storage=torch.uint8,
        bnb_quantized=True,
    )
