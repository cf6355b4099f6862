"""Modules that carry adapters; they need torch alone. ``get_peft_model`` puts them into a model."""

from .adapter import AdapterLayer
from .base import LoRALayer
from .explanation import explain
from .linear import LoRALinear
from .prompts import PrefixTokens, PromptLayer, VirtualTokens
from .qlora import QLoRALinear
from .saved import TrainableCopy
from .wrapper import LoRAWrapper

__all__ = [
    "AdapterLayer",
    "LoRALayer",
    "LoRALinear",
    "LoRAWrapper",
    "PrefixTokens",
    "PromptLayer",
    "QLoRALinear",
    "TrainableCopy",
    "VirtualTokens",
    "explain",
]
