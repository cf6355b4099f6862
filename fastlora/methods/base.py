"""What every configuration has: PEFT's common fields, and the way to ``adapter_config.json`` and back."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from . import adapters_layout
from .checks import check_flag, check_regex, module_names

if TYPE_CHECKING:
    from typing_extensions import Self

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


@dataclass(kw_only=True)
class PeftConfig:
    """The fields that PEFT gives every method.

    Args:
        task_type: one of ``TASK_TYPES`` or None; a classification or question-answering type trains
            the head too.
        base_model_name_or_path, revision: recorded in the file.
        inference_mode: adapters are created frozen.

    Raises:
        TypeError: a field has the wrong type, or is not known.
        ValueError: a value is out of range, or two fields exclude each other.
        NotImplementedError: a PEFT feature that fastlora does not have; the message says what to
            use.
    """

    peft_type: ClassVar[str] = ""
    is_prompt_learning: ClassVar[bool] = False
    prefix: ClassVar[str] = ""  # in the names of what trains, but for modules trained whole
    is_adaption_prompt: ClassVar[bool] = False
    # Fields of PEFT's that say nothing about the adapter itself, whatever their value.
    ignored: ClassVar[tuple[str, ...]] = ("auto_mapping", "peft_version")
    # Fields of PEFT's that change the method and that fastlora does not have: name -> the one value accepted.
    unsupported: ClassVar[Mapping[str, Any]] = {}
    # Why, by the same names.
    reasons: ClassVar[Mapping[str, str]] = {}
    # Fields of fastlora's that the file does not have.
    unsaved: ClassVar[tuple[str, ...]] = ()
    weights_name: ClassVar[str] = "adapter_model.safetensors"
    # Fields that an adapter's tensors mean something else without, and that their shapes do not tell.
    meaning: ClassVar[tuple[str, ...]] = ()
    methods: ClassVar[dict[str, type[PeftConfig]]] = {}  # by peft_type, filled as they are defined

    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __init_subclass__(cls) -> None:
        if cls.peft_type:
            PeftConfig.methods[cls.peft_type] = cls

    def __post_init__(self) -> None:
        self._refuse_unsupported()
        check_flag("inference_mode", self.inference_mode)
        if self.task_type is not None:
            # peft.TaskType is an enum of these
            self.task_type = getattr(self.task_type, "value", self.task_type)
            if self.task_type not in TASK_TYPES:
                raise ValueError(
                    f"task_type: got {self.task_type!r}; accepted are None, {', '.join(TASK_TYPES)}"
                )
        for name in ("base_model_name_or_path", "revision"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name}: got {value!r}; accepted is a string or None")

    def _refuse_unsupported(self) -> None:
        for name, accepted in self.unsupported.items():
            value = getattr(self, name)
            if value != accepted and value not in ([], {}):
                kind = f"peft.{type(self).__name__}"
                raise NotImplementedError(
                    f"{name}: got {value!r}; fastlora does not have it, accepted is {accepted!r}: {self.reasons[name]}. "
                    f"Use {kind}({name}=...) with peft.get_peft_model"
                    + (
                        ", and fastlora.accelerate(model) on the result"
                        if self.peft_type == "LORA"
                        else ""
                    )
                )

    # Files.

    def to_dict(self) -> dict[str, Any]:
        """The fields as PEFT stores them. Those that fastlora does not have are left out: readers of other versions
        warn about fields they do not know."""
        left_out = {*self.unsaved, *self.unsupported}
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
        """``adapter_config.json``: fields sorted, indent 2, with ``changes`` for the file alone. Patterns keep their order,
        for the first match wins."""
        return json.dumps(dict(sorted({**self.to_dict(), **changes}.items())), indent=2)

    def file_fields(self, model: nn.Module, adapter_name: str) -> dict[str, Any]:
        """What a file says of an adapter beside its configuration: ``changes`` of ``to_json``."""
        mapping = {
            "base_model_class": type(model).__name__,
            "parent_library": type(model).__module__,
        }
        return {"inference_mode": True, "auto_mapping": None if self.task_type else mapping}

    def own_keys(
        self, tensors: Mapping[str, Any], known: set[str], model: nn.Module, adapter_name: str
    ) -> Mapping[str, Any]:
        """A file's tensors, by the keys that this model would write (``known``)."""
        return tensors

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``adapter_config.json`` into ``directory`` (made if missing)."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / CONFIG_NAME).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From PEFT's fields (``peft.LoraConfig(...).to_dict()``, a parsed file). Unknown keys are
        ignored with a warning. ``PeftConfig.from_dict`` takes every method's.

        Raises:
            ValueError: ``peft_type`` is missing or another method's; and as the constructor.
        """
        kind = getattr(values.get("peft_type"), "value", values.get("peft_type"))
        if adapters_layout.is_layout(values):
            kind = "BOTTLENECK"
        if not cls.peft_type and isinstance(kind, str) and kind in cls.methods:
            found: Any = cls.methods[kind]
            return found.from_dict(values)
        if not cls.peft_type or kind != cls.peft_type:
            accepted = [cls.peft_type] if cls.peft_type else sorted(cls.methods)
            raise ValueError(
                f"peft_type: got {kind!r}; accepted is {' or '.join(map(repr, accepted))}. "
                "Load other methods with stock peft"
            )
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known - {"peft_type", *cls.ignored})
        if unknown:
            warnings.warn(
                f"{cls.__name__}: ignored unknown fields {unknown}, which a newer peft may have "
                "written",
                stacklevel=2,
            )
        return cls(**{key: value for key, value in values.items() if key in known})

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Read ``adapter_config.json`` from a folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no JSON object, or describes another method; and as the constructor.
        """
        path = Path(directory) / CONFIG_NAME
        try:
            return cls.from_dict(_read(path))
        except (TypeError, ValueError, NotImplementedError) as error:
            text = str(error)
            raise type(error)(text if str(path) in text else f"{path}: {text}") from error


@dataclass(kw_only=True)
class TargetedConfig(PeftConfig):
    """A method that acts at modules chosen by name.

    Args:
        target_modules: names (a module matches when its name equals one or ends in "." + one), a
            regular expression that must match the whole name, or None for the method's default.
        exclude_modules: names or a regular expression; these win over ``target_modules``.
        modules_to_save: modules (names by their end) that are trained whole and saved with the
            adapter.
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                check_regex(name, value)
            elif value is not None:
                setattr(self, name, module_names(name, value))
        if self.modules_to_save is not None:
            self.modules_to_save = module_names("modules_to_save", self.modules_to_save)
            for value in self.modules_to_save:
                check_regex("modules_to_save", value)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: not found; accepted is a folder with {CONFIG_NAME}, as save_adapter writes"
        )
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(
            f"{path}: {path.stat().st_size} bytes is no adapter configuration; write it again"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: not valid JSON ({error}); the file is torn or not an adapter configuration"
        ) from None
    if not isinstance(values, dict):
        raise ValueError(
            f"{path}: got a JSON {type(values).__name__}; accepted is an object of a "
            "configuration's fields"
        )
    return values
