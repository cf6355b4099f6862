"""What one fine-tuning run is: every option, its default and its limits. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError
from .methods import METHOD_OPTIONS, METHODS, MethodKind, Option, having, names

LOSS_ON = ("answer", "all")
DTYPES = ("auto", "float32", "bfloat16", "float16")
BACKENDS = ("auto", "cuda", "triton", "torch")
SCHEDULES = ("cosine", "constant")
_ABSENT = Option()

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
    before and after apart). ``method`` is one of ``METHODS``, which tells what it has of the options in
    ``METHOD_OPTIONS`` and what they, and ``learning_rate``, are where they are None. ``target_modules`` is ``"all-linear"``,
    module names split by commas, or ``"regex:..."``. ``trainable_share`` replaces ``r`` by the largest rank that trains no
    more than that share. ``packing`` None: wherever the method can. ``watch`` is general text (.txt or .jsonl) whose
    perplexity is reported beside the held-out data's: what the model forgets. ``unfreeze_over``: share of the run over which
    layers begin to train one by one, from the output down.
    """

    model: str
    data: str
    output: str = "fastlora-run"
    eval_data: str | None = None
    method: str = "lora"
    r: int | None = None
    trainable_share: float | None = None
    alpha: float | None = None
    dropout: float | None = None
    target_modules: str | None = None
    init: str | None = None
    loraplus_ratio: float | None = None
    reduction_factor: float | None = None
    activation: str | None = None
    virtual_tokens: int | None = None
    encoder: str | None = None
    encoder_hidden_size: int | None = None
    prompt_text: str | None = None
    loss_on: str = "answer"
    packing: bool | None = None
    seq_length: int = 1024
    eval_fraction: float = 0.05
    eval_tokens: int = 65536
    eval_every: int = 0
    watch: str | None = None
    learning_rate: float | None = None
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

    @property
    def kind(self) -> MethodKind:
        """What ``method`` is."""
        return METHODS[self.method]

    def chosen(self, name: str) -> Any:
        """An option of the method: as given, or the method's default; None where it has no such option."""
        given = getattr(self, name)
        return given if given is not None else self.kind.options.get(name, _ABSENT).default

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return self.learning_rate if self.learning_rate is not None else self.kind.learning_rate

    @property
    def packs(self) -> bool:
        """Whether documents share a row."""
        return self.packing if self.packing is not None else "packing" not in self.kind.refuses

    def validate(self) -> None:
        """Raise ``InputError`` naming the first option that cannot be."""
        for name, allowed in (
            ("method", tuple(METHODS)),
            ("loss_on", LOSS_ON),
            ("dtype", DTYPES),
            ("backend", BACKENDS),
            ("schedule", SCHEDULES),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(f"{option(name)} {value!r} is not one of {names(allowed)}")
        self._check_method_options()
        for name, low, high in (
            ("r", 1, 512),
            ("virtual_tokens", 1, 1 << 16),
            ("encoder_hidden_size", 1, 1 << 20),
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
            if value is not None and not low <= value <= high:
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
            if value is not None and not low_f <= value <= high_f:  # also refuses NaN
                raise InputError(f"{option(name)} {value} is not in {low_f:g}..{high_f:g}")
        for name in (
            *("alpha", "loraplus_ratio", "reduction_factor", "learning_rate"),
            *("epochs", "max_steps", "max_minutes"),
        ):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"{option(name)} {value} must be a positive number")
        if self.trainable_share is not None and not 0.0 < self.trainable_share < 1.0:
            raise InputError(
                f"--trainable-share {self.trainable_share:g} must be above 0 and below 1 (1% is 0.01)"
            )
        if self.eval_data is None and self.eval_fraction == 0.0:
            raise InputError(
                "--eval-fraction 0 leaves nothing held out: give --eval-data FILE, or a fraction above 0"
            )
        if self.target_modules is not None and not self.target_modules.strip():
            raise InputError(
                "--target-modules is empty: give all-linear, names split by commas, or regex:PATTERN"
            )

    def _check_method_options(self) -> None:
        kind = self.kind
        for name in METHOD_OPTIONS:
            value = getattr(self, name)
            if value is None:
                continue
            if name not in kind.options:
                raise InputError(
                    f"--method {self.method} has no {option(name)}: leave it out, or take one of {names(having(name))}"
                )
            values = kind.options[name].values
            if values and value not in values:
                others = [m for m in having(name) if value in METHODS[m].options[name].values]
                elsewhere = f" ({value} goes with {names(others)})" if others else ""
                raise InputError(
                    f"{option(name)} {value!r} with --method {self.method} is not one of {names(values)}{elsewhere}"
                )
        for name, why in kind.refuses.items():
            if getattr(self, name):
                raise InputError(f"--method {self.method} goes without {option(name)}: {why}")
        if self.trainable_share is not None and self.r is not None:
            raise InputError("--r and --trainable-share exclude each other")
        if self.trainable_share is not None and self.init == "eva":
            raise InputError(
                "--trainable-share picks one rank for all layers, and --init eva each layer's own: leave one out"
            )
        if self.encoder_hidden_size is not None and self.chosen("encoder") == "none":
            raise InputError("--encoder-hidden-size is of an encoder: give --encoder mlp as well")
        if self.prompt_text is not None and not self.prompt_text.strip():
            raise InputError("--prompt-text is empty: give a text, or leave it out")

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
