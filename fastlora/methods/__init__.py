"""Configurations, with PEFT's field names, and the rules by which they choose modules."""

from .base import PeftConfig
from .lora import LoraConfig
from .prompt import (
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptLearningConfig,
    PromptTuningConfig,
)

__all__ = [
    "LoraConfig",
    "PeftConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptLearningConfig",
    "PromptTuningConfig",
]
