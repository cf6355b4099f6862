"""What a training step takes on a GPU, in bytes and multiplications, found out on the meta device: shapes alone.

The step is the real one, the model's forward, the loop's loss, backward and AdamW, run under two modes. ``Footprint`` follows
the memory of every tensor that is made until it is freed, as the GPU's allocator would, and counts the products.
``GpuKernels`` stands in for what runs differently on a GPU than on the meta device.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .. import ops  # noqa: F401  (its torch.ops are named below)
from ..ops.nf4 import triton_codes_fit
from ..ops.support import Fit, Form

_BLOCK = 512  # the allocator hands out multiples of it
_own = torch.ops.fastlora


class Footprint(TorchDispatchMode):
    """Bytes that tensors hold now and held at most, and floating-point operations so far.

    Args:
        device: the type of device whose memory is followed.
        one_document: what a question about values is answered that decides on memory: whether every row of a batch is one
            document, so that attention needs no mask beside the causal one.
    """

    def __init__(self, device: str = "meta", one_document: bool = True) -> None:
        super().__init__()
        self._device = device
        self.now = self.peak = self.flops = 0
        self._one_document = one_document
        self._sizes: dict[int, int] = {}

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count the memory of tensors from now until it is freed."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if tensor.device.type != self._device or key in self._sizes:
                continue
            self._sizes[key] = size = -(-storage.nbytes() // _BLOCK) * _BLOCK
            self.now += size
            weakref.finalize(storage, self._free, key)
        self.peak = max(self.peak, self.now)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return self._one_document if args[0].dtype == torch.bool else 1
        out = func(*args, **(kwargs or {}))
        self.hold(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        if func in _OWN_FLOPS:
            self.peak = max(self.peak, self.now + _workspace(func, args))
            self.flops += _OWN_FLOPS[func](*args)
        elif func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def _workspace(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that an op makes for itself: g [M, r] in a backward, and of a 4-bit weight its floats, where no kernel reads the
    codes of so many rows.

    Those as on GPUs before Hopper, whose kernels read them up to 1024 rows and more: there the estimate is high by this much.
    """
    total = 0
    if func in _BACKWARDS:
        b = args[_BACKWARDS[func]]
        total += 0 if b is None else args[0].shape[0] * b.shape[1] * args[0].element_size()
    op = _OVER_CODES.get(func)
    if op is not None and args[1] is not None:
        form = Form(*args[3:8])
        if triton_codes_fit(op, args[0].shape[0], form) != Fit():
            total += form.rows * form.cols * args[0].element_size()
    return total


_BACKWARDS = {_own._lora_backward.default: 3, _own._nf4_backward.default: 9}  # where B stands
_OVER_CODES = {
    _own._nf4_linear.default: "nf4_gemm",
    _own._nf4_scaled.default: "nf4_gemm",
    _own._nf4_backward.default: "nf4_dx",
}


def _forward(x: Tensor, n: int, a: Tensor | None) -> int:
    m, k = x.shape
    return 2 * m * n * k + (0 if a is None else 2 * m * a.shape[0] * (n + k))


def _backward(
    dy: Tensor, k: int, weight: Any, a: Tensor | None, b: Tensor | None, x: Any, h: Any
) -> int:
    m, n = dy.shape
    low_rank = 0
    if b is not None:  # g = dY B, g A, dA = g^T x, dB = dY^T h
        wanted = (n, k * (weight is not None and a is not None), k * (x is not None))
        low_rank = 2 * m * b.shape[1] * (sum(wanted) + n * (h is not None))
    return low_rank + (0 if weight is None else 2 * m * n * k)


def _wgrad(x: Tensor | None, g: Tensor | None, dy: Tensor | None, h: Tensor | None) -> int:
    total = 0
    for wide, thin in ((x, g), (dy, h)):  # g^T x, dY^T h
        if wide is not None and thin is not None:
            total += 2 * wide.numel() * thin.shape[1]
    return total


_OWN_FLOPS: dict[Any, Callable[..., int]] = {
    _own._bottleneck_down.default: lambda x, l, *_: 2 * x.numel() * l.shape[0],
    _own._bottleneck_down_backward.default: lambda dy, l, *_: 2 * dy.numel() * l.shape[0],
    _own._bottleneck_up.default: lambda h, l, *_: 2 * h.numel() * l.shape[0],
    _own._bottleneck_wgrad.default: lambda x, g, dy, h, *_: _wgrad(x, g, dy, h),
    _own._row_norms.default: lambda w, a, *_: 2 * w.numel() * (a.shape[0] + 1),
    _own._nf4_row_norms.default: lambda codes, scales, n, k, *rest: (
        2 * n * k * (rest[3].shape[0] + 1)
    ),
    _own._gemm.default: lambda x, w, h, l, *_: _forward(x, w.shape[0], None),
    _own._lora_forward.default: lambda x, w, a, *_: _forward(x, w.shape[0], a),
    _own._lora_scaled.default: lambda x, w, a, *_: _forward(x, w.shape[0], a),
    _own._lora_backward.default: lambda dy, w, a, b, x, h, *rest: _backward(
        dy, rest[4], w, a, b, x, h
    ),
    _own._nf4_linear.default: lambda x, codes, scales, n, *rest: _forward(x, n, rest[4]),
    _own._nf4_scaled.default: lambda x, codes, scales, n, *rest: _forward(x, n, rest[4]),
    _own._nf4_backward.default: lambda dy, codes, scales, n, k, *rest: _backward(
        dy, k, codes, *rest[3:7]
    ),
}


class GpuKernels(TorchFunctionMode):
    """Attention as a GPU's fused kernels do it, and autocast, which the meta device has not, to ``cast_to``."""

    def __init__(self, footprint: Footprint, cast_to: torch.dtype | None = None) -> None:
        super().__init__()
        self._footprint, self._cast_to = footprint, cast_to
        self._casts: dict[int, Tensor] | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _AUTOCAST and self._cast_to is not None:
            args = tuple(map(self._cast, args))
            kwargs = {name: self._cast(value) for name, value in kwargs.items()}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if self._casts is None or not value.is_leaf or not value.requires_grad:
            return value.to(self._cast_to)
        if id(value) not in self._casts:
            self._casts[id(value)] = value.to(self._cast_to)
        return self._casts[id(value)]

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """A forward, which autocasts a weight once; after it casts live on where backward needs them."""
        self._casts = {}
        try:
            yield
        finally:
            self._casts = None

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **_: Any,
    ) -> Tensor:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)  # what is added to scores
        out: Tensor = _FusedAttention.apply(
            self._footprint, query, key, value, attn_mask, is_causal
        )
        return out


_AUTOCAST = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.addmm}
_AUTOCAST |= {torch.baddbmm, F.scaled_dot_product_attention}


class _FusedAttention(torch.autograd.Function):
    """Memory and operations of flash and memory-efficient attention: scores exist by tiles, of which a logsumexp is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        footprint: Footprint,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        *batch, rows, _ = query.shape
        out = _by_token(query, value.shape[-1])
        ctx.save_for_backward(
            query, key, value, mask, out, query.new_empty(*batch, rows, dtype=torch.float32)
        )
        products = 2 * math.prod(batch) * rows * key.shape[-2] * (query.shape[-1] + out.shape[-1])
        ctx.footprint, ctx.flops = footprint, products // 2 if is_causal else products
        footprint.flops += ctx.flops
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors[:3]
        ctx.footprint.flops += ctx.flops * 5 // 2  # five products for two: scores are made again
        gradients = (_by_token(t, t.shape[-1]) for t in (query, key, value))
        return None, *gradients, None, None


def _by_token(like: Tensor, features: int) -> Tensor:
    """[..., H, S, features], laid out so that a token's heads lie together."""
    *batch, heads, rows, _ = like.shape
    return like.new_empty(*batch, rows, heads, features).transpose(-2, -3)


def backward(loss: Tensor) -> None:
    """``loss.backward()``, which a TorchFunctionMode would not be seen by: checkpoints are recomputed under it too."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,),
        (torch.ones_like(loss),),
        False,
        False,
        (),
        allow_unreachable=True,
        accumulate_grad=True,
    )
