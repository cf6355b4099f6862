"""Configurations, with PEFT's field names, and the rules by which they choose modules."""

from .base import PeftConfig
from .initialisation import EvaConfig, LoftQConfig
from .lora import LoraConfig

__all__ = ["EvaConfig", "LoftQConfig", "LoraConfig", "PeftConfig"]
