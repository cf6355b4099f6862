"""What a result file says about where it was taken."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .timing import l2_bytes


def environment(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, commit and date, as JSON values; what cannot be found out reads "unknown"."""
    found: dict[str, Any] = {
        "device": device_name(device),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "fastlora": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    for package in ("torch", "triton", "peft", "bitsandbytes", "transformers", "numpy"):
        found[package] = _version(package)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": l2_bytes(device),
            "cuda": torch.version.cuda,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    else:
        found["threads"] = torch.get_num_threads()
    return found


def device_name(device: torch.device) -> str:
    """ "NVIDIA H200", or "CPU" and the processor's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()})"


def file_stem(benchmark: str, where: dict[str, Any]) -> str:
    """A result file's name without its ending: "linear-nvidia-h200"."""
    return f"{benchmark}-" + re.sub(r"[^a-z0-9]+", "-", where["device"].lower()).strip("-")


def commit() -> str:
    """The commit of the checkout this package runs from, "-dirty" after it with local changes.

    ``FASTLORA_COMMIT`` wins: for a copy of the tree that travelled without its git directory.
    """
    told = os.environ.get("FASTLORA_COMMIT")
    if told:
        return told
    root = Path(__file__).resolve().parents[2]
    if not (
        root / ".git"
    ).exists():  # an installed package may lie inside somebody else's repository
        return "unknown"
    head = _output("git", "-C", str(root), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if changed not in ("", "unknown") else head


def _version(package: str) -> str:
    """Of the module that was used, however it came, or else of the package installed."""
    loaded = getattr(sys.modules.get(package), "__version__", None)
    if loaded is not None:
        return str(loaded)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().split("\n")[0]
