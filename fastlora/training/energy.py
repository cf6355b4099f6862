"""The energy that a GPU has used, by NVML's counter."""

from __future__ import annotations

from collections.abc import Callable

import torch


def energy_counter(device: torch.device) -> Callable[[], float] | str:
    """A function that returns joules so far, to be called before and after; or why there is none."""
    if device.type != "cuda":
        return f"NVML counts a GPU's energy, and this ran on {device.type}"
    try:
        import pynvml
    except ImportError:
        return "nvidia-ml-py is not installed: pip install nvidia-ml-py"
    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)  # as CUDA_VISIBLE_DEVICES has it
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if "-" in uuid[:4] else f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:  # from before Volta, or of no driver that tells
        return f"NVML tells no energy of {torch.cuda.get_device_name(device)}: {error}"
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
