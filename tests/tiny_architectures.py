"""Random two-layer models of several transformers architectures, and the task that each is for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.tiny_models import VOCABULARY, tiny_llama

# Wide weights, and an output layer of its own: what is generated then depends on more than the last token.
_LIVELY = {"initializer_range": 0.2, "init_std": 0.2, "tie_word_embeddings": False}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_STACK = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_BERT = {**_STACK, "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4}
_BART = {
    **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))},
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "max_position_embeddings": 64,
    "forced_eos_token_id": None,
}  # fmt: skip


def _made(kind: str, config: str, **settings: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        torch.manual_seed(0)
        return getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()

    return make


MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama": ("CAUSAL_LM", lambda: tiny_llama(initializer_range=0.2)),
    "gpt2": ("CAUSAL_LM", _made("GPT2LMHeadModel", "GPT2Config", **_GPT2, **_ENDS, **_LIVELY)),
    "bloom": ("CAUSAL_LM", _made("BloomForCausalLM", "BloomConfig", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **_ENDS, **_LIVELY)),
    "opt": ("CAUSAL_LM", _made("OPTForCausalLM", "OPTConfig", **_STACK, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32, **_ENDS, **_LIVELY)),
    "mistral": ("CAUSAL_LM", _made("MistralForCausalLM", "MistralConfig", **_STACK, intermediate_size=48, num_key_value_heads=2, sliding_window=6, **_ENDS, **_LIVELY)),
    "t5": ("SEQ_2_SEQ_LM", _made("T5ForConditionalGeneration", "T5Config", **_T5, num_layers=2, decoder_start_token_id=0, **_ENDS)),
    "t5-three-layers": ("SEQ_2_SEQ_LM", _made("T5ForConditionalGeneration", "T5Config", **_T5, num_layers=3, decoder_start_token_id=0, **_ENDS)),
    "bart": ("SEQ_2_SEQ_LM", _made("BartForConditionalGeneration", "BartConfig", **_BART, decoder_start_token_id=2, init_std=0.2, **_ENDS)),
    "bert-sequence": ("SEQ_CLS", _made("BertForSequenceClassification", "BertConfig", **_BERT, num_labels=3)),
    "llama-sequence": ("SEQ_CLS", _made("LlamaForSequenceClassification", "LlamaConfig", **_BERT, num_labels=3, num_key_value_heads=2)),
    "bert-token": ("TOKEN_CLS", _made("BertForTokenClassification", "BertConfig", **_BERT, num_labels=3)),
    "bert-question": ("QUESTION_ANS", _made("BertForQuestionAnswering", "BertConfig", **_BERT)),
    "bert": ("FEATURE_EXTRACTION", _made("BertModel", "BertConfig", **_BERT)),
    "llama-features": ("FEATURE_EXTRACTION", _made("LlamaModel", "LlamaConfig", **_BERT, num_key_value_heads=2)),
}  # fmt: skip
