"""The configurations that fastlora and stock peft must agree on, and every difference that is meant.

A row is a model, the name of a configuration's class and its fields; ``TABLE`` maps a name to each. Rows that
differ in dtype or dropout are rows of their own. Bottleneck adapters, which PEFT does not have, are not here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import peft
import torch
from torch import nn

import fastlora
from fastlora import LoraConfig
from tests.models.prompts import COUNT
from tests.models.prompts import METHODS as PROMPTS
from tests.tiny_models import plain_net
from tests.tiny_zoo import TASKS, TYPES, tiny


class Row(NamedTuple):
    """``model``: of ``MODELS``. ``method``: the configuration's class. ``wide``: adapters in fp32 whatever the base's dtype (``autocast_adapter_dtype``)."""

    model: str
    method: str
    settings: dict[str, Any]
    dtype: torch.dtype = torch.float32
    wide: bool = True


_LIVELY: dict[str, Any] = {"initializer_range": 0.2, "pad_token_id": 0}
_BIASED = {**_LIVELY, "attention_bias": True, "mlp_bias": True}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_CAUSAL: dict[str, Callable[[], nn.Module]] = {
    "llama biased": partial(tiny, "llama", **_BIASED),
    "llama tied": partial(tiny, "llama", tie_word_embeddings=True, **_LIVELY),
    "gpt2 still": partial(tiny, "gpt2", **_NO_DROPOUT, **_LIVELY),
    **{
        kind: partial(tiny, kind, **_LIVELY)
        for kind in (*TYPES, "gemma3", "mixtral", "qwen2_moe", "gpt_oss", "llama4")
        if kind not in TASKS
    },
    # BERT and T5 as they are used above, for their task; these for their own head
    "bert masked": partial(tiny, "bert", **_LIVELY),
    "plain": plain_net,
}
# name -> the task that its inputs are for, and what makes the model
MODELS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    **TASKS,
    **{name: ("CAUSAL_LM", make) for name, make in _CAUSAL.items()},
}


def embeddings_of(base: nn.Module) -> list[str]:
    """The names of the modules that look up a base model's input embeddings."""
    ask = getattr(base, "get_input_embeddings", None)
    weight = (ask() if ask else base.embed).weight
    modules = base.named_modules()
    return [n for n, m in modules if isinstance(m, nn.Embedding) and m.weight is weight]


def build_base(name: str) -> Any:
    """The base model of a row: random, the same for the same name, with no bias of zeros nor norm of ones."""
    model = MODELS[name][1]()
    generator = torch.Generator().manual_seed(17)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


# LoRA on linears.
_QV = {"target_modules": ["q_proj", "v_proj"]}
_MLP = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
_LLAMA: dict[str, dict[str, Any]] = {
    "default targets": {"task_type": "CAUSAL_LM"},
    "rank 1": {**_QV, "r": 1, "lora_alpha": 1},
    "wide rank": {**_QV, "r": 24},
    "rslora": {**_MLP, "use_rslora": True},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.1\..*(q|o)_proj"},
    "regex of names": {"target_modules": r".*mlp\.(up|gate)_proj"},
    "a whole name": {"target_modules": ["model.layers.0.self_attn.q_proj", "down_proj"]},
    "excluded": {**_MLP, "exclude_modules": ["layers.0.self_attn.q_proj", "down_proj"]},
    "excluded by regex": {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
    "one layer": {**_MLP, "layers_to_transform": 1},
    "layers": {**_MLP, "layers_to_transform": [0], "layers_pattern": "layers"},
    "rank_pattern": {**_MLP, "rank_pattern": {"down_proj": 5, r"layers\.0.*v_proj": 2}},
    "alpha_pattern": {**_MLP, "alpha_pattern": {"q_proj": 3, r".*\.1\.mlp.*": 21}},
    "overlapping patterns": {**_MLP, "alpha_pattern": {"q_proj": 3, r".*": 21}, "rank_pattern": {"down_proj": 5, ".*_proj": 2}},
    "patterns and rslora": {
        **_MLP,
        "use_rslora": True,
        "rank_pattern": {"^model.layers.0.self_attn.q_proj": 5},
        "alpha_pattern": {"v_proj": 2.5},
    },
    "bias all": {**_QV, "bias": "all"},
    "bias lora_only": {**_MLP, "bias": "lora_only"},
    "bias all, saved": {**_QV, "bias": "all", "modules_to_save": ["o_proj", "norm"]},
    "saved": {**_QV, "modules_to_save": ["lm_head", "model.norm"]},
    "the output layer": {"target_modules": ["lm_head", "v_proj"]},
    "dropout": {**_MLP, "lora_dropout": 0.1},
    "dropout, all-linear": {"target_modules": "all-linear", "lora_dropout": 0.5},
    "dropout, rslora, bias": {**_QV, "lora_dropout": 0.25, "use_rslora": True, "bias": "lora_only"},
    "random": {**_QV, "init_lora_weights": False},
    "gaussian": {**_QV, "init_lora_weights": "gaussian"},
    "orthogonal": {**_QV, "init_lora_weights": "orthogonal"},
    "pissa": {**_MLP, "init_lora_weights": "pissa"},
    "pissa, fast": {**_QV, "init_lora_weights": "pissa_niter_4"},
    "olora": {**_MLP, "init_lora_weights": "olora"},
    "eva": {**_QV, "init_lora_weights": "eva"},
    "dora": {**_MLP, "use_dora": True},
    "dora, dropout": {**_MLP, "use_dora": True, "lora_dropout": 0.2},
    "dora, rslora, patterns": {**_MLP, "use_dora": True, "use_rslora": True, "rank_pattern": {"down_proj": 6}},
    "dora, pissa": {**_QV, "use_dora": True, "init_lora_weights": "pissa"},
    "dora, bias, saved": {**_QV, "use_dora": True, "bias": "all", "modules_to_save": ["norm"]},
    "lora_bias": {**_MLP, "lora_bias": True},
    "lora_bias, dropout": {**_QV, "lora_bias": True, "lora_dropout": 0.3, "bias": "lora_only"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding, dora": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "embedding, dora, dropout": {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True, "lora_dropout": 0.2},
    "embedding, random": {"target_modules": "model.embed_tokens", "init_lora_weights": False},
    "both ends": {"target_modules": ["embed_tokens", "lm_head"], "rank_pattern": {"embed_tokens": 2}},
    "embedding, head saved": {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
    "embedding saved": {**_QV, "modules_to_save": ["embed_tokens"]},
    "rows": {**_QV, "trainable_token_indices": [7, 3, 0, 50]},
    "rows, dora": {**_QV, "trainable_token_indices": [7, 3], "use_dora": True},
    "replicated": {**_MLP, "layer_replication": [[0, 2], [0, 1], [1, 2]]},
    "replicated, some": {**_MLP, "layer_replication": [[0, 2], [1, 2]], "layers_to_transform": [2], "lora_dropout": 0.1},
    "replicated, dora": {**_QV, "layer_replication": [[1, 2], [0, 2]], "use_dora": True},
    "a linear's weight": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
}  # fmt: skip

# LoRA on other kinds of modules, and of models.
_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
_TIED = {"ensure_weight_tying": True}
_CONV1D = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
_OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "conv1d": ("gpt2 still", _CONV1D),
    "conv1d, corrected": ("gpt2 still", {"target_modules": ["c_attn"]}),
    "conv1d, dropout": ("gpt2 still", {**_CONV1D, "lora_dropout": 0.1}),
    "conv1d, dora": ("gpt2 still", {**_CONV1D, "use_dora": True}),
    "conv1d, dora, dropout": ("gpt2 still", {**_CONV1D, "use_dora": True, "lora_dropout": 0.4}),
    "conv1d, lora_bias": ("gpt2 still", {**_CONV1D, "lora_bias": True}),
    "conv1d, pissa": ("gpt2 still", {**_CONV1D, "init_lora_weights": "pissa"}),
    "conv1d and embeddings": ("gpt2 still", {"target_modules": ["c_attn", "wte", "wpe"]}),
    "conv1d and embeddings, dora": ("gpt2 still", {"target_modules": ["c_attn", "wte", "wpe"], "use_dora": True}),
    "rows and conv1d": ("gpt2 still", {**_CONV1D, "trainable_token_indices": {"wte": [4]}}),
    "embedding tied": ("llama tied", {"target_modules": ["embed_tokens"], "use_rslora": True}),
    "tied, by the embedding": ("llama tied", {**_TIED, "target_modules": ["embed_tokens", "q_proj"]}),
    "tied, by the output layer": ("llama tied", {**_TIED, "target_modules": ["lm_head", "q_proj"]}),
    "tied, by both": ("llama tied", {**_TIED, "target_modules": ["lm_head", "model.embed_tokens"], "use_rslora": True}),
    "tied, by a regex": ("llama tied", {**_TIED, "target_modules": r".*q_proj|lm_head"}),
    "tied, dropout": ("llama tied", {**_TIED, "target_modules": ["embed_tokens"], "lora_dropout": 0.2}),
    "tied, alpha": ("llama tied", {**_TIED, "target_modules": ["embed_tokens"], "alpha_pattern": {"lm_head": 2}}),
    "tied, dora": ("llama tied", {**_TIED, "target_modules": ["embed_tokens"], "use_dora": True}),
    "tied, saved": ("llama tied", {**_TIED, **_QV, "modules_to_save": ["embed_tokens", "norm"]}),
    "tied, saved by the output layer": ("llama tied", {**_TIED, **_QV, "modules_to_save": ["lm_head"]}),
    "tied, rows": ("llama tied", {**_TIED, **_QV, "trainable_token_indices": {"embed_tokens": [7], "lm_head": [7]}}),
    "tied, and nothing to tie": ("llama biased", {**_TIED, "target_modules": ["embed_tokens"]}),
    "embedding scaled, dora": ("gemma3", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "embedding scaled": ("gemma3", {"target_modules": ["embed_tokens", "q_proj"]}),
    "rows tied": ("llama tied", {**_QV, "trainable_token_indices": [7, 3, 0]}),
    "rows of two": ("llama tied", {**_QV, "trainable_token_indices": {"embed_tokens": [7], "lm_head": [5, 7]}}),
    "rows of two alike": ("llama tied", {**_QV, "trainable_token_indices": {"embed_tokens": [7], "lm_head": [7]}}),
    "rows scaled": ("gemma3", {**_QV, "trainable_token_indices": [9, 4]}),
    "rows and experts": ("mixtral", {"target_parameters": _EXPERTS, "trainable_token_indices": [4]}),
    "experts": ("mixtral", {"target_parameters": _EXPERTS}),
    "experts, one": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": _EXPERTS[1:]}),
    "experts, patterns": ("mixtral", {"target_parameters": _EXPERTS, "rank_pattern": {"down_proj": 2}}),
    "experts, gaussian": ("qwen2_moe", {"target_parameters": _EXPERTS, "init_lora_weights": "gaussian"}),
    "experts transposed": ("gpt_oss", {"target_parameters": _EXPERTS}),
    "experts' biases": ("gpt_oss", {"target_parameters": ["experts.down_proj_bias", "experts.down_proj"]}),
    "experts, unmarked": ("llama4", {"target_parameters": _EXPERTS}),
    "plain": ("plain", {"target_modules": ["up", "down"]}),
    "plain, dora, bias, dropout": ("plain", {"target_modules": ["up", "down"], "use_dora": True, "bias": "all", "lora_dropout": 0.1}),
    "plain, bias, saved": ("plain", {"target_modules": ["up"], "bias": "all", "modules_to_save": ["head"]}),
    "plain, layers": ("plain", {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "t5, all-linear": ("t5", {"target_modules": "all-linear", "task_type": "SEQ_2_SEQ_LM"}),
    "t5, dora": ("t5", {"target_modules": ["q", "wi"], "use_dora": True, "task_type": "SEQ_2_SEQ_LM"}),
    "bert, all-linear": ("bert-sequence", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "bert, replicated": ("bert-sequence", {"layer_replication": [[0, 2], [0, 2]], "task_type": "SEQ_CLS"}),
    "bert, bias": ("bert-token", {"bias": "all", "task_type": "TOKEN_CLS"}),
}  # fmt: skip
_NARROW: dict[str, tuple[str, dict[str, Any]]] = {
    "": ("llama biased", {**_MLP}),
    "dora": ("llama biased", {**_MLP, "use_dora": True}),
    "lora_bias": ("llama biased", {**_MLP, "lora_bias": True}),
    "orthogonal": ("llama biased", {**_MLP, "init_lora_weights": "orthogonal"}),
    "dropout": ("llama biased", {**_MLP, "lora_dropout": 0.25}),
    "conv1d": ("gpt2 still", _CONV1D),
    "both ends": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "both ends, dora": ("llama", {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "experts": ("mixtral", {"target_parameters": _EXPERTS}),
    "rows tied": ("llama tied", {**_QV, "trainable_token_indices": [7, 3, 0]}),
}

# (IA)^3 and LN tuning.
_IA3: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in ("llama", "gpt2 still", "bert masked", "opt", "bloom")},
    **{kind: (kind, {}) for kind in ("gpt_neox", "roberta", "t5", "qwen2")},
    "no feedforward": ("llama", {"target_modules": ["q_proj", "gate_proj"], "feedforward_modules": []}),
    "regex": ("llama", {"target_modules": r".*(k_proj|down_proj)", "feedforward_modules": r".*\.1\..*down_proj"}),
    "excluded": ("llama", {"exclude_modules": r".*\.0\..*"}),
    "saved": ("llama", {"modules_to_save": ["lm_head"]}),
    "all-linear": ("llama", {"target_modules": "all-linear", "feedforward_modules": ["down_proj"]}),
    "drawn": ("llama", {"init_ia3_weights": False}),
    "sequence": ("bert-sequence", {"task_type": "SEQ_CLS"}),
}  # fmt: skip
_NORMS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in ("llama", "gpt2 still", "bloom", "t5", "gemma2")},
    "named": ("bert masked", {"target_modules": ["LayerNorm"]}),
    "saved": ("llama", {"modules_to_save": ["lm_head"], "target_modules": ["norm"]}),
    "token": ("bert-token", {"target_modules": ["LayerNorm"], "task_type": "TOKEN_CLS"}),
}
# Not Mixtral, which has default targets that stock peft 0.21.2 forgets before it uses them.
_FAMILIES = ("qwen2", "qwen3", "gemma", "gemma2", "gpt_neox", "bert masked", "roberta")


def _lora(settings: dict[str, Any]) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 6, **settings}


TABLE: dict[str, Row] = {
    **{f"lora {name}": Row("llama biased", "LoraConfig", _lora(given)) for name, given in _LLAMA.items()},
    **{f"lora {name}": Row(model, "LoraConfig", _lora(given)) for name, (model, given) in _OTHERS.items()},
    **{f"lora on {kind}": Row(kind, "LoraConfig", _lora({})) for kind in _FAMILIES},
    **{f"lora for {name}": Row(name, "LoraConfig", _lora({"task_type": task})) for name, (task, _) in TASKS.items()},
    **{f"lora bf16 {name}": Row(model, "LoraConfig", _lora(given), torch.bfloat16) for name, (model, given) in _NARROW.items()},
    **{f"lora fp16 {name}": Row(_NARROW[name][0], "LoraConfig", _lora(_NARROW[name][1]), torch.float16) for name in ("", "conv1d", "both ends", "experts", "rows tied")},
    "lora fp64": Row("llama biased", "LoraConfig", _lora(_MLP), torch.float64),
    "lora bf16, narrow": Row("llama biased", "LoraConfig", _lora(_MLP), torch.bfloat16, wide=False),
    **{f"ia3 {name}": Row(model, "IA3Config", given) for name, (model, given) in _IA3.items()},
    "ia3 bf16": Row("llama", "IA3Config", {}, torch.bfloat16),
    "ia3 bf16, narrow": Row("llama", "IA3Config", {}, torch.bfloat16, wide=False),
    **{f"norms {name}": Row(model, "LNTuningConfig", given) for name, (model, given) in _NORMS.items()},
    "norms bf16": Row("llama", "LNTuningConfig", {}, torch.bfloat16),
    "norms bf16, narrow": Row("llama", "LNTuningConfig", {}, torch.bfloat16, wide=False),
    **{
        f"{method} for {name}": Row(name, kind, {"num_virtual_tokens": COUNT, "task_type": task, **given})
        for method, (kind, given) in PROMPTS.items()
        for name, (task, _) in TASKS.items()
    },
}  # fmt: skip


# ---- Differences that are meant ------------------------------------------------------------------------------

# Parameters: names of either library -> those that both are compared by, one regular expression after another.
_NAMES = (
    (r"\.base_layer(?=\.(weight|bias)$)", ""),
    (r"lora_B\.default\.bias$", "lora_bias.default"),
    (r"(lora_A|lora_B|lora_magnitude_vector)\.default\.weight$", r"\1.default"),
    (r"token_adapter\.", ""),
    # Virtual tokens are a part of the model here, beside it in PEFT.
    (r"^base_model\.(?!model\.)", "base_model.model."),
    (r"^prompt_encoder\.", "base_model.model.virtual_tokens.encoders."),
    (r"lstm_head", "transform.lstm"),
    (r"mlp_head", "transform"),
    (r"transform\.mlp\.", "transform."),
)
# With ensure_weight_tying PEFT has two Parameters over one memory where fastlora has one: the output layer's -> the embedding's,
# which is its transpose. Gradients are of each use in PEFT, of both here.
TWINS = {
    f"base_model.model.lm_head.{own}.default": f"base_model.model.model.embed_tokens.{other}.default"
    for own, other in (("lora_A", "lora_embedding_B"), ("lora_B", "lora_embedding_A"))
}

# Keys of PEFT's file alone: base weights of adapted embeddings, and with bias="all" the biases of a module that is trained
# whole once more.
_TWICE = r"\.base_layer\.weight$|\.original_module\.bias$|\.modules_to_save\.(default\.)?bias$"


def common_name(name: str) -> str:
    """The name of a parameter of either library by which both are compared."""
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def same_start(row: Row, name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """One seed gives one adapter, but for rounding in what is computed from the base's weight."""
    init = str(row.settings.get("init_lora_weights", True))
    if "magnitude" in name:  # PEFT rounds the norms to the base's dtype
        torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(row.dtype).eps, atol=1e-6)
    elif "pissa" in init:  # a singular vector has two signs
        torch.testing.assert_close(ours.abs(), theirs.abs(), rtol=1e-3, atol=1e-4)
    elif row.settings.get("ensure_weight_tying") and name in TWINS.values():
        # PEFT draws into the memory of the transpose: the same numbers in another order
        assert torch.equal(ours.flatten().sort().values, theirs.flatten().sort().values), name
    elif init == "olora":
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(ours, theirs), name


# Fields of PEFT's that are not in fastlora's file: what no adapter needs, and what fastlora does not have.
_NOT_OURS = {
    "LORA": {*LoraConfig.unsupported, *LoraConfig.ignored} - {"auto_mapping"},
}


def tensors_of_file(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What fastlora's file has, of PEFT's: no base weights, which are in the base, and no bias twice."""
    return {key: value for key, value in theirs.items() if not re.search(_TWICE, key)}


_SETS = ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save", "target_parameters")  # fmt: skip


def fields(values: dict[str, Any], row: Row) -> dict[str, Any]:
    """A configuration file, with lists that stand for sets sorted.

    "all-linear" is in the file as the names that it meant; fastlora always writes the ends of them that mean the same.
    """
    kept = {
        k: sorted(set(v)) if k in _SETS and isinstance(v, list) else v for k, v in values.items()
    }
    if row.settings.get("target_parameters"):
        kept["target_modules"] = kept["target_modules"] or []  # none, either way
    if row.settings.get("target_modules") == "all-linear":
        kept["target_modules"] = sorted({n.rpartition(".")[2] for n in kept["target_modules"]})
    return kept


# (row, reader) where the file that stock peft wrote does not say what it was written for. IA3Config wants feedforward_modules
# among target_modules, which are whole names by then; patterns, of which the first match wins, are sorted.
UNREADABLE = {
    ("ia3 all-linear", peft),
    ("lora tied, dora", peft),
    ("lora overlapping patterns", peft),
    ("lora overlapping patterns", fastlora),
}


def fields_of_file(theirs: dict[str, Any]) -> dict[str, Any]:
    """What fastlora's file has, of the fields in PEFT's."""
    left_out = {"peft_version", *_NOT_OURS.get(theirs["peft_type"], ())}
    unsupported = LoraConfig.unsupported if theirs["peft_type"] == "LORA" else {}
    assert all(theirs[name] == value for name, value in unsupported.items() if name in theirs)
    return {name: value for name, value in theirs.items() if name not in left_out}
