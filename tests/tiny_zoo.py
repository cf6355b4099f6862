"""Tiny random transformers models of many architectures, one way to run them all, and the task that each is for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.tiny_models import VOCABULARY, some_ids, tiny_llama

_WIDTH, _LAYERS, _HEADS, _INNER = 32, 2, 4, 48
_USUAL = {
    "vocab_size": VOCABULARY,
    "hidden_size": _WIDTH,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "intermediate_size": _INNER,
    "max_position_embeddings": 64,
}
_EXPERTS = {
    **_USUAL,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
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
    "bart": (
        "BartConfig",
        "BartForConditionalGeneration",
        {
            **{
                f"{side}_{name}": value
                for side in ("encoder", "decoder")
                for name, value in (
                    ("layers", _LAYERS),
                    ("attention_heads", _HEADS),
                    ("ffn_dim", _INNER),
                )
            },
            "vocab_size": VOCABULARY,
            "d_model": _WIDTH,
            "max_position_embeddings": 64,
            "forced_eos_token_id": None,
            "decoder_start_token_id": 2,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_USUAL, "num_key_value_heads": 2, "head_dim": 8, "layer_types": ["full_attention"] * 2},
    ),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", _EXPERTS),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {**_EXPERTS, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    ),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {**_EXPERTS, "head_dim": 8}),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            **_EXPERTS,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": _INNER,
            "head_dim": 8,
            "interleave_moe_layer_step": 1,
        },
    ),
}
_NAMED = ("bart", "gemma3", "mixtral", "qwen2_moe", "gpt_oss", "llama4")  # for tests that name them
TYPES = ("llama", *(name for name in _KINDS if name not in _NAMED))


def tiny(model_type: str, seed: int = 0, head: str = "", **changes: Any) -> Any:
    """A random two-layer model, 32 wide; the same for the same seed. ``head``: another class of transformers'."""
    import transformers

    if model_type == "llama" and not head:
        return tiny_llama(seed, **changes)
    config, model, settings = _KINDS.get(model_type) or ("LlamaConfig", "", _USUAL)
    model = head or model
    ends = {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(seed)
    full = getattr(transformers, config)(**{**settings, **ends, **changes})
    return getattr(transformers, model)(full).eval()


def run(model: Any, ids: Tensor) -> Any:
    """The model's outputs for ``ids``, with a loss of predicting them."""
    return model(input_ids=ids, labels=ids)


# Wide weights, and an output layer of its own: what is generated then depends on more than the last token.
_LIVELY = {"initializer_range": 0.2, "init_std": 0.2, "tie_word_embeddings": False}
_PADDED = {"pad_token_id": 0}
_LABELS = {"num_labels": 3, **_PADDED}


def _causal(model_type: str, **changes: Any) -> tuple[str, Callable[[], Any]]:
    return "CAUSAL_LM", partial(tiny, model_type, **_LIVELY, **_PADDED, **changes)


# name -> the task, and what makes a model for it
TASKS: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama": ("CAUSAL_LM", partial(tiny, "llama", initializer_range=0.2)),
    "gpt2": _causal("gpt2"),
    "bloom": _causal("bloom"),
    "opt": _causal("opt"),
    "mistral": _causal("mistral", sliding_window=6),
    "t5": ("SEQ_2_SEQ_LM", partial(tiny, "t5", **_PADDED)),
    "t5-three-layers": ("SEQ_2_SEQ_LM", partial(tiny, "t5", num_layers=3, **_PADDED)),
    "bart": ("SEQ_2_SEQ_LM", partial(tiny, "bart", init_std=0.2, **_PADDED)),
    "bert-sequence": ("SEQ_CLS", partial(tiny, "bert", head="BertForSequenceClassification", **_LABELS)),
    "llama-sequence": ("SEQ_CLS", partial(tiny, "llama", head="LlamaForSequenceClassification", num_key_value_heads=2, **_LABELS)),
    "bert-token": ("TOKEN_CLS", partial(tiny, "bert", head="BertForTokenClassification", **_LABELS)),
    "bert-question": ("QUESTION_ANS", partial(tiny, "bert", head="BertForQuestionAnswering", **_PADDED)),
    "bert": ("FEATURE_EXTRACTION", partial(tiny, "bert", head="BertModel", **_PADDED)),
    "llama-features": ("FEATURE_EXTRACTION", partial(tiny, "llama", head="LlamaModel", num_key_value_heads=2, **_PADDED)),
}  # fmt: skip


def inputs(task: str, padding: str | None = None) -> dict[str, Tensor]:
    """What a model for ``task`` is given: ids, and labels where stock PEFT takes them. ``padding``: "left", "right" or none."""
    ids = some_ids()
    mask = torch.ones_like(ids)
    if padding is not None:
        mask[1, slice(-3, None) if padding == "right" else slice(3)] = 0
    labels = {
        "CAUSAL_LM": {"labels": ids},
        "SEQ_2_SEQ_LM": {"labels": some_ids(seed=8, length=5)},
        "SEQ_CLS": {"labels": torch.tensor([0, 2])},
        "QUESTION_ANS": {
            "start_positions": torch.tensor([1, 2]),
            "end_positions": torch.tensor([4, 3]),
        },
    }
    found = {"input_ids": ids * mask, **labels.get(task, {})}
    return found if padding is None else {**found, "attention_mask": mask}


def tensors(output: Any) -> dict[str, Tensor]:
    """A model's outputs that are tensors."""
    return {key: value for key, value in output.items() if isinstance(value, Tensor)}
