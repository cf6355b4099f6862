"""Configurations, with PEFT's field names, and the rules by which they choose modules."""

from .base import PeftConfig
from .bottleneck import BottleneckConfig, HoulsbyConfig, ParallelConfig, PfeifferConfig
from .ia3 import IA3Config
from .initialisation import EvaConfig, LoftQConfig
from .ln_tuning import LNTuningConfig
from .lora import LoraConfig
from .prompt import (
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptLearningConfig,
    PromptTuningConfig,
)

__all__ = [
    "BottleneckConfig",
    "EvaConfig",
    "HoulsbyConfig",
    "IA3Config",
    "LNTuningConfig",
    "LoftQConfig",
    "LoraConfig",
    "ParallelConfig",
    "PeftConfig",
    "PfeifferConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptLearningConfig",
    "PromptTuningConfig",
]
