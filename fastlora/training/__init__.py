"""Fine-tuning as the command line runs it: data, packing, the loop, checkpoints, reports.

``finetune(FinetuneConfig(model=..., data=...))`` is what ``fastlora finetune`` calls. ``fastlora estimate`` and ``compare`` are
``fastlora.training.estimate.estimate`` and ``fastlora.training.compare.compare``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import FinetuneConfig
from .errors import FineTuneError, InputError, Interrupted, RunError

if TYPE_CHECKING:
    from .run import Summary, finetune

__all__ = [
    "FineTuneError",
    "FinetuneConfig",
    "InputError",
    "Interrupted",
    "RunError",
    "Summary",
    "finetune",
]


def __getattr__(name: str) -> Any:
    # torch and transformers load with the engine, not with the options: --help stays fast.
    if name in {"Summary", "finetune"}:
        return getattr(importlib.import_module(".run", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
