"""Which modules do exactly what their class says: only those may be computed another way."""

from __future__ import annotations

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
