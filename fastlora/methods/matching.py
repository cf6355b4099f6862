"""Which modules a configuration means. The rules are PEFT's, and tested against its functions."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..layers import AdapterLayer, LoRALayer
from ..layers.plain import is_conv1d
from .base import TargetedConfig

Number = TypeVar("Number", int, float)

# Heads that PEFT trains whole for a task type, where the model has them.
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

_QV = ["q_proj", "v_proj"]
_FUSED_QKV = ["query_key_value"]
_QUERY_VALUE = ["query", "value"]
_CONV1D_QKV = ["c_attn"]
_T5 = ["q", "v"]
# transformers' model_type -> target_modules when none are given. PEFT's table, for the
# architectures checked against it.
DEFAULT_TARGETS: dict[str, list[str]] = {
    **dict.fromkeys(
        ("llama", "llama4", "mistral", "mixtral", "stablelm", "opt", "gptj", "gpt_neo", "bart"), _QV
    ),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), _QV),
    "phi": [*_QV, "fc1", "fc2"],
    **dict.fromkeys(("bloom", "gpt_neox", "falcon", "chatglm"), _FUSED_QKV),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "layoutlm"), _QUERY_VALUE),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), _CONV1D_QKV),
    **dict.fromkeys(("t5", "mt5"), _T5),
    "mpt": ["Wqkv"],
    "codegen": ["qkv_proj"],
    "deberta-v2": ["query_proj", "value_proj"],
}


def is_transformers_model(model: nn.Module) -> bool:
    """Whether ``model`` is a transformers PreTrainedModel, without importing transformers."""
    if sys.modules.get("transformers") is None:
        return False
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def is_excluded(config: TargetedConfig, name: str) -> bool:
    """Whether ``exclude_modules`` or ``modules_to_save`` keep adapters off the module ``name``."""
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        if excluded and re.fullmatch(excluded, name):
            return True
    elif excluded and _ends_in(name, excluded):
        return True
    saved = config.modules_to_save or []
    return any(re.match(rf"(^|.*\.){part}($|\..*)", name) for part in saved)


def is_target(config: TargetedConfig, name: str) -> bool:
    """Whether the module ``name`` gets an adapter; ``target_modules`` is resolved by now."""
    if is_excluded(config, name):
        return False
    targets = config.target_modules or []
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if name in targets:
        return True
    return _ends_in(name, targets) and _in_layers(config, name)


def _ends_in(name: str, parts: Iterable[str]) -> bool:
    return any(name == part or name.endswith("." + part) for part in parts)


def _in_layers(config: TargetedConfig, name: str) -> bool:
    wanted = getattr(config, "layers_to_transform", None)
    if wanted is None or wanted == []:
        return True
    patterns = getattr(config, "layers_pattern", None) or []
    if isinstance(patterns, str):
        patterns = [patterns]
    # The first number after the pattern is the layer's index: ".*?" must not run on to an expert's,
    # say.
    attempts = (
        [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] if patterns else [r".*?\.[^.]*\.(\d+)\."]
    )
    for attempt in attempts:
        match = re.match(attempt, name)
        if match:
            index = int(match.groups()[-1])
            return index == wanted if isinstance(wanted, int) else index in wanted
    return False


def pattern_value(patterns: Mapping[str, Number], name: str, default: Number) -> Number:
    """The value of the first pattern matching ``name`` from a dot to its end, or ``default``."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def unmatched_patterns(patterns: Mapping[str, Number], names: Iterable[str]) -> list[str]:
    """The patterns that match none of ``names``: most likely misspelt."""
    names = list(names)
    return [p for p in patterns if not any(re.match(rf"(.*\.)?({p})$", name) for name in names)]


def resolve_targets(config: TargetedConfig, model: nn.Module) -> list[str] | str:
    """``target_modules`` as names or a regex: "all-linear" and None looked up in ``model``.

    Raises:
        ValueError: None, and the model's architecture has no default.
    """
    targets = config.target_modules
    if targets is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type not in DEFAULT_TARGETS:
            raise ValueError(
                "target_modules: not given, and there is no default for "
                f"{'a plain torch model' if model_type is None else repr(model_type)}; give a list "
                "of module names, a regular expression, or 'all-linear'"
            )
        return list(DEFAULT_TARGETS[model_type])
    if isinstance(targets, str):
        return all_linear(config, model) if targets.lower() == "all-linear" else targets
    return list(targets)


def quantizable(config: TargetedConfig, model: nn.Module) -> list[str]:
    """Names of every nn.Linear that a 4-bit base holds in 4 bits: all but the output layer, and what is trained whole."""
    skip = _output_module(config, model)
    saved = config.modules_to_save or []
    return [
        name
        for name, module in model.named_modules()
        if name
        and type(module) is nn.Linear
        and module is not skip
        and name.rpartition(".")[2] != "lm_head"
        and not any(name.endswith(part) or f"{part}." in name for part in saved)
    ]


def expert_parameters(model: nn.Module) -> dict[str, int]:
    """Name -> elements of every parameter that stacks matrices [experts, N, K]: no nn.Linear, it stays in floats."""
    convolutions = {id(p) for m in model.modules() if isinstance(m, _ConvNd) for p in m.parameters()}  # fmt: skip
    return {
        name: p.numel()
        for name, p in model.named_parameters()
        if p.ndim == 3 and p.shape[0] > 1 and id(p) not in convolutions and p.is_floating_point()
    }


def describe_experts(experts: dict[str, int]) -> str:
    """The warning about ``expert_parameters``."""
    return (
        f"{len(experts)} parameters of stacked matrices ({next(iter(experts))}, ...) are no linears and stay in floats: "
        f"{sum(experts.values()):,} elements"
    )


def base_view(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module, as the model's own code sees it: an adapter layer stands for its base, and has no inner parts."""
    modules = dict(model.named_modules())
    layers = [module for module in modules.values() if isinstance(module, AdapterLayer)]
    inside = {id(part) for layer in layers for part in layer.modules() if part is not layer}
    return {name: module for name, module in modules.items() if id(module) not in inside}


def all_linear(config: TargetedConfig, model: nn.Module) -> list[str]:
    """Names of every nn.Linear (or subclass) and Conv1D but the output layer or classifier."""
    skip = _output_module(config, model)
    return [
        name
        for name, module in base_view(model).items()
        if name and _is_linear(module) and module is not skip
    ]


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, LoRALayer):
        return module.is_linear
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _output_module(config: TargetedConfig, model: nn.Module) -> nn.Module | None:
    if not is_transformers_model(model):
        return None
    output: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
    if output is None and config.task_type == "SEQ_CLS":
        output = next(
            (
                getattr(model, n)
                for n in ("score", "classifier")
                if getattr(model, n, None) is not None
            ),
            None,
        )
    return output


def shortest_names(targets: list[str], all_names: Iterable[str]) -> list[str]:
    """``targets`` by their last parts where those mean the same modules, else as they are (PEFT's
    files do alike)."""
    short = sorted({name.rpartition(".")[2] for name in targets})
    same = {name for name in all_names if _ends_in(name, short)} == set(targets)
    return short if same else sorted(targets)
