"""Moving a model to a device: all of it, or none."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def move(model: nn.Module, device: torch.device | str) -> None:
    """``model.to(device)``; if that fails half-way (no memory there, say), everything is back where it was.

    Until it has gone well the tensors stay at their old place as well.
    """
    undo = [_bookmark(module) for module in model.modules()]
    try:
        model.to(device)
    except BaseException:
        for back in undo:
            back()
        raise


def _bookmark(module: nn.Module) -> Callable[[], None]:
    """What puts the module's own tensors back: the same objects, so that tied ones stay tied, over the same memory."""
    parameters, buffers = dict(module._parameters), dict(module._buffers)
    tensors = [t for t in (*parameters.values(), *buffers.values()) if t is not None]
    tensors += [t.grad for t in tensors if t.grad is not None]
    # bitsandbytes' Params4bit says beside its data how that is quantised, and whether it is yet.
    before = [(tensor, tensor.data, dict(vars(tensor))) for tensor in tensors]

    def back() -> None:
        module._parameters.update(parameters)
        module._buffers.update(buffers)
        for tensor, data, extras in before:
            tensor.data = data
            vars(tensor).update(extras)
            state = extras.get("quant_state")
            if state is not None:
                state.to(data.device)  # bitsandbytes moves its scales in place

    return back
