"""Optimizers whose parameter groups know about adapters."""

from .loraplus import create_loraplus_optimizer

__all__ = ["create_loraplus_optimizer"]
