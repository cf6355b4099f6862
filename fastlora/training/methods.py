"""Every ``--method``: what it is, which options it has, and what they are where they are not given. Imports no torch.

``finetune``, ``compare`` and ``estimate``, their help and their refusals are made of this table.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """What a method makes of an option.

    Args:
        field: of the method's configuration, which gets the value; None: the run itself uses it.
        default: None leaves the configuration's own.
        values: those accepted -> what the field gets; empty: any, which the configuration checks.
    """

    field: str | None = None
    default: Any = None
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class MethodKind:
    """One line of the table.

    Args:
        title: for the reader.
        page: of docs/.
        learning_rate: where none is given; AdamW's.
        configuration: what makes the adapter's configuration, by its name in ``fastlora.methods``; None: no adapter, all
            weights are trained.
        options: of this method alone, by their names in ``FinetuneConfig``.
        fixed: fields of the configuration that make it this method.
        refuses: options of every run that this method cannot have -> why, and what to do.
        trains_base: parameters of the base itself are trained, in fp32: products in 16 bits need autocast.
    """

    title: str
    page: str
    learning_rate: float
    configuration: str | None
    options: Mapping[str, Option] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    refuses: Mapping[str, str] = dataclasses.field(default_factory=dict)
    trains_base: bool = False


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def _lora(*inits: str) -> dict[str, Option]:
    return {
        "r": Option("r", 16),
        "trainable_share": Option(),
        "alpha": Option("lora_alpha", 32.0),
        "dropout": Option("lora_dropout", 0.0),
        "target_modules": Option("target_modules", "all-linear"),
        "init": Option("init_lora_weights", None, _same("gaussian", "orthogonal", "eva", *inits)),
        "loraplus_ratio": Option(),
    }


# PiSSA and OLoRA take factors out of a weight, which cannot be put back into 4 bits; LoftQ makes up for those bits.
_IN_FLOATS = _lora("pissa", "olora")
_IN_4_BITS = _lora("loftq")

_ACTIVATIONS = _same("relu", "gelu", "gelu_new", "swish", "leakyrelu", "tanh", "sigmoid", "mish", "linear")  # fmt: skip


def _bottleneck(reduction_factor: float, activation: str) -> dict[str, Option]:
    return {
        "reduction_factor": Option("reduction_factor", reduction_factor),
        "activation": Option("non_linearity", activation, _ACTIVATIONS),
        "dropout": Option("dropout", 0.0),
        "target_modules": Option("target_modules"),
    }


def _encoder(field: str, **values: Any) -> dict[str, Option]:
    """The network that makes virtual tokens in training; the first of ``values`` is the default."""
    return {
        "encoder": Option(field, next(iter(values)), values),
        "encoder_hidden_size": Option("encoder_hidden_size"),
    }


_TOKENS = {"virtual_tokens": Option("num_virtual_tokens", 20)}
_IN_FRONT = {
    "packing": "of the documents packed into a row only the first would see the virtual tokens in front; leave --packing out",
    "unfreeze_over": "virtual tokens are in no layer; leave it out",
}
_NO_RECOMPUTING = {
    "gradient_checkpointing": "layers that compute again get no cache, and a prefix is in the cache; leave it out, or take "
    "prompt_tuning or p_tuning"
}

METHODS: dict[str, MethodKind] = {
    "lora": MethodKind("LoRA", "lora", 2e-4, "LoraConfig", _IN_FLOATS),
    "rslora": MethodKind(
        "LoRA scaled by alpha / sqrt r",
        "lora",
        2e-4,
        "LoraConfig",
        _IN_FLOATS,
        {"use_rslora": True},
    ),
    "qlora": MethodKind(
        "LoRA over a base in 4 bits", "qlora", 2e-4, "LoraConfig", _IN_4_BITS, {"quantize": "nf4"}
    ),
    "dora": MethodKind("DoRA", "dora", 2e-4, "LoraConfig", _IN_FLOATS, {"use_dora": True}),
    "qdora": MethodKind(
        "DoRA over a base in 4 bits",
        "dora",
        2e-4,
        "LoraConfig",
        _IN_4_BITS,
        {"use_dora": True, "quantize": "nf4"},
    ),
    "houlsby": MethodKind(
        "bottleneck adapters behind attention and feed-forward",
        "bottleneck",
        1e-3,
        "HoulsbyConfig",
        _bottleneck(16, "swish"),
    ),
    "pfeiffer": MethodKind(
        "bottleneck adapters behind the feed-forward",
        "bottleneck",
        1e-3,
        "PfeifferConfig",
        _bottleneck(16, "relu"),
    ),
    "parallel": MethodKind(
        "bottleneck adapters beside the feed-forward",
        "bottleneck",
        1e-5,  # it reads a stream that no norm has tamed, and counts four times
        "ParallelConfig",
        _bottleneck(2, "relu"),
    ),
    "prefix_tuning": MethodKind(
        "keys and values in front of every layer's",
        "prefix_tuning",
        1e-2,
        "PrefixTuningConfig",
        {**_TOKENS, **_encoder("prefix_projection", none=False, mlp=True)},
        {"init_weights": "zero"},  # random keys and values would hide the input from the model
        refuses=_IN_FRONT | _NO_RECOMPUTING,
    ),
    "prompt_tuning": MethodKind(
        "embeddings in front of the input's",
        "prompt_tuning",
        3e-2,
        "PromptTuningConfig",
        {**_TOKENS, "prompt_text": Option()},
        {"prompt_tuning_init": "SAMPLE_VOCAB"},
        refuses=_IN_FRONT,
    ),
    "p_tuning": MethodKind(
        "the same, made by a network",
        "prompt_tuning",
        1e-3,
        "PromptEncoderConfig",
        {**_TOKENS, **_encoder("encoder_reparameterization_type", mlp="MLP", lstm="LSTM")},
        refuses=_IN_FRONT,
    ),
    "ia3": MethodKind(
        "vectors that scale", "ia3", 3e-3, "IA3Config", {"target_modules": Option("target_modules")}
    ),
    "ln_tuning": MethodKind(
        "the norms",
        "ln_tuning",
        1e-3,
        "LNTuningConfig",
        {"target_modules": Option("target_modules")},
        trains_base=True,
    ),
    "full": MethodKind("all weights", "keeping_knowledge", 2e-5, None, trains_base=True),
}

METHOD_OPTIONS = tuple(dict.fromkeys(name for kind in METHODS.values() for name in kind.options))


def having(name: str) -> list[str]:
    """The methods that have an option."""
    return [method for method, kind in METHODS.items() if name in kind.options]


def having_told(name: str) -> str:
    """For help: the methods that have an option, and what it is by default."""
    told = []
    for default, methods in itertools.groupby(
        having(name), key=lambda method: METHODS[method].options[name].default
    ):
        value = f"{default:g}" if isinstance(default, float) else default
        told.append(names(methods) + ("" if default is None else f" (default {value})"))
    return f"{'; '.join(told)}."


def names(values: Iterable[Any]) -> str:
    """For messages and help."""
    return ", ".join(map(str, values))
