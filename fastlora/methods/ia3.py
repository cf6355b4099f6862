"""``IA3Config``: PEFT's fields, checked when constructed; and PEFT's default modules per architecture."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from .base import TargetedConfig
from .checks import check_flag, check_regex, module_names

# transformers' model_type -> (target_modules, feedforward_modules) when none are given, as in PEFT.
_QV_DOWN = (["q_proj", "v_proj", "down_proj"], ["down_proj"])
_KV_DOWN = (["k_proj", "v_proj", "down_proj"], ["down_proj"])
_FUSED = (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"])
_BERT = (["key", "value", "output.dense"], ["output.dense"])
_GPT2 = (["c_attn", "mlp.c_proj"], ["mlp.c_proj"])
_FC2 = (["q_proj", "v_proj", "fc2"], ["fc2"])
IA3_TARGETS: dict[str, tuple[list[str], list[str]]] = {
    **dict.fromkeys(("llama", "mistral"), _KV_DOWN),
    **dict.fromkeys(("llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), _QV_DOWN),
    "mixtral": (["k_proj", "v_proj", "w2"], ["w2"]),
    **dict.fromkeys(("bert", "roberta"), _BERT),
    "deberta-v2": (["key_proj", "value_proj", "output.dense"], ["output.dense"]),
    "deberta": (["in_proj", "output.dense"], ["output.dense"]),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), _GPT2),
    "gptj": (["q_proj", "v_proj", "fc_out"], ["fc_out"]),
    "gpt_neo": (["q_proj", "v_proj", "c_proj"], ["c_proj"]),
    **dict.fromkeys(("gpt_neox", "falcon", "RefinedWeb", "RefinedWebModel"), _FUSED),
    "bloom": (["query_key_value", "mlp.dense_4h_to_h"], ["mlp.dense_4h_to_h"]),
    "opt": (["q_proj", "k_proj", "fc2"], ["fc2"]),
    **dict.fromkeys(("bart", "phi"), _FC2),
    "t5": (["k", "v", "wo"], ["wo"]),
    "mt5": (["k", "v", "wi_1"], []),
}


@dataclass(kw_only=True)
class IA3Config(TargetedConfig):
    """(IA)^3: learned vectors scale keys, values and feed-forward activations (arXiv 2205.05638). Field names, defaults
    and meaning are those of ``peft.IA3Config``.

    Args:
        target_modules, exclude_modules, modules_to_save: see ``TargetedConfig``; also "all-linear". None: the default of
            a known transformers architecture.
        feedforward_modules: those of the target modules whose input is scaled rather than their output: ends of names,
            or a regular expression that must match the whole name. None: the architecture's default; []: none.
        fan_in_fan_out: kept for files that carry it; the layer's own type decides here.
        init_ia3_weights: vectors of ones, with which nothing changes; False: drawn from N(0, 1).

    Raises:
        TypeError: a field has the wrong type, or is not known.
        ValueError: ``feedforward_modules`` names what ``target_modules`` does not.
    """

    peft_type: ClassVar[str] = "IA3"
    prefix: ClassVar[str] = "ia3_"

    feedforward_modules: list[str] | set[str] | str | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("fan_in_fan_out", self.fan_in_fan_out)
        check_flag("init_ia3_weights", self.init_ia3_weights)
        names = self.feedforward_modules
        if isinstance(names, str):
            check_regex("feedforward_modules", names)
        elif names is not None:
            self.feedforward_modules = names = module_names("feedforward_modules", names)
            if isinstance(self.target_modules, list):
                # By their ends: peft writes "all-linear" as whole names beside short feedforward_modules.
                targets = [f".{name}" for name in self.target_modules]
                others = [n for n in names if not any(t.endswith(f".{n}") for t in targets)]
                if others:
                    raise ValueError(
                        f"feedforward_modules: {others} are not in target_modules={self.target_modules}; accepted is a "
                        "subset of them"
                    )

    def is_feedforward(self, name: str) -> bool:
        """Whether the input of the module ``name`` is scaled; ``feedforward_modules`` is resolved by now."""
        names = self.feedforward_modules or []
        if isinstance(names, str):
            return re.fullmatch(names, name) is not None
        return any(name.endswith(end) for end in names)
