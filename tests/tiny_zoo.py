"""Tiny random transformers models of many architectures, and one way to run them all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.tiny_models import VOCABULARY, tiny_llama

_WIDTH, _LAYERS, _HEADS, _INNER = 32, 2, 4, 48
_USUAL = {
    "vocab_size": VOCABULARY,
    "hidden_size": _WIDTH,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "intermediate_size": _INNER,
    "max_position_embeddings": 64,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": _WIDTH, "n_layer": _LAYERS, "n_head": _HEADS}
_T5 = {"vocab_size": VOCABULARY, "d_model": _WIDTH, "d_kv": 8, "d_ff": _INNER}
# model_type -> (configuration, model, settings), names in transformers
_KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_USUAL, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**_USUAL, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_USUAL, "num_key_value_heads": 2}),
    "gemma": (
        "GemmaConfig",
        "GemmaForCausalLM",
        {**_USUAL, "num_key_value_heads": 4, "head_dim": 8},
    ),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**_USUAL, "num_key_value_heads": 4, "head_dim": 8},
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**_GPT2, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _USUAL),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {**_USUAL, "ffn_dim": _INNER, "word_embed_proj_dim": _WIDTH},
    ),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        {k: v for k, v in _GPT2.items() if k != "n_embd"} | {"hidden_size": _WIDTH},
    ),
    "bert": ("BertConfig", "BertForMaskedLM", _USUAL),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", _USUAL),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {**_T5, "num_layers": _LAYERS, "num_heads": _HEADS, "decoder_start_token_id": 0},
    ),
}
TYPES = ("llama", *_KINDS)


def tiny(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A random two-layer model, 32 wide; the same for the same seed."""
    import transformers

    if model_type == "llama":
        return tiny_llama(seed, **changes)
    config, model, settings = _KINDS[model_type]
    ends = {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(seed)
    full = getattr(transformers, config)(**{**settings, **ends, **changes})
    return getattr(transformers, model)(full).eval()


def run(model: Any, ids: Tensor) -> Any:
    """The model's outputs for ``ids``, with a loss of predicting them."""
    return model(input_ids=ids, labels=ids)
