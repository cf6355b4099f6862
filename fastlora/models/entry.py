"""``get_peft_model``: a configuration's method enters a model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..methods import (
    BottleneckConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from .inject import Injection
from .inject_bottleneck import BottleneckInjection
from .inject_lora import LoraInjection
from .inject_prompt import PromptInjection
from .inject_small import IA3Injection, LNTuningInjection
from .peft_model import PeftModel
from .placement import move

_INJECTIONS: dict[type[PeftConfig], type[Injection[Any]]] = {
    LoraConfig: LoraInjection,
    PrefixTuningConfig: PromptInjection,
    PromptEncoderConfig: PromptInjection,
    PromptTuningConfig: PromptInjection,
    IA3Config: IA3Injection,
    LNTuningConfig: LNTuningInjection,
    BottleneckConfig: BottleneckInjection,
}


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    device: torch.device | str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Put a method's layers into ``model``, in place, and freeze the rest.

    Args:
        model: any torch module, or a transformers model (quantised by bitsandbytes too).
        peft_config: what to do: a ``fastlora.LoraConfig``, or that of another method; PEFT's own configurations work as well.
            It is copied, not changed.
        adapter_name: name of the adapter.
        autocast_adapter_dtype: adapters of an fp16 or bf16 base are kept in fp32 (PEFT's default);
            False: in the base's dtype.
        device: where the model goes. With ``peft_config.quantize`` it is quantised there, linear by linear, so that a base
            that was loaded on the CPU never has to fit on the GPU in full precision. None: where it is.
        low_cpu_mem_usage: PEFT's; its zeros stand for values that a file brings. Nothing to save here.

    Returns:
        A ``fastlora.PeftModel`` around ``model``; for a transformers model with peft installed it
        is a ``peft.PeftModel`` as well, which is how transformers' Trainer knows it.

    Raises:
        TypeError, ValueError, NotImplementedError: bad arguments, no module matched, or a module
            that cannot be adapted. The model is then as it was.
    """
    injection = plan(model, peft_config, adapter_name, autocast_adapter_dtype, device)
    try:
        injection.apply()
        if device is not None:
            move(model, device)
    except BaseException:  # no memory there, say
        injection.undo()
        raise
    return injection.wrap()


def plan(model: nn.Module, config: Any, *arguments: Any, **settings: Any) -> Injection[Any]:
    """The changes that ``config`` means for ``model``; see ``Injection``. Nothing is changed."""
    own = own_config(config)
    return _INJECTIONS[type(own)](model, own, *arguments, **settings)


def own_config(config: Any) -> PeftConfig:
    """A copy of a configuration, made fastlora's if it is PEFT's."""
    if isinstance(config, PeftConfig):
        return copy.deepcopy(config)
    if hasattr(config, "to_dict") and hasattr(config, "peft_type"):
        return PeftConfig.from_dict(config.to_dict())
    raise TypeError(
        f"config: got {type(config).__name__}; accepted are fastlora's and PEFT's configurations, LoraConfig for one"
    )
