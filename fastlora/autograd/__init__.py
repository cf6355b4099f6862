"""The autograd functions that the public functions apply."""

from .column_scale import ColumnScaleFunction, scale_columns
from .dora_linear import DoraLinearFunction
from .lora_linear import LoraLinearFunction
from .lora_linear_segments import LoraLinearSegmentsFunction

__all__ = [
    "ColumnScaleFunction",
    "DoraLinearFunction",
    "LoraLinearFunction",
    "LoraLinearSegmentsFunction",
    "scale_columns",
]
