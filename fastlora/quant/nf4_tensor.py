"""``NF4Tensor``: a frozen 4-bit weight, as bitsandbytes stores it, in parameters that nothing casts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ops, reference
from .scales import quantize_scales

if TYPE_CHECKING:
    from typing_extensions import Self

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class NF4Tensor(nn.Module):
    """A weight [N, K] of 4 bits an element: NF4 (QLoRA, arXiv 2305.14314), or FP4 where one is loaded.

    ``W[i] = value[code[i]] * absmax[i // block_size]`` over the row-major flattening, in bitsandbytes' layout: ``codes``
    (two elements a byte, the first in the high half) and scales. Made by ``quantize``, ``from_bitsandbytes`` or ``empty``.

    It is a module whose parameters are integers that do not require grad, so that ``.half()``, ``.to(torch.bfloat16)``,
    mixed precision and sharding (FSDP2 from torch 2.13 on) leave every bit as it is; fp32 scales are kept as the int32 of
    the same bits. Where whole blocks make up a row, ``codes`` and ``absmax`` have a row for each of the weight's.

    Parameters:
        codes: uint8 [N, K / 2], or [ceil(N K / 2)] where blocks straddle rows.
        absmax: int32 [N, K / block_size] (fp32 bits), or uint8 codes of that shape if ``double_quant``; flat likewise.
        nested_absmax, nested_code, offset: int32 [ceil(blocks / nested_block_size)], [256], [1], or None.

    Attributes:
        shape: (N, K). dtype: of the weight it was, and of ``dequantize()``.
        block_size, nested_block_size (0: scales are fp32), quant_type ("nf4" or "fp4").
    """

    absmax: nn.Parameter
    codes: nn.Parameter

    def __init__(
        self,
        codes: Tensor,
        scales: tuple[Tensor, ...],
        shape: tuple[int, int],
        dtype: torch.dtype,
        block_size: int,
        nested_block_size: int = 0,
        quant_type: str = "nf4",
    ) -> None:
        """Takes the tensors as they are: no copy. ``scales`` is (absmax,) or (absmax codes, nested_absmax, nested_code,
        offset), fp32 or the int32 of the same bits.

        Raises:
            ValueError: a shape, dtype or block size does not fit the others.
        """
        super().__init__()
        self.shape = torch.Size(shape)
        self.dtype, self.block_size, self.quant_type = dtype, block_size, quant_type
        self.nested_block_size = nested_block_size
        self._check(codes, scales)
        n, k = self.shape
        by_row = n > 0 and k > 0 and k % block_size == 0
        self.codes = _frozen(codes.view((n, -1) if by_row else (-1,)))
        self.absmax = _frozen(scales[0].view((n, -1) if by_row else (-1,)))
        nested: list[nn.Parameter | None] = [_frozen(t.view(-1)) for t in scales[1:]]
        nested = nested or [None] * 3
        for name, value in zip(("nested_absmax", "nested_code", "offset"), nested, strict=True):
            self.register_parameter(name, value)

    def _check(self, codes: Tensor, scales: tuple[Tensor, ...]) -> None:
        if self.quant_type not in ("nf4", "fp4"):
            raise ValueError(f"quant_type: got {self.quant_type!r}; accepted are 'nf4' and 'fp4'")
        check_block_size(self.block_size)
        if self.dtype not in _FLOATS:
            raise ValueError(f"dtype: got {self.dtype}; accepted are float32, bfloat16 and float16")
        if len(self.shape) != 2:
            raise ValueError(f"shape: got {tuple(self.shape)}; accepted is (N, K)")
        nested = self.nested_block_size
        if nested:
            check_nested_block_size(nested)
        if len(scales) != (4 if nested else 1):
            raise ValueError(f"scales: got {len(scales)} tensors; accepted are 4 if nested, or 1")
        count = math.prod(self.shape)
        blocks = -(-count // self.block_size)
        byte, bits = (torch.uint8,), (torch.float32, torch.int32)
        wanted: list[tuple[str, Tensor, tuple[torch.dtype, ...], int]]
        wanted = [("codes", codes, byte, -(-count // 2))]
        if nested:
            sizes = (-(-blocks // nested), 256, 1)
            names = ("nested_absmax", "nested_code", "offset")
            wanted += [("absmax", scales[0], byte, blocks)]
            wanted += [
                (name, t, bits, size)
                for name, t, size in zip(names, scales[1:], sizes, strict=True)
            ]
        else:
            wanted += [("absmax", scales[0], bits, blocks)]
        for name, tensor, dtypes, size in wanted:
            if tensor.dtype not in dtypes or tensor.numel() != size or not tensor.is_contiguous():
                raise ValueError(
                    f"{name}: got {tensor.dtype} {tuple(tensor.shape)}; a weight {tuple(self.shape)} in blocks of "
                    f"{self.block_size} has {size} contiguous elements of {' or '.join(map(str, dtypes))} here"
                )
            if tensor.device != codes.device:
                raise ValueError(f"{name}: is on {tensor.device}, codes on {codes.device}")

    @classmethod
    def quantize(
        cls,
        weight: Tensor,
        block_size: int = 64,
        double_quant: bool = True,
        nested_block_size: int = 256,
    ) -> Self:
        """``weight`` [N, K] in NF4, bit for bit what bitsandbytes makes of it on the same GPU.

        Blocks whose absmax is below 1e-37, zeros above all, are the exception: they get code 7 (0.0) here, code 0 (-0.0)
        there. A NaN becomes -absmax, an infinity makes its block NaN (with ``double_quant`` the weight), there and here; here both
        warn. On a CPU bitsandbytes lets a NaN make its block NaN, and quantises scales by a table: codes of theirs may be
        neighbours.

        Args:
            weight: float32, bfloat16 or float16; any strides.
            block_size: elements that share an absmax: 32, 64, ... 4096.
            double_quant: quantise the absmax as well (0.127 bits an element rather than 0.5 at 64).
            nested_block_size: scales that share one of their own.

        Raises:
            TypeError, ValueError: ``weight`` is no float matrix, or a size is not accepted.
        """
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight: got {type(weight).__name__}; accepted is a torch.Tensor")
        if weight.ndim != 2 or weight.dtype not in _FLOATS:
            raise ValueError(
                f"weight: got {weight.dtype} {tuple(weight.shape)}; accepted is a matrix of float32, bfloat16 or float16"
            )
        check_block_size(block_size)
        nested = check_nested_block_size(nested_block_size) if double_quant else 0
        weight = weight.detach()
        if weight.numel() and not all(map(math.isfinite, map(float, torch.aminmax(weight)))):
            warnings.warn(
                "weight: holds NaN or infinities; a NaN becomes an ordinary number in 4 bits, an infinity makes its "
                "block NaN, with double_quant the whole weight. Look for what made them before quantising",
                stacklevel=2,
            )
        codes, absmax = ops.quantize(weight, block_size)
        scales = quantize_scales(absmax, nested) if nested else (absmax,)
        return cls(
            codes, scales, (weight.shape[0], weight.shape[1]), weight.dtype, block_size, nested
        )

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int],
        dtype: torch.dtype,
        block_size: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
        nested_block_size: int = 256,
        quant_type: str = "nf4",
    ) -> Self:
        """A weight whose bits are still to be loaded."""
        check_block_size(block_size)
        nested = check_nested_block_size(nested_block_size) if double_quant else 0
        blocks = -(-math.prod(shape) // block_size)

        def make(size: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        codes = make(-(-math.prod(shape) // 2), torch.uint8)
        scales: tuple[Tensor, ...] = (make(blocks, torch.int32),)
        if nested:
            sizes = (-(-blocks // nested), 256, 1)
            scales = make(blocks, torch.uint8), *(make(size, torch.int32) for size in sizes)
        return cls(codes, scales, shape, dtype, block_size, nested, quant_type)

    @property
    def scales(self) -> tuple[Tensor, ...]:
        """(absmax,), or (absmax codes, nested_absmax, nested_code, offset)."""
        if self.nested_block_size == 0:
            return (self.absmax,)
        return self.absmax, self.nested_absmax, self.nested_code, self.offset  # type: ignore[return-value]

    @property
    def form(self) -> ops.Form:
        """What ``ops.dequantize`` needs beside the tensors."""
        n, k = self.shape
        return ops.Form(n, k, self.block_size, self.nested_block_size, self.quant_type == "fp4")

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of all its parameters."""
        return sum(t.nbytes for t in self.parameters())

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K] in ``dtype`` (its own): value * absmax in fp32, rounded once, as in bitsandbytes."""
        return ops.dequantize(self.codes, self.scales, self.form, dtype or self.dtype)

    def row_reader(self, dtype: torch.dtype) -> Callable[[slice | Tensor], Tensor]:
        """A function of a slice or of indices: ``dequantize(dtype)[rows]``, without the other rows where whole blocks make
        up a row. Scales are made floats once, here."""
        if self.codes.ndim == 1:  # blocks straddle rows
            whole = self.dequantize(dtype)
            return lambda rows: whole[rows]
        absmax, *nested = self.scales
        if nested:
            floats = [t.view(torch.float32) for t in nested]
            sizes = floats[0], floats[1], floats[2], self.nested_block_size
            absmax = reference.dequantize_scales(absmax, *sizes)

        def read(rows: slice | Tensor) -> Tensor:
            codes = self.codes[rows].contiguous()
            form = self.form._replace(rows=codes.shape[0], nested_block_size=0)
            return ops.dequantize(codes, (absmax[rows].contiguous(),), form, dtype)

        return read

    def requantize(self, weight: Tensor) -> Self:
        """A float ``weight`` [N, K] in this one's form: its block sizes, and its dtype.

        Raises:
            ValueError: this one is FP4, which is read but not written.
            TypeError, ValueError: as ``quantize``.
        """
        if self.quant_type != "nf4":
            raise ValueError(
                f"weight: cannot be put back into {self.quant_type!r}; written is 'nf4'"
            )
        nested = self.nested_block_size
        made = type(self).quantize(weight, self.block_size, nested > 0, nested or 256)
        made.dtype = self.dtype
        return made

    @classmethod
    def from_bitsandbytes(cls, param: Any) -> Self:
        """Over the memory of a quantised ``bitsandbytes.nn.Params4bit``: no copy. See ``bitsandbytes.wrap``."""
        from .bitsandbytes import wrap

        tensor: Self = wrap(param, cls)
        return tensor

    def to_bitsandbytes(self) -> Any:
        """A ``bitsandbytes.nn.Params4bit`` over the same memory. ImportError without bitsandbytes."""
        from .bitsandbytes import unwrap

        return unwrap(self)

    def extra_repr(self) -> str:
        nested = f", nested_block_size={self.nested_block_size}" if self.nested_block_size else ""
        return (
            f"{tuple(self.shape)}, {self.quant_type}, dtype={self.dtype}, block_size={self.block_size}"
            + nested
        )


def check_block_size(block_size: int) -> None:
    """ValueError unless ``block_size`` is one that bitsandbytes has."""
    if isinstance(block_size, bool) or block_size not in BLOCK_SIZES:
        raise ValueError(
            f"block_size: got {block_size!r}; accepted are {', '.join(map(str, BLOCK_SIZES))}"
        )


def check_nested_block_size(size: int) -> int:
    """``size`` if scales can be quantised in blocks of it; ValueError otherwise."""
    if type(size) is not int or not 1 <= size <= 4096 or size & (size - 1):
        raise ValueError(f"nested_block_size: got {size!r}; accepted are powers of two up to 4096")
    return size


def _frozen(tensor: Tensor) -> nn.Parameter:
    data = tensor.detach()
    if data.dtype == torch.float32:
        data = data.view(torch.int32)
    return nn.Parameter(data, requires_grad=False)
