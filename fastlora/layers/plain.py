"""Which modules do exactly what their class says: only those may be computed another way."""

from __future__ import annotations

import copy

import torch
from torch import nn

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_undisturbed(module: nn.Module) -> bool:
    """No hook on ``module``, and no forward set on the instance (as accelerate's hooks do)."""
    hooked = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    return not hooked and "forward" not in module.__dict__


def is_plain_linear(module: nn.Module) -> bool:
    """Exactly nn.Linear, with an ordinary float weight [N, K], undisturbed."""
    if type(module) is not nn.Linear or not is_undisturbed(module):
        return False
    weight = module.weight
    shape = (module.out_features, module.in_features)
    return type(weight) is nn.Parameter and weight.dtype in FLOATS and weight.shape == shape


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, which is a linear with its weight stored [K, N]; without importing transformers."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def is_plain_conv1d(module: nn.Module) -> bool:
    """Exactly that, with an ordinary float weight, undisturbed."""
    if not is_conv1d(module) or not is_undisturbed(module):
        return False
    weight = module.weight
    return type(weight) is nn.Parameter and weight.dtype in FLOATS and weight.ndim == 2


def bare(module: nn.Module) -> nn.Module:
    """A copy of ``module`` with its settings and hooks, and without tensors."""
    made = copy.copy(module)
    made._parameters, made._buffers = {}, {}
    return made
