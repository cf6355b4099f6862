"""Files. safetensors and JSON only; nothing is ever unpickled."""

from .adapter import load_adapter, save_adapter

__all__ = ["load_adapter", "save_adapter"]
