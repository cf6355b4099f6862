"""The autograd functions that the public functions apply."""

from .column_scale import ColumnScaleFunction
from .lora_linear import LoraLinearFunction

__all__ = ["ColumnScaleFunction", "LoraLinearFunction"]
