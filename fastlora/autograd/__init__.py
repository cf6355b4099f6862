"""One torch.autograd.Function per public function."""

from .lora_linear import LoraLinearFunction
from .lora_linear_segments import LoraLinearSegmentsFunction

__all__ = ["LoraLinearFunction", "LoraLinearSegmentsFunction"]
