"""Modules that carry adapters; they need torch alone. ``get_peft_model`` puts them into a model."""

from .adapter import AdapterLayer
from .base import LoRALayer
from .bottleneck import BottleneckLayer
from .explanation import explain
from .ia3 import IA3Layer
from .linear import LoRALinear
from .norm_tuning import TunedNorm
from .qlora import QLoRALinear
from .saved import TrainableCopy
from .wrapper import LoRAWrapper

__all__ = [
    "AdapterLayer",
    "BottleneckLayer",
    "IA3Layer",
    "LoRALayer",
    "LoRALinear",
    "LoRAWrapper",
    "QLoRALinear",
    "TrainableCopy",
    "TunedNorm",
    "explain",
]
