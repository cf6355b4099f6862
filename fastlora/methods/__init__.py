"""Configurations, with PEFT's field names, and the rules by which they choose modules."""

from .base import PeftConfig
from .ia3 import IA3Config
from .ln_tuning import LNTuningConfig
from .lora import LoraConfig

__all__ = ["IA3Config", "LNTuningConfig", "LoraConfig", "PeftConfig"]
