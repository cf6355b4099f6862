"""What one fine-tuning run is: every option, its default and its limits. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError

METHODS = ("lora", "rslora", "qlora", "full")
ADAPTER_OPTIONS = frozenset({"r", "trainable_share", "alpha", "dropout", "target_modules"})
LOSS_ON = ("answer", "all")
DTYPES = ("auto", "float32", "bfloat16", "float16")
BACKENDS = ("auto", "cuda", "triton", "torch")
SCHEDULES = ("cosine", "constant")

# What may differ when a run is continued: where and how long, never what is computed.
CHANGEABLE_ON_RESUME = frozenset(
    {
        "output",
        "epochs",
        "max_steps",
        "max_minutes",
        "save_every",
        "keep_last",
        "eval_every",
        "backend",
    }
)


@dataclass(frozen=True)
class FinetuneConfig:
    """One run of ``fastlora finetune``; the field names are the option names.

    ``model`` is a transformers directory or a .gguf file, ``data`` a .txt or .jsonl file. The run
    ends at the first of ``epochs``, ``max_steps`` and ``max_minutes`` (training time, evaluation
    before and after apart). ``method`` is ``"lora"``, ``"rslora"``, ``"qlora"``, or ``"full"``, which trains all weights in
    fp32 and has no use for ``r``, ``trainable_share``, ``alpha``, ``dropout`` and ``target_modules``: ``"all-linear"``, module
    names split by commas, or ``"regex:..."``. ``watch`` is general text (.txt or .jsonl) whose perplexity is reported beside the held-out data's: what
    the model forgets. ``trainable_share`` replaces ``r`` by the largest rank that trains no more than that share.
    ``unfreeze_over``: share of the run over which layers begin to train one by one, from the output down.
    """

    model: str
    data: str
    output: str = "fastlora-run"
    eval_data: str | None = None
    method: str = "lora"
    r: int = 16
    trainable_share: float | None = None
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str = "all-linear"
    loss_on: str = "answer"
    packing: bool = True
    seq_length: int = 1024
    eval_fraction: float = 0.05
    eval_tokens: int = 65536
    eval_every: int = 0
    watch: str | None = None
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    batch_size: int = 4
    grad_accumulation: int = 1
    unfreeze_over: float = 0.0
    epochs: float = 1.0
    max_steps: int | None = None
    max_minutes: float | None = None
    seed: int = 0
    gradient_checkpointing: bool = False
    dtype: str = "auto"
    device: str = "auto"
    backend: str = "auto"
    deterministic: bool = True
    save_every: int = 100
    keep_last: int = 2
    sample_prompt: str | None = None
    sample_tokens: int = 64

    def validate(self) -> None:
        """Raise ``InputError`` naming the first option that cannot be."""
        for name, allowed in (
            ("method", METHODS),
            ("loss_on", LOSS_ON),
            ("dtype", DTYPES),
            ("backend", BACKENDS),
            ("schedule", SCHEDULES),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(f"{option(name)} {value!r} is not one of {', '.join(allowed)}")
        for name, low, high in (
            ("r", 1, 512),
            ("seq_length", 2, 1 << 20),
            ("batch_size", 1, 1 << 16),
            ("grad_accumulation", 1, 1 << 16),
            ("eval_tokens", 2, 1 << 40),
            ("eval_every", 0, 1 << 40),
            ("save_every", 0, 1 << 40),
            ("keep_last", 1, 1 << 20),
            ("sample_tokens", 1, 1 << 20),
            ("seed", 0, (1 << 63) - 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(f"{option(name)} {value} is not in {low}..{high}")
        for name, low_f, high_f in (
            ("dropout", 0.0, 0.999),
            ("eval_fraction", 0.0, 0.9),
            ("warmup", 0.0, 1.0),
            ("unfreeze_over", 0.0, 1.0),
            ("weight_decay", 0.0, 1e3),
            ("grad_clip", 0.0, 1e9),
        ):
            value = getattr(self, name)
            if not low_f <= value <= high_f:  # also refuses NaN
                raise InputError(f"{option(name)} {value} is not in {low_f:g}..{high_f:g}")
        for name in ("alpha", "learning_rate", "epochs", "max_steps", "max_minutes"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"{option(name)} {value} must be a positive number")
        if self.trainable_share is not None and not 0.0 < self.trainable_share < 1.0:
            raise InputError(
                f"--trainable-share {self.trainable_share:g} must be above 0 and below 1 (1% is 0.01)"
            )
        if self.trainable_share is not None and self.method == "full":
            raise InputError(
                "--trainable-share chooses a rank, which --method full does not have: leave one out"
            )
        if self.eval_data is None and self.eval_fraction == 0.0:
            raise InputError(
                "--eval-fraction 0 leaves nothing held out: give --eval-data FILE, or a fraction above 0"
            )
        if not self.target_modules.strip():
            raise InputError(
                "--target-modules is empty: give all-linear, names split by commas, or regex:PATTERN"
            )

    def to_json(self) -> dict[str, Any]:
        """As JSON values, paths made absolute so that a resume may start elsewhere."""
        values = dataclasses.asdict(self)
        for name in ("model", "data", "output", "eval_data", "watch"):
            if values[name] is not None:
                values[name] = str(Path(values[name]).resolve())
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> FinetuneConfig:
        """The inverse of ``to_json``; unknown keys (a newer version's) raise ``InputError``."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        missing = sorted({"model", "data"} - set(values))
        if unknown or missing:
            raise InputError(
                f"the saved configuration has unknown keys {unknown} and lacks {missing}: "
                "it was written by another version of fastlora"
            )
        return cls(**values)


def option(name: str) -> str:
    """The command-line spelling of a field, for messages."""
    return "--" + name.replace("_", "-")
