"""Files: adapters in PEFT's layout and checkpoints in bitsandbytes', safetensors only."""

from .adapter import load_adapter, save_adapter
from .hotswap import hotswap_adapter, prepare_hotswap

__all__ = ["hotswap_adapter", "load_adapter", "prepare_hotswap", "save_adapter"]
