"""Every method once: a tiny model of transformers with the adapter in it, for tests that all methods must pass."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import fastlora
from fastlora import (
    BottleneckConfig,
    HoulsbyConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    ParallelConfig,
    PfeifferConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from tests.tiny_models import VOCABULARY, tiny_llama
from tests.tiny_zoo import tiny

_QV = ["q_proj", "v_proj"]
_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
_VIRTUAL: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
_LSTM = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 12}


def _lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": _QV, **settings})


def _mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": VOCABULARY}
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, **experts)).eval()


class Method(NamedTuple):
    config: Callable[[], Any]
    base: Callable[[], Any] = tiny_llama
    name: str = ""  # the configuration's in peft, where it has the method

    def make(self, library: Any = fastlora, seed: int = 1) -> Any:
        """The base, the same for all, with a new adapter that ``seed`` drew."""
        base, config = self.base(), self.config()
        if library is not fastlora:
            config = getattr(library, self.name or "LoraConfig")(**_fields(config))
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return library.get_peft_model(base, config)

    def moved(self, library: Any = fastlora, seed: int = 2, scale: float = 0.1) -> Any:
        """The same, in eval mode, with an adapter that changes what the model computes: by name, alike in all libraries."""
        model, generator = self.make(library), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, p in sorted(model.named_parameters(), key=lambda item: _alike(item[0])):
                if p.requires_grad:
                    p.add_(torch.randn(p.shape, generator=generator) * scale)
        return model.eval()


def _fields(config: Any) -> dict[str, Any]:
    values = config.to_dict()
    return {k: v for k, v in values.items() if k != "peft_type"}


def _alike(name: str) -> str:
    """A parameter's name as it is in both libraries."""
    return re.sub(r"\.base_layer(?=\.(weight|bias)$)|\.token_adapter|\.weight", "", name)


METHODS: dict[str, Method] = {
    "lora": Method(_lora),
    "lora, dropout": Method(lambda: _lora(lora_dropout=0.2, use_rslora=True)),
    "lora, biases": Method(lambda: _lora(bias="all"), lambda: tiny_llama(attention_bias=True)),
    "lora, 4 bits": Method(lambda: _lora(quantize="nf4")),
    "lora, copies": Method(lambda: _lora(modules_to_save=["lm_head", "norm"])),
    "lora, embeddings": Method(lambda: _lora(target_modules=[*_QV, "embed_tokens"])),
    "lora, rows": Method(lambda: _lora(trainable_token_indices=[15, 23, 45])),
    "lora, parameters": Method(lambda: _lora(target_modules=_QV, target_parameters=_EXPERTS), _mixtral),
    "lora, conv1d": Method(lambda: _lora(target_modules=["c_attn"], fan_in_fan_out=True), lambda: tiny("gpt2")),
    "lora_bias": Method(lambda: _lora(lora_bias=True), lambda: tiny_llama(attention_bias=True)),
    "dora": Method(lambda: _lora(use_dora=True)),
    "dora, dropout": Method(lambda: _lora(use_dora=True, lora_dropout=0.2)),
    "dora, 4 bits": Method(lambda: _lora(use_dora=True, quantize="nf4")),
    "pissa": Method(lambda: _lora(init_lora_weights="pissa")),
    "ia3": Method(IA3Config, name="IA3Config"),
    "ln_tuning": Method(LNTuningConfig, name="LNTuningConfig"),
    "prompt": Method(lambda: PromptTuningConfig(**_VIRTUAL), name="PromptTuningConfig"),
    "p-mlp": Method(lambda: PromptEncoderConfig(**_VIRTUAL), name="PromptEncoderConfig"),
    "p-lstm": Method(lambda: PromptEncoderConfig(**_VIRTUAL, **_LSTM), name="PromptEncoderConfig"),
    "prefix": Method(lambda: PrefixTuningConfig(**_VIRTUAL), name="PrefixTuningConfig"),
    "prefix-mlp": Method(lambda: PrefixTuningConfig(**_VIRTUAL, prefix_projection=True, encoder_hidden_size=20), name="PrefixTuningConfig"),
    "houlsby": Method(lambda: HoulsbyConfig(reduction_factor=4)),
    "pfeiffer": Method(lambda: PfeifferConfig(reduction_factor=4)),
    "parallel": Method(lambda: ParallelConfig(reduction_factor=4)),
    "bottleneck": Method(lambda: BottleneckConfig(mh_adapter=False, output_adapter=True, reduction_factor=4, non_linearity="gelu", ln_before=True, use_gating=True, scaling="learned", dropout=0.1, modules_to_save=["lm_head"])),
}  # fmt: skip
VIRTUAL = ("prompt", "p-mlp", "p-lstm", "prefix", "prefix-mlp")
PREFIXES = ("prefix", "prefix-mlp")
BOTTLENECKS = ("houlsby", "pfeiffer", "parallel", "bottleneck")
FOUR_BITS = ("lora, 4 bits", "dora, 4 bits")
IN_PEFT = tuple(name for name in METHODS if name not in (*BOTTLENECKS, *FOUR_BITS))
