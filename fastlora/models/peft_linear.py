"""PEFT's ``lora.Linear`` and ``lora.Linear4bit`` (over bitsandbytes) that run ``lora_linear`` and
``qlora_linear`` wherever that is the same thing.

Imported only where there is a PEFT layer. ``_parts`` holds the conditions of the layer, which the
report shows too, and ``_call_obstacle`` those of one call. Both run at every forward of every
layer, so they read nn.Module's own dicts.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import has_torch_function_unary
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary

from .._autocast import autocast_dtype
from ..functional import lora_linear, packed_linear
from ..layers.plain import FLOATS, is_undisturbed
from ..ops.support import MAX_RANK
from ..quant import bitsandbytes as bnb
from ..quant.bitsandbytes import Packed

_ORDINARY = (Tensor, nn.Parameter)
_BITS = (torch.float32, torch.bfloat16, torch.float16)


class _Parts(NamedTuple):
    """What one product needs of a layer."""

    weight: Tensor | Packed
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scaling: float | Tensor
    dropout: nn.Module


class Fast:
    """In front of a PEFT class: that class in every respect but ``forward``."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K] -> [..., N]: one product, or PEFT's own forward where that is not the same."""
        parts = "called with more than x" if args or kwargs else _parts(self)
        if isinstance(parts, str) or _call_obstacle(self, parts, x) is not None:
            y: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return y
        weight, bias, a, b, scaling, dropout = parts
        p = dropout.p if type(dropout) is nn.Dropout else 0.0
        if not isinstance(weight, Packed):
            return lora_linear(x, weight, a, b, scaling, bias, p, dropout.training)
        dtype = _compute_dtype(self, x)
        bias = None if bias is None else bias.to(dtype)
        y = packed_linear(x, weight, a, b, scaling, bias, p, dropout.training, dtype)
        return y.to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What moves must not be held where it was until the next forward."""
        _forget(self)
        return super()._apply(fn, recurse)  # type: ignore[misc]


class FastLoraLinear(Fast, Linear):
    """PEFT's ``lora.Linear``, fast."""


_FAST: dict[Any, Any] = {Linear: FastLoraLinear}


def _fast_class(cls: Any) -> Any:
    """The fast class of PEFT's ``cls``, or None. Its Linear4bit exists where bitsandbytes does."""
    theirs: Any = getattr(sys.modules.get("peft.tuners.lora.bnb"), "Linear4bit", None)
    if cls is theirs and cls not in _FAST:
        _FAST[cls] = type("FastLoraLinear4bit", (Fast, cls), {"__module__": __name__})
    return _FAST.get(cls)


def __getattr__(name: str) -> Any:
    """The class that is made late is found by its name as well, so that a model can be pickled."""
    if name == "FastLoraLinear4bit":
        from peft.tuners.lora import bnb as theirs

        return _fast_class(theirs.Linear4bit)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def adopt(layer: nn.Module) -> None:
    """Give ``layer`` the fast class if its class has one and it could ever be fast."""
    fast = _fast_class(type(layer))
    if fast is not None and _never(layer) is None:
        layer.__class__ = fast


def _is_fast_class(cls: type) -> bool:
    return Fast in cls.__bases__


def is_stuck(layer: nn.Module) -> bool:
    """Whether something (fully_shard, say) has built a class of its own upon the fast one."""
    return isinstance(layer, Fast) and not _is_fast_class(type(layer))


def release(layer: nn.Module) -> None:
    """Give ``layer`` PEFT's class back, and hold nothing of its weight."""
    if _is_fast_class(type(layer)):
        _forget(layer)
        layer.__class__ = type(layer).__bases__[1]


def obstacle(layer: Any) -> str | None:
    """Why this PEFT layer's next forward cannot be fast, as far as the layer goes, or None."""
    if not isinstance(layer, Fast):
        return _never(layer) or "not accelerated"
    parts = _parts(layer)
    return parts if isinstance(parts, str) else None


def _never(layer: Any) -> str | None:
    """What makes a layer slow for good (its kind, its base, or every one of its adapters)."""
    if _fast_class(type(layer)) is None:
        return f"PEFT's {type(layer).__name__} layer has no fast path"
    reason = _base_obstacle(layer, layer.base_layer)
    if reason is not None or not layer.lora_A:
        return reason
    reasons = [_adapter_obstacle(layer, name) for name in layer.lora_A]
    return None if None in reasons else reasons[0]


def _parts(layer: Any) -> _Parts | str:
    """The parts of the product, or the reason why PEFT's forward has to run."""
    if layer._disable_adapters:
        return "its adapters are disabled"
    if layer.merged_adapters:
        return "its adapters are merged into the base weight"
    modules = layer._modules
    base, lora_a = modules["base_layer"], modules["lora_A"]._modules
    names = [name for name in layer.active_adapters if name in lora_a]
    if len(names) != 1:
        return f"{len(names)} active adapters: the fast path is for one"
    name = names[0]
    reason = _base_obstacle(layer, base) or _adapter_obstacle(layer, name)
    if reason is not None:
        return reason
    a, b = lora_a[name], modules["lora_B"]._modules[name]
    dropout = modules["lora_dropout"]._modules[name]
    if not (is_undisturbed(base) and is_undisturbed(a)):
        return "base_layer or lora_A has a hook or a forward of its own"
    if not (is_undisturbed(b) and is_undisturbed(dropout)):
        return "lora_B or lora_dropout has a hook or a forward of its own"
    if _has_any_global_hook():
        return "a global module hook is set"
    weight: Any = base._parameters["weight"]
    bias = base._parameters["bias"]
    if hasattr(weight, "quant_state"):
        weight = _packed(weight)
    factors = a._parameters["weight"], b._parameters["weight"]
    return _Parts(weight, bias, *factors, layer.scaling[name], dropout)


_wraps: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _packed(param: Any) -> Packed:
    """A Params4bit as it lies: looked up once, and again where that has moved. A compiled program reads it itself."""
    if torch.compiler.is_compiling():
        return bnb.pack(param)
    memory = _memory(param)
    known = _wraps.get(param)
    if known is None or not _same(known[0], memory):
        with torch.inference_mode(False):  # it outlives a validation: training saves it
            known = memory, bnb.pack(param)
        _wraps[param] = known
    packed: Packed = known[1]
    return packed


def _compute_dtype(layer: Any, x: Tensor) -> torch.dtype:
    """What bitsandbytes computes in, under autocast too: the dtype it was told, or that of the first x. It returns x's.

    After peft.prepare_model_for_kbit_training x and biases are fp32 where that is bf16.
    """
    base = layer._modules["base_layer"]
    told: torch.dtype | None = base.compute_dtype if base.compute_type_is_set else None
    return told or x.dtype


def _forget(layer: Any) -> None:
    weight = layer._modules["base_layer"]._parameters.get("weight")
    if weight is not None:
        _wraps.pop(weight, None)


def _memory(param: Any) -> tuple[int, int, Any]:
    """Where a Params4bit keeps its codes and scales: its CPU kernels replace both, in one state."""
    state = param.quant_state
    return param.data_ptr(), state.absmax.data_ptr(), state


def _same(one: tuple[int, int, Any], other: tuple[int, int, Any]) -> bool:
    return one[:2] == other[:2] and one[2] is other[2]


def _base4bit_obstacle(base: Any) -> str | None:
    param = base._parameters["weight"]
    if type(base).__name__ != "Linear4bit" or not hasattr(param, "quant_state"):
        return f"its base is a {type(base).__name__} over a {type(param).__name__}"
    state = param.quant_state
    if state is not None and 2 * param.numel() * param.element_size() < state.shape.numel():
        return "the base weight is without its full shape (sharded, or gathered by a hook)"
    # Asked at every forward: a look at the code's values costs a synchronisation, and would break the graph of a compiled
    # program, for which accelerate() has looked.
    seen = torch.compiler.is_compiling()
    if not seen:
        known = _wraps.get(param)
        seen = known is not None and _same(known[0], _memory(param))
    reason = bnb.obstacle(param, read_code=not seen)
    return None if reason is None else f"the base weight {reason}"


def _base_obstacle(layer: Any, base: nn.Module) -> str | None:
    if not isinstance(layer, Linear):
        return _base4bit_obstacle(base)
    if type(base) is not nn.Linear:
        return f"its base is a {type(base).__name__}, not an nn.Linear"
    if layer.fan_in_fan_out:
        return "fan_in_fan_out: the base weight is stored transposed"
    weight: Any = base._parameters["weight"]
    if weight.dtype not in FLOATS:
        return f"the base weight is {weight.dtype}"
    if weight.requires_grad:
        return "the base weight is trained"
    return None


def _adapter_obstacle(layer: Any, name: str) -> str | None:
    if layer.use_dora.get(name):
        return f"adapter {name!r} uses DoRA"
    if name in getattr(layer, "lora_variant", ()):  # older peft has none but DoRA
        return f"adapter {name!r} is a {type(layer.lora_variant[name]).__name__}"
    modules = layer._modules
    a, b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    if type(a) is not nn.Linear or type(b) is not nn.Linear:
        # fully_shard gives a module that it shards a class of its own; its parameters are whole in
        # its forward only
        return f"lora_A or lora_B of adapter {name!r} is not exactly an nn.Linear"
    if a._parameters["bias"] is not None or b._parameters["bias"] is not None:
        return f"adapter {name!r} has a bias (lora_bias)"
    if a.out_features > MAX_RANK:
        return f"adapter {name!r} has rank {a.out_features}, above {MAX_RANK}"
    if type(modules["lora_dropout"]._modules[name]) not in (nn.Dropout, nn.Identity):
        return f"adapter {name!r} has a dropout of its own kind"
    return None


def _call_obstacle(layer: Any, parts: _Parts, x: Any) -> str | None:
    """What only the call shows: kinds, dtypes and shapes that PEFT treats in its own way."""
    weight, bias, a, b = parts[:4]
    quantized = isinstance(weight, Packed)
    read = weight.codes if isinstance(weight, Packed) else weight
    for tensor in (x, read, a, b, read if bias is None else bias):
        if type(tensor) not in _ORDINARY and not _is_ordinary(tensor):
            return "a distributed, quantised or intercepting tensor"
    n, k = layer.out_features, layer.in_features
    if weight.shape != (n, k) or a.shape[-1] != k or b.shape[0] != n:
        return "a parameter without its full shape (sharded, or gathered by a hook)"
    dtype = x.dtype
    if x.ndim == 0 or x.shape[-1] != k or dtype not in FLOATS or x.is_nested:
        return "an input that the base itself will refuse or treat in its own way"
    if b.dtype != a.dtype:
        return "adapter dtypes"
    compute = _compute_dtype(layer, x) if quantized else dtype
    if quantized and (dtype not in _BITS or compute not in _BITS):
        return f"bitsandbytes computes in {compute} here, and x is {dtype}"
    autocast = autocast_dtype(x.device)
    if autocast is not None:
        wider = quantized and torch.promote_types(dtype, autocast) != dtype
        return "autocast to a dtype that widens x's" if wider else None
    if isinstance(weight, Tensor) and any(t.dtype != dtype for t in (weight, bias) if t is not None):  # fmt: skip
        return "mixed base dtypes"
    if a.dtype not in (compute, torch.float32):
        return "adapters in a lower precision than the input"
    casts = a.dtype != dtype and not getattr(layer, "cast_input_dtype_enabled", True)
    return "input casting is off" if casts else None


def _is_ordinary(tensor: Any) -> bool:
    """A subclass that computes as any tensor does (a fake tensor of torch.export, say)."""
    if not isinstance(tensor, Tensor) or has_torch_function_unary(tensor):
        return False
    return not is_traceable_wrapper_subclass(tensor)
