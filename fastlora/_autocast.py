"""The one question everybody asks of autocast, on any device type torch has."""

from __future__ import annotations

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype autocast is casting to on this kind of device; None where it is off, and on meta, which has none.

    (torch.amp.is_autocast_available would ask more generally, but torch 2.11 cannot trace it.)
    """
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
