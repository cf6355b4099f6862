"""``LNTuningConfig``: PEFT's fields, and PEFT's default norms per architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import TargetedConfig

_LLAMA = ["input_layernorm", "post_attention_layernorm", "norm"]
_GEMMA2 = [
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "norm",
]
_BLOOM = ["input_layernorm", "post_attention_layernorm", "ln_f"]
_T5 = ["layer_norm", "final_layer_norm"]
_QWEN = ["post_attention_layernorm"]
# transformers' model_type -> target_modules when none are given, as in PEFT.
NORMS: dict[str, list[str]] = {
    **dict.fromkeys(("llama", "mistral", "gemma"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA2),
    **dict.fromkeys(("bloom", "falcon"), _BLOOM),
    **dict.fromkeys(("t5", "mt5"), _T5),
    **dict.fromkeys(("qwen2", "qwen3"), _QWEN),
    "bart": ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "gptj": ["ln_1", "ln_f"],
    "phi": ["input_layernorm", "final_layernorm"],
    "blip-2": ["layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"],
    "llava": [
        "multi_modal_projector",
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
        "embed_tokens",
        "lm_head",
    ],
}


@dataclass(kw_only=True)
class LNTuningConfig(TargetedConfig):
    """LN tuning: the norms are trained, all else is frozen (arXiv 2312.11420). Field names, defaults and meaning are those
    of ``peft.LNTuningConfig``.

    Args:
        target_modules, exclude_modules, modules_to_save: see ``TargetedConfig``. None: the default of a known
            transformers architecture. Any module with parameters can be trained so, not norms alone.

    Raises:
        TypeError: a field has the wrong type, or is not known.
    """

    peft_type: ClassVar[str] = "LN_TUNING"
    prefix: ClassVar[str] = "ln_tuning_"
