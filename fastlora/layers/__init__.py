"""Modules that carry adapters; they need torch alone. ``get_peft_model`` puts them into a model."""

from .adapter import AdapterLayer
from .base import LoRALayer
from .bottleneck import BottleneckLayer
from .conv1d import LoRAConv1D
from .embedding import LoRAEmbedding
from .explanation import explain
from .ia3 import IA3Layer
from .linear import LoRALinear
from .norm_tuning import TunedNorm
from .parameter import LoRAParameter
from .prompts import PrefixTokens, PromptLayer, VirtualTokens
from .qlora import QLoRALinear
from .saved import TrainableCopy
from .tied import TiedLoRALinear
from .tokens import TiedTokens, TrainableTokens
from .wrapper import LoRAWrapper

__all__ = [
    "AdapterLayer",
    "BottleneckLayer",
    "IA3Layer",
    "LoRAConv1D",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRALinear",
    "LoRAParameter",
    "LoRAWrapper",
    "PrefixTokens",
    "PromptLayer",
    "QLoRALinear",
    "TiedLoRALinear",
    "TiedTokens",
    "TrainableCopy",
    "TrainableTokens",
    "TunedNorm",
    "VirtualTokens",
    "explain",
]
