"""Prompt learning's configurations: PEFT's fields, checked when constructed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from .base import PeftConfig
from .checks import check_choice, check_count, check_flag, check_probability, module_names

_MLP_LAYERS = 2  # PEFT's default for encoder_num_layers, which its MLP ignores


@dataclass(kw_only=True)
class PromptLearningConfig(PeftConfig):
    """The fields of every method that trains virtual tokens in front of the input.

    Args:
        num_virtual_tokens: how many.
        task_type: needed to build a model: it says what becomes of labels and token types.
        token_dim: their width. None: the embedding's; for a prefix, that of a layer's keys.
        num_transformer_submodules: 1, or 2 for an encoder and a decoder. None: as the task has it.
        num_attention_heads, num_layers: of the base. None: read from its configuration.
        modules_to_save: modules (names by their end) that are trained whole and saved with the adapter.

    Raises:
        TypeError, ValueError: as ``PeftConfig``.
    """

    is_prompt_learning: ClassVar[bool] = True
    prefix: ClassVar[str] = "virtual_tokens."

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_virtual_tokens", self.num_virtual_tokens)
        for name in ("token_dim", "num_attention_heads", "num_layers", "encoder_hidden_size"):
            if getattr(self, name, None) is not None:
                check_count(name, getattr(self, name))
        check_choice("num_transformer_submodules", self.num_transformer_submodules, (None, 1, 2))
        if self.modules_to_save is not None:
            self.modules_to_save = module_names("modules_to_save", self.modules_to_save)


@dataclass(kw_only=True)
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning (arXiv 2104.08691): embeddings in front of the input's. ``peft.PromptTuningConfig``'s fields.

    Args:
        prompt_tuning_init: "RANDOM", "SAMPLE_VOCAB" (embeddings of tokens drawn from the vocabulary) or "TEXT".
        prompt_tuning_init_text: for "TEXT": what to begin with; repeated or cut to the number of tokens.
        tokenizer_name_or_path: for "TEXT": what ``transformers.AutoTokenizer.from_pretrained`` takes.
        tokenizer_kwargs: for "TEXT": its keywords. ``trust_remote_code`` is dropped, as in PEFT: the file may be anyone's.

    The other fields are those of ``PromptLearningConfig``.
    """

    peft_type: ClassVar[str] = "PROMPT_TUNING"

    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # peft.PromptTuningInit is an enum of these
        init = getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init)
        check_choice("prompt_tuning_init", init, ("RANDOM", "SAMPLE_VOCAB", "TEXT"))
        self.prompt_tuning_init = init
        for name in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name}: got {value!r}; accepted is a string or None")
            if init == "TEXT" and not value:
                raise ValueError(f"{name}: got {value!r}; prompt_tuning_init='TEXT' needs it")
        if self.tokenizer_kwargs is not None and not isinstance(self.tokenizer_kwargs, dict):
            raise TypeError(f"tokenizer_kwargs: got {self.tokenizer_kwargs!r}; accepted is a dict")
        if self.tokenizer_kwargs and init != "TEXT":
            raise ValueError(
                f"tokenizer_kwargs: prompt_tuning_init={init!r} has no tokenizer; leave them out, or use 'TEXT'"
            )


@dataclass(kw_only=True)
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning (arXiv 2101.00190): keys and values in front of every layer's. ``peft.PrefixTuningConfig``'s fields.

    Args:
        init_weights: None, or "zero": keys and values begin at zero.
        prefix_projection: they are made from smaller embeddings by an MLP, which only training needs: files hold its
            output.
        encoder_hidden_size: the MLP's hidden width. None: ``token_dim``.

    The other fields are those of ``PromptLearningConfig``.
    """

    peft_type: ClassVar[str] = "PREFIX_TUNING"

    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("init_weights", self.init_weights, (None, "zero"))
        check_flag("prefix_projection", self.prefix_projection)


@dataclass(kw_only=True)
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning (arXiv 2103.10385): embeddings in front of the input's, made by a small network, which only training
    needs: files hold its output. ``peft.PromptEncoderConfig``'s fields.

    Args:
        encoder_reparameterization_type: "MLP" (three linears), or "LSTM" (both directions, then two linears).
        encoder_hidden_size: its hidden width. None: ``token_dim``.
        encoder_num_layers: layers of the LSTM.
        encoder_dropout: probability in [0, 1) between the LSTM's layers.

    The other fields are those of ``PromptLearningConfig``.
    """

    peft_type: ClassVar[str] = "P_TUNING"

    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = _MLP_LAYERS
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        # peft.PromptEncoderReparameterizationType is an enum of these
        kind = self.encoder_reparameterization_type
        kind = getattr(kind, "value", kind)
        check_choice("encoder_reparameterization_type", kind, ("MLP", "LSTM"))
        self.encoder_reparameterization_type = kind
        check_count("encoder_num_layers", self.encoder_num_layers)
        check_probability("encoder_dropout", self.encoder_dropout)
        if kind == "MLP" and self.encoder_num_layers != _MLP_LAYERS:
            warnings.warn(
                f"encoder_num_layers: got {self.encoder_num_layers}, which is not used: the MLP has three linears",
                stacklevel=3,
            )
