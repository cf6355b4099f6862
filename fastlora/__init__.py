"""fastlora: low-rank adaptation at the price of the frozen linear. See README.md and ``fastlora.explain``.

Importing starts no CUDA context and needs neither the compiled library nor triton, transformers or peft.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that holds it. Loaded on first use, so that an import costs torch and nothing else.
_EXPORTS = {
    "lora_linear": "functional",
    "lora_linear_segments": "functional",
    "qlora_linear": "functional",
    "backend": "ops",
    "explain": "layers",
    "launches": "_counters",
    "reset_launches": "_counters",
    "build_info": "_library",
    "NF4Tensor": "quant",
    "LoRALinear": "layers",
    "QLoRALinear": "layers",
    "EvaConfig": "methods",
    "LoftQConfig": "methods",
    "LoraConfig": "methods",
    "IA3Config": "methods",
    "LNTuningConfig": "methods",
    "BottleneckConfig": "methods",
    "HoulsbyConfig": "methods",
    "ParallelConfig": "methods",
    "PfeifferConfig": "methods",
    "PeftConfig": "methods",
    "PrefixTuningConfig": "methods",
    "PromptEncoderConfig": "methods",
    "PromptTuningConfig": "methods",
    "PeftModel": "models",
    "get_peft_model": "models",
    "get_eva_state_dict": "models",
    "get_layer_status": "models",
    "get_model_status": "models",
    "initialize_lora_eva_weights": "models",
    "accelerate": "models",
    "load_quantized": "models",
    "restore": "models",
    "acceleration_report": "models",
    "save_adapter": "io",
    "load_adapter": "io",
    "prepare_hotswap": "io",
    "hotswap_adapter": "io",
}

if TYPE_CHECKING:
    from ._counters import launches, reset_launches
    from ._library import build_info
    from .functional import lora_linear, lora_linear_segments, qlora_linear
    from .io import hotswap_adapter, load_adapter, prepare_hotswap, save_adapter
    from .layers import LoRALinear, QLoRALinear, explain
    from .methods import (
        BottleneckConfig,
        EvaConfig,
        HoulsbyConfig,
        IA3Config,
        LNTuningConfig,
        LoftQConfig,
        LoraConfig,
        ParallelConfig,
        PeftConfig,
        PfeifferConfig,
        PrefixTuningConfig,
        PromptEncoderConfig,
        PromptTuningConfig,
    )
    from .models import (
        PeftModel,
        accelerate,
        acceleration_report,
        get_eva_state_dict,
        get_layer_status,
        get_model_status,
        get_peft_model,
        initialize_lora_eva_weights,
        load_quantized,
        restore,
    )
    from .ops import backend
    from .quant import NF4Tensor

__all__ = [
    "BottleneckConfig",
    "EvaConfig",
    "HoulsbyConfig",
    "IA3Config",
    "LNTuningConfig",
    "LoRALinear",
    "LoftQConfig",
    "LoraConfig",
    "NF4Tensor",
    "ParallelConfig",
    "PeftConfig",
    "PeftModel",
    "PfeifferConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "QLoRALinear",
    "__version__",
    "accelerate",
    "acceleration_report",
    "backend",
    "build_info",
    "explain",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "hotswap_adapter",
    "initialize_lora_eva_weights",
    "launches",
    "load_adapter",
    "load_quantized",
    "lora_linear",
    "lora_linear_segments",
    "prepare_hotswap",
    "qlora_linear",
    "reset_launches",
    "restore",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
        globals()[name] = value
        return value
    try:
        return importlib.import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
