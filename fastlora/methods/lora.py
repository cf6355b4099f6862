"""``LoraConfig``: PEFT's fields, checked when constructed."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..layers.inits import changes_base_weight, check_init, check_lora_bias
from .base import PeftConfig, TargetedConfig
from .checks import (
    check_choice,
    check_finite,
    check_flag,
    check_indices,
    check_probability,
    check_rank,
    check_regex,
    module_names,
)
from .initialisation import EvaConfig, LoftQConfig, settings

# Fields of peft 0.21 that fastlora has not, and why: anything but the default is refused.
_REASONS = {
    "use_qalora": "QA-LoRA pools its input by groups of GPTQ's, which is no base of fastlora's own",
    "alora_invocation_tokens": "aLoRA acts from some tokens on, and layers are not told of positions",
    "megatron_config": "Megatron's parallel linears are not among the layers that fastlora replaces",
    "corda_config": "CorDA splits weights by covariances that other code than get_peft_model collects first",
    "lora_ga_config": "LoRA-GA begins with gradients that other code than get_peft_model collects first",
    "velora_config": "VeLoRA keeps projections of inputs for backward, which the kernels here need whole",
    "monteclora_config": "MonteCLoRA samples its factors at every forward and has a loss of its own",
    "kasa_config": "KaSA changes the base for good, has singular values between A and B, and a loss of its own",
    "arrow_config": "Arrow chooses among adapters token by token",
    "use_bdlora": "BD-LoRA's factors are block-diagonal, a layout of engines that serve them",
}
_UNSUPPORTED: dict[str, Any] = {**dict.fromkeys(_REASONS), "use_qalora": False}


@dataclass
class LoraConfig(TargetedConfig):
    """What to adapt and how. Field names, defaults and meaning are those of ``peft.LoraConfig``.

    Args:
        r: rank, 1 to 512.
        target_modules: names (a module matches when its name equals one or ends in "." + one), a
            regular expression that must match the whole name, "all-linear" (every linear but the
            output layer), or None for the default of a known transformers architecture.
        exclude_modules: names or a regular expression; these win over ``target_modules``.
        lora_alpha: scaling is lora_alpha / r (``use_rslora``: lora_alpha / sqrt(r)).
        lora_dropout: probability in [0, 1) on the low-rank path.
        fan_in_fan_out: the adapted layers store their weight [K, N], as transformers' Conv1D does. The layers say
            themselves: a value that does not fit is corrected with a warning.
        bias: "none", "all" (every bias of the model is trained) or "lora_only" (those of the
            adapted layers).
        use_rslora: rank-stabilised scaling (arXiv 2312.03732).
        modules_to_save: modules (names by their end) that are trained whole and saved with the
            adapter.
        use_dora: DoRA (arXiv 2402.09353): the rows of W + s B A get a trained length.
        lora_bias: the updates have biases of their own; with ``init_lora_weights`` True or False, and not beside DoRA.
        init_lora_weights: True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_<n>", "olora", "eva" (followed by
            ``fastlora.initialize_lora_eva_weights``), or with ``quantize`` "loftq".
        eva_config, loftq_config: settings of the last two, ``fastlora.EvaConfig`` and ``fastlora.LoftQConfig``.
        layers_to_transform, layers_pattern: layer indices, and the name that precedes the index.
        rank_pattern, alpha_pattern: regular expression on the end of a module name -> its own r or
            lora_alpha; the first match wins.
        target_parameters: Parameters (a name equals one or ends in "." + one) that modules read themselves, as those with
            stacked expert weights do; ``target_modules=None`` then means none. See ``layers.LoRAParameter``.
        trainable_token_indices: rows of the input embeddings that are trained, with those of a tied output layer; or
            a dict, names of modules by their end -> rows. See ``layers.TrainableTokens``.
        ensure_weight_tying: where the output layer has the weight of the input embeddings and one of both ("embed_tokens",
            "lm_head") is in ``target_modules`` or ``modules_to_save``, both are, and share one adapter or one trained copy.
        layer_replication: the model is rebuilt of runs of its layers, [start, end] one after another: [[0, 4], [2, 5]] is 0 1 2 3
            2 3 4. Layers that occur again share their weights and get adapters of their own. Without ``bias`` and ``quantize``.
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
    prefix: ClassVar[str] = "lora_"
    ignored: ClassVar[tuple[str, ...]] = (
        *PeftConfig.ignored,
        "runtime_config",
        "megatron_core",
        "qalora_group_size",
    )
    unsupported: ClassVar[Mapping[str, Any]] = _UNSUPPORTED
    reasons: ClassVar[Mapping[str, str]] = _REASONS
    meaning: ClassVar[tuple[str, ...]] = (
        "lora_alpha",
        "use_rslora",
        "alpha_pattern",
        "trainable_token_indices",
        "layer_replication",
    )
    unsaved: ClassVar[tuple[str, ...]] = ("quantize",)

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    eva_config: EvaConfig | dict[str, Any] | None = None
    loftq_config: LoftQConfig | dict[str, Any] = field(default_factory=dict)
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    quantize: str | None = None
    use_dora: bool = False
    lora_bias: bool = False
    ensure_weight_tying: bool = False
    layer_replication: list[list[int]] | None = None
    alora_invocation_tokens: Any = None
    use_qalora: bool = False
    megatron_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    velora_config: Any = None
    monteclora_config: Any = None
    kasa_config: Any = None
    arrow_config: Any = None
    use_bdlora: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank("r", self.r)
        check_finite("lora_alpha", self.lora_alpha)
        check_probability("lora_dropout", self.lora_dropout)
        check_flag("fan_in_fan_out", self.fan_in_fan_out)
        for flag in ("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying"):
            check_flag(flag, getattr(self, flag))
        check_choice("bias", self.bias, ("none", "all", "lora_only"))
        check_choice("quantize", self.quantize, (None, "nf4"))
        self._check_init()
        self._check_layers()
        self._check_replication()
        self._check_patterns()
        self._check_parts()

    def _check_init(self) -> None:
        self.init_lora_weights = init = check_init(self.init_lora_weights)
        check_lora_bias(self.lora_bias, self.use_dora, init)
        if self.eva_config is not None:
            self.eva_config = settings("eva_config", self.eva_config, EvaConfig)
        elif init == "eva":
            self.eva_config = EvaConfig()
        if self.eva_config is not None and init != "eva":
            warnings.warn("eva_config: is for init_lora_weights='eva', not used", stacklevel=4)
        loftq = settings("loftq_config", self.loftq_config, LoftQConfig)
        if self.loftq_config and init != "loftq":
            warnings.warn("loftq_config: is for init_lora_weights='loftq', not used", stacklevel=4)
        self.loftq_config = dataclasses.asdict(loftq) if init == "loftq" else {}
        if init == "loftq":
            if not self.quantize:
                raise ValueError(
                    "init_lora_weights: 'loftq' makes up for what quantising takes from a weight; use it with "
                    "quantize='nf4'"
                )
        elif self.quantize and changes_base_weight(init):
            raise ValueError(
                f"init_lora_weights: {self.init_lora_weights!r} takes its factors out of the base weight, which cannot be "
                "put back into 4 bits; use True with quantize"
            )

    def _check_parts(self) -> None:
        if self.target_parameters is not None:
            self.target_parameters = module_names("target_parameters", self.target_parameters)
            if self.target_parameters and self.lora_dropout:
                raise ValueError(
                    f"lora_dropout: got {self.lora_dropout} with target_parameters; accepted is 0.0, for a Parameter has no "
                    "input to drop from"
                )
        self._check_tokens()

    def _check_tokens(self) -> None:
        given = self.trainable_token_indices
        if given is None:
            return
        name = "trainable_token_indices"
        if not isinstance(given, dict):
            self.trainable_token_indices = check_indices(name, given)
            return
        for key in given:
            if not isinstance(key, str) or not key:
                raise TypeError(f"{name}: got {key!r} as a name; accepted are module names")
            if key in (self.modules_to_save or []):
                raise ValueError(f"{name}: {key!r} is in modules_to_save as well; give one of them")
        self.trainable_token_indices = {
            key: check_indices(f"{name}[{key!r}]", indices) for key, indices in given.items()
        }

    def _check_layers(self) -> None:
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
            for pattern in module_names("layers_pattern", patterns):
                check_regex("layers_pattern", pattern)

    def _check_replication(self) -> None:
        runs, name = self.layer_replication, "layer_replication"
        if runs is None:
            return
        if isinstance(runs, (str, Mapping)) or not hasattr(runs, "__iter__"):
            raise TypeError(f"{name}: got {runs!r}; accepted is a list of [start, end]")
        self.layer_replication = runs = [check_indices(name, run) for run in runs]
        if not runs or any(len(run) != 2 or run[0] >= run[1] for run in runs):
            raise ValueError(f"{name}: got {runs}; accepted are [start, end] with start below end")
        for other, accepted in (("bias", "none"), ("quantize", None)):
            if (given := getattr(self, other)) != accepted:
                raise ValueError(
                    f"{other}: got {given!r} with {name}, whose layers share what it changes; accepted is {accepted!r}"
                )

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
                check_regex(name, key)
                (check_rank if name == "rank_pattern" else check_finite)(f"{name}[{key!r}]", number)

    def to_dict(self) -> dict[str, Any]:
        """As PEFT stores them."""
        values = super().to_dict()
        if self.eva_config is not None:
            values["eva_config"] = vars(self.eva_config).copy()
        return values

    def to_json(self, **changes: Any) -> str:
        """``adapter_config.json``. LoftQ is not in it: it says how the 4-bit base came about, which is the reader's to
        give, and a reader that ran it again would change that base once more."""
        if self.init_lora_weights == "loftq":
            changes = {"init_lora_weights": True, "loftq_config": {}, **changes}
        return super().to_json(**changes)
