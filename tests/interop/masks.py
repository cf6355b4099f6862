"""The dropout masks that fastlora's layers drew, for stock peft's layers to use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora import reference, rng
from fastlora.layers import LoRALayer


class Mask(NamedTuple):
    """Which elements of a layer's x are kept, and the factor that they get."""

    kept: Tensor
    scale: float


@contextlib.contextmanager
def exported(model: nn.Module) -> Iterator[dict[str, Mask]]:
    """Within: the mask of every layer with dropout, by the layer's name, of its last forward.

    A fused layer's mask is a function of the state that it draws (``fastlora.rng``), and made again from that. DoRA drops with
    torch's own generator, which is set back to where the layer found it.
    """
    drawn: dict[str, Mask] = {}
    states: list[Tensor] = []
    before: dict[str, Tensor] = {}
    handles = []
    draw = rng.draw_state

    def recorded(device: torch.device | str) -> Tensor:
        states.append(draw(device))
        return states[-1]

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            states.clear()
            before[name] = torch.get_rng_state()

        return hook

    def leave(name: str) -> Any:
        def hook(module: LoRALayer, args: tuple[Tensor], y: Tensor) -> None:
            (x,), p = args, module.lora_dropout["default"]
            if states:
                (state,) = states
                keep, cols = rng.keep_threshold(p), x.shape[-1]
                rows = x.numel() // cols
                kept = reference.unpack_mask(reference.mask(state, rows, cols, keep), rows, cols)
                drawn[name] = Mask(kept.view(x.shape), rng.keep_scale(keep))
                return
            with torch.random.fork_rng():
                torch.set_rng_state(before[name])
                drawn[name] = Mask(F.dropout(torch.ones_like(x), p) > 0, 1 / (1 - p))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, LoRALayer) and module.is_linear and module.lora_dropout["default"]:
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave(name)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rng, "draw_state", recorded)
        yield drawn
    for handle in handles:
        handle.remove()


class _Drop(nn.Module):
    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.mask.kept, x, 0) * self.mask.scale if self.training else x


def put_in(model: nn.Module, drawn: dict[str, Mask]) -> None:
    """Stock peft's layers of the same names drop what ``drawn`` says from now on, in place of their nn.Dropout."""
    for name, mask in drawn.items():
        layer: Any = model.get_submodule(name)
        assert isinstance(layer.lora_dropout["default"], nn.Dropout)
        layer.lora_dropout["default"] = _Drop(mask)
