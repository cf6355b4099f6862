"""Configurations, with PEFT's field names, and the rules by which they choose modules."""

from .base import PeftConfig
from .bottleneck import BottleneckConfig, HoulsbyConfig, ParallelConfig, PfeifferConfig
from .ia3 import IA3Config
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
    "HoulsbyConfig",
    "IA3Config",
    "LNTuningConfig",
    "LoraConfig",
    "ParallelConfig",
    "PeftConfig",
    "PfeifferConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptLearningConfig",
    "PromptTuningConfig",
]
