"""Adapters in whole models: own layers (``get_peft_model``) or stock PEFT's (``accelerate``)."""

from .adopt import accelerate, acceleration_report, restore
from .entry import get_peft_model
from .eva import get_eva_state_dict, initialize_lora_eva_weights
from .peft_model import PeftModel
from .quantized import load_quantized
from .status import get_layer_status, get_model_status

__all__ = [
    "PeftModel",
    "accelerate",
    "acceleration_report",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "initialize_lora_eva_weights",
    "load_quantized",
    "restore",
]
