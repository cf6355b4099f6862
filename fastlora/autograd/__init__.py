"""One torch.autograd.Function per public function."""

from .lora_linear import LoraLinearFunction

__all__ = ["LoraLinearFunction"]
