"""``LoraConfig``: PEFT's fields, checked when constructed, and its ``adapter_config.json``."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..layers.inits import changes_base_weight, check_init
from ..ops.support import MAX_RANK

CONFIG_NAME = "adapter_config.json"
TASK_TYPES = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)
_MAX_CONFIG_BYTES = 16 << 20

# Fields of peft 0.21 that say nothing about the adapter itself, whatever their value.
_IGNORED = (
    "auto_mapping",
    "peft_version",
    "runtime_config",
    "megatron_core",
    "loftq_config",
    "qalora_group_size",
)
# Fields of peft 0.21 that change the method: fastlora has none of them yet, so anything but the
# default is refused.
_UNSUPPORTED: dict[str, Any] = {
    "use_dora": False,
    "lora_bias": False,
    "use_qalora": False,
    "ensure_weight_tying": False,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "megatron_config": None,
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "velora_config": None,
    "monteclora_config": None,
    "kasa_config": None,
    "arrow_config": None,
    "use_bdlora": None,
}


@dataclass
class LoraConfig:
    """What to adapt and how. Field names, defaults and meaning are those of ``peft.LoraConfig``.

    Args:
        r: rank, 1 to 512.
        target_modules: names (a module matches when its name equals one or ends in "." + one), a
            regular expression that must match the whole name, "all-linear" (every linear but the
            output layer), or None for the default of a known transformers architecture.
        exclude_modules: names or a regular expression; these win over ``target_modules``.
        lora_alpha: scaling is lora_alpha / r (``use_rslora``: lora_alpha / sqrt(r)).
        lora_dropout: probability in [0, 1) on the low-rank path.
        fan_in_fan_out: kept for files that carry it; the layer's own type decides here.
        bias: "none", "all" (every bias of the model is trained) or "lora_only" (those of the
            adapted layers).
        use_rslora: rank-stabilised scaling (arXiv 2312.03732).
        modules_to_save: modules (names by their end) that are trained whole and saved with the
            adapter.
        init_lora_weights: True, False, "gaussian", "pissa", "pissa_niter_<n>" or "olora".
        layers_to_transform, layers_pattern: layer indices, and the name that precedes the index.
        rank_pattern, alpha_pattern: regular expression on the end of a module name -> its own r or
            lora_alpha; the first match wins.
        task_type: one of ``TASK_TYPES`` or None; a classification or question-answering type trains
            the head too.
        base_model_name_or_path, revision: recorded in the file.
        inference_mode: adapters are created frozen.
        quantize: None, or "nf4": every linear of the base but the output layer is kept in 4 bits (QLoRA, arXiv
            2305.14314), quantised one by one. It describes the base, so that it is not in the file.

    Every other field of ``peft.LoraConfig`` is accepted at its default.

    Raises:
        TypeError: a field has the wrong type, or is not known.
        ValueError: a value is out of range, or two fields exclude each other.
        NotImplementedError: a PEFT feature that fastlora does not have; the message says what to
            use.
    """

    peft_type: ClassVar[str] = "LORA"
    is_prompt_learning: ClassVar[bool] = False
    is_adaption_prompt: ClassVar[bool] = False

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    quantize: str | None = None
    use_dora: bool = False
    lora_bias: bool = False
    layer_replication: Any = None
    target_parameters: Any = None
    trainable_token_indices: Any = None
    alora_invocation_tokens: Any = None
    use_qalora: bool = False
    ensure_weight_tying: bool = False
    megatron_config: Any = None
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    velora_config: Any = None
    monteclora_config: Any = None
    kasa_config: Any = None
    arrow_config: Any = None
    use_bdlora: Any = None

    def __post_init__(self) -> None:
        self._refuse_unsupported()
        self._check_numbers()
        self._check_choices()
        self._check_modules()
        self._check_patterns()

    def _refuse_unsupported(self) -> None:
        for name, default in _UNSUPPORTED.items():
            value = getattr(self, name)
            if value != default and value not in ([], {}):
                raise NotImplementedError(
                    f"{name}: got {value!r}; fastlora's own layers do not have it, accepted is "
                    f"{default!r}. Use peft.LoraConfig({name}=...) with peft.get_peft_model, and "
                    "fastlora.accelerate(model) on the result"
                )

    def _check_numbers(self) -> None:
        _check_rank("r", self.r)
        _check_alpha("lora_alpha", self.lora_alpha)
        p = self.lora_dropout
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0.0 <= p < 1.0:
            raise ValueError(f"lora_dropout: got {p!r}; accepted are probabilities in [0, 1)")
        for name in ("fan_in_fan_out", "use_rslora", "inference_mode"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: got {getattr(self, name)!r}; accepted are True and False")

    def _check_choices(self) -> None:
        self.init_lora_weights = check_init(self.init_lora_weights)
        if self.quantize not in (None, "nf4"):
            raise ValueError(f"quantize: got {self.quantize!r}; accepted are None and 'nf4'")
        if self.quantize and changes_base_weight(self.init_lora_weights):
            raise ValueError(
                f"init_lora_weights: {self.init_lora_weights!r} takes its factors out of the base weight, which cannot be "
                "put back into 4 bits; use True with quantize"
            )
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias: got {self.bias!r}; accepted are 'none', 'all' and 'lora_only'")
        if self.task_type is not None:
            self.task_type = getattr(
                self.task_type, "value", self.task_type
            )  # peft.TaskType is an enum of these
            if self.task_type not in TASK_TYPES:
                raise ValueError(
                    f"task_type: got {self.task_type!r}; accepted are None, {', '.join(TASK_TYPES)}"
                )
        for name in ("base_model_name_or_path", "revision"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name}: got {value!r}; accepted is a string or None")

    def _check_modules(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                _check_regex(name, value)
            elif value is not None:
                setattr(self, name, _names(name, value))
        if self.modules_to_save is not None:
            self.modules_to_save = _names("modules_to_save", self.modules_to_save)
            for value in self.modules_to_save:
                _check_regex("modules_to_save", value)
        if self.layers_to_transform is not None:
            indices = self.layers_to_transform
            indices = [indices] if isinstance(indices, int) else list(indices)
            if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in indices):
                raise ValueError(
                    f"layers_to_transform: got {self.layers_to_transform!r}; accepted are indices "
                    ">= 0"
                )
            if isinstance(self.target_modules, str):
                raise ValueError(
                    "layers_to_transform: it filters a list of target_modules; put the layers in "
                    "the regex"
                )
            if not isinstance(self.layers_to_transform, int):
                self.layers_to_transform = indices
        if self.layers_pattern:
            if self.layers_to_transform is None:
                raise ValueError(
                    "layers_pattern: it names where layers_to_transform counts; give both"
                )
            patterns = (
                [self.layers_pattern]
                if isinstance(self.layers_pattern, str)
                else self.layers_pattern
            )
            for pattern in _names("layers_pattern", patterns):
                _check_regex("layers_pattern", pattern)

    def _check_patterns(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            if value is None:
                setattr(self, name, {})
            elif not isinstance(value, dict):
                raise TypeError(
                    f"{name}: got {type(value).__name__}; accepted is a dict of pattern -> number"
                )
            for key, number in (value or {}).items():
                _check_regex(name, key)
                (_check_rank if name == "rank_pattern" else _check_alpha)(
                    f"{name}[{key!r}]", number
                )

    # Files.

    def to_dict(self) -> dict[str, Any]:
        """The fields as PEFT stores them. Those that fastlora does not have are left out, but for
        the two that serving engines look for (``use_dora``, ``lora_bias``): readers of other
        versions warn about fields they do not know."""
        left_out = {"quantize", *_UNSUPPORTED} - {"use_dora", "lora_bias"}
        values = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in left_out
        }
        values = {
            key: sorted(value) if isinstance(value, set) else value for key, value in values.items()
        }
        return {**values, "peft_type": self.peft_type}

    def to_json(self, **changes: Any) -> str:
        """``adapter_config.json``: sorted keys, indent 2, with ``changes`` for the file alone."""
        return json.dumps({**self.to_dict(), **changes}, indent=2, sort_keys=True)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``adapter_config.json`` into ``directory`` (made if missing)."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / CONFIG_NAME).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraConfig:
        """From PEFT's fields (``peft.LoraConfig(...).to_dict()``, a parsed file). Unknown keys are
        ignored with a warning.

        Raises:
            ValueError: ``peft_type`` is missing or not "LORA"; and as the constructor.
        """
        kind = getattr(values.get("peft_type"), "value", values.get("peft_type"))
        if kind != "LORA":
            raise ValueError(
                f"peft_type: got {kind!r}; accepted is 'LORA'. Load other methods with stock peft"
            )
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known - {"peft_type", *_IGNORED})
        if unknown:
            warnings.warn(
                f"LoraConfig: ignored unknown fields {unknown}, which a newer peft may have "
                "written",
                stacklevel=2,
            )
        return cls(**{key: value for key, value in values.items() if key in known})

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> LoraConfig:
        """Read ``adapter_config.json`` from a folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no JSON object, or describes something else than LoRA; and as the
                constructor.
        """
        path = Path(directory) / CONFIG_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: not found; accepted is a folder with {CONFIG_NAME}, as save_adapter "
                "writes"
            )
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ValueError(
                f"{path}: {path.stat().st_size} bytes is no adapter configuration; write it again"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}: not valid JSON ({error}); the file is torn or not an adapter "
                "configuration"
            ) from None
        if not isinstance(values, dict):
            raise ValueError(
                f"{path}: got a JSON {type(values).__name__}; accepted is an object of LoraConfig "
                "fields"
            )
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise type(error)(f"{path}: {error}") from error


def _check_rank(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise ValueError(f"{name}: got {value!r}; accepted are integers from 1 to {MAX_RANK}")


def _check_alpha(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}: got {value!r}; accepted are finite numbers")


def _check_regex(name: str, pattern: Any) -> None:
    if not isinstance(pattern, str):
        raise TypeError(f"{name}: got {pattern!r}; accepted are strings")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{name}: {pattern!r} is no regular expression ({error})") from None


def _names(name: str, value: Any) -> list[str]:
    """A list of module names in the order given (a set: sorted)."""
    if isinstance(value, (str, Mapping)) or not hasattr(value, "__iter__"):
        raise TypeError(f"{name}: got {value!r}; accepted is a list of module names")
    names = sorted(value, key=str) if isinstance(value, (set, frozenset)) else list(value)
    if any(not isinstance(item, str) or not item for item in names):
        raise TypeError(f"{name}: got {names!r}; accepted are non-empty module names")
    return list(dict.fromkeys(names))
