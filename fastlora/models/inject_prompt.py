"""How virtual tokens enter a transformers model: a ``PromptLayer`` at its root, and hooks on what takes its input."""

from __future__ import annotations

import contextlib
import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import AdapterLayer, PrefixTokens, PromptLayer, VirtualTokens
from ..layers.prompts import LSTMHead, mlp_head, prefix_head
from ..methods.base import TASK_TYPES
from ..methods.matching import is_transformers_model
from ..methods.prompt import (
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptLearningConfig,
    PromptTuningConfig,
)
from .inject import Injection
from .peft_model import PeftModel
from .prompt_forward import (
    CrossAttentionHook,
    EncoderDecoderPrefixHook,
    EncoderPromptHook,
    Hook,
    PrefixHook,
    PromptHook,
    check_no_checkpointing,
)
from .prompt_model import PromptModel

ATTRIBUTE = "virtual_tokens"  # of the base model: its PromptLayer

_PLAIN_CACHES = ("full_attention", "sliding_attention", "chunked_attention")


class PromptInjection(Injection[PromptLearningConfig]):
    """Virtual tokens in front of the input (prompt tuning, P-tuning), or in every layer's cache (prefix tuning)."""

    # What takes the virtual tokens, and how.
    _hooks: list[tuple[nn.Module, type[Hook]]]

    def _resolve(self) -> None:
        self._check_task()
        if isinstance(self.config, PrefixTuningConfig):
            self._resolve_prefix()
        else:
            self._resolve_prompt()
        if getattr(self.config, "encoder_hidden_size", 0) is None:
            self.config.encoder_hidden_size = self.config.token_dim  # type: ignore[attr-defined]

    def _check_task(self) -> None:
        model: Any = self.model
        config, name = self.config, type(model).__name__
        if not is_transformers_model(model):
            raise ValueError(
                f"model: got a {name}; virtual tokens need a transformers model, whose inputs have known names"
            )
        if config.task_type is None:
            raise ValueError(
                f"task_type: got None; {config.peft_type} needs one of {', '.join(TASK_TYPES)}, by which labels and masks are "
                "extended"
            )
        if model.config.get_text_config() is not model.config:
            raise ValueError(
                f"model: a {name} has inputs beside text, whose places would move; give its language model"
            )
        self._encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        if self._encoder_decoder != (config.task_type == "SEQ_2_SEQ_LM"):
            raise ValueError(
                f"task_type: got {config.task_type!r} for a {name}; accepted with virtual tokens is 'SEQ_2_SEQ_LM' for "
                "encoder-decoders, and for them alone"
            )
        generates = hasattr(model, "prepare_inputs_for_generation")
        if config.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not generates:
            raise ValueError(
                f"task_type: got {config.task_type!r}, but a {name} has no language modelling head; use "
                "'FEATURE_EXTRACTION', or the model with its head"
            )
        if config.num_transformer_submodules is None:
            config.num_transformer_submodules = 2 if self._encoder_decoder else 1
        if config.num_transformer_submodules == 2 and not self._encoder_decoder:
            raise ValueError(
                "num_transformer_submodules: got 2; it counts an encoder and a decoder, and a "
                f"{name} is one stack: use 1"
            )
        base = model.config
        if config.num_layers is None:
            config.num_layers = self._known("num_layers", getattr(base, "num_hidden_layers", None))
        if config.num_attention_heads is None:
            heads = getattr(base, "num_attention_heads", None)
            config.num_attention_heads = self._known("num_attention_heads", heads)

    def _known(self, name: str, value: Any) -> int:
        if not isinstance(value, int):
            raise ValueError(
                f"{name}: not given, and the configuration of this {type(self.model).__name__} does not tell; give it"
            )
        return value

    # Prompts.

    def _resolve_prompt(self) -> None:
        model: Any = self.model
        taking = model.get_encoder() if self._encoder_decoder else model
        if not {"input_ids", "inputs_embeds"} <= set(_parameters(taking)):
            raise ValueError(
                f"model: the forward of a {type(taking).__name__} does not take input_ids and inputs_embeds, through which "
                "virtual tokens enter"
            )
        embeddings = taking.get_input_embeddings()
        width = getattr(embeddings, "embedding_dim", None)
        if width is None:
            width = self._known("token_dim", getattr(model.config, "hidden_size", None))
        if self.config.token_dim is None:
            self.config.token_dim = width
        if self.config.token_dim != width:
            raise ValueError(
                f"token_dim: got {self.config.token_dim}; the embeddings of this {type(model).__name__} have {width}"
            )
        self._embeddings = embeddings
        self._hooks = [(taking, EncoderPromptHook if self._encoder_decoder else PromptHook)]
        if self._encoder_decoder:
            self._hooks.append((model, CrossAttentionHook))  # the decoder sees more of the encoder

    # Prefixes.

    def _resolve_prefix(self) -> None:
        base: Any = self.model.config
        config = self.config
        taking = self._cached()
        self._check_caches(base)
        check_no_checkpointing(self.model)
        heads = getattr(base, "num_key_value_heads", None)
        width = getattr(base, "head_dim", None) or getattr(base, "d_kv", None)
        if width is None:
            width = self._known("token_dim", getattr(base, "hidden_size", None)) // self._known(
                "num_attention_heads", getattr(base, "num_attention_heads", None)
            )
        if heads is not None:  # as in PEFT: these alone can be meant
            config.num_attention_heads, config.token_dim = heads, heads * width
        if config.token_dim is None:
            config.token_dim = width * config.num_attention_heads  # type: ignore[operator]
        wanted = {
            "num_layers": _decoder_layers(base),
            "num_attention_heads": heads or base.num_attention_heads,
            "token_dim": (heads or base.num_attention_heads) * width,
        }
        for name, value in wanted.items():
            if getattr(config, name) != value:
                raise ValueError(
                    f"{name}: got {getattr(config, name)}; the keys and values of this {type(self.model).__name__} need "
                    f"{value}"
                )
        self._hooks = [(taking, EncoderDecoderPrefixHook if self._encoder_decoder else PrefixHook)]

    def _cached(self) -> nn.Module:
        """The module whose forward takes the cache: the model, or within it the one below its head."""
        model: Any = self.model
        for module in (model, model.base_model):
            if "past_key_values" in _parameters(module):
                found: nn.Module = module
                return found
        raise ValueError(
            f"model: the forward of a {type(model).__name__} takes no past_key_values, through which a prefix enters; use "
            "prompt tuning or P-tuning"
        )

    def _check_caches(self, base: Any) -> None:
        kinds = set(getattr(base, "layer_types", None) or []) - set(_PLAIN_CACHES)
        told = base.to_dict()  # its attributes give per_layer_config to every model
        odd = [
            name
            for name in (
                "per_layer_config",
                "global_head_dim",
                "num_kv_shared_layers",
                "kv_lora_rank",
                "multi_query",
            )
            if told.get(name)
        ]
        if kinds or odd or getattr(self.model, "_is_stateful", False):
            raise ValueError(
                f"model: the layers of a {type(self.model).__name__} do not all keep the same keys and values "
                f"({', '.join([*sorted(kinds), *odd]) or 'it has a state'}); use prompt tuning or P-tuning"
            )
        devices = set((getattr(self.model, "hf_device_map", None) or {}).values())
        if len(devices) > 1:
            raise ValueError(
                f"model: is spread over {sorted(map(str, devices))}; a prefix needs one device"
            )

    # The virtual tokens.

    def _plan_layers(self) -> None:
        self._new = self._tokens().to(**self._place())
        layer = getattr(self.model, ATTRIBUTE, None)
        self._added: PromptLayer | None = None
        self._handles: list[Any] = []
        if layer is None:
            self._added = PromptLayer(self.config.peft_type)
            self._added.add_adapter(self.adapter_name, self._new)
            return
        if layer.peft_type != self.config.peft_type:
            raise ValueError(
                f"peft_config: is {self.config.peft_type}, and the model was prepared for {layer.peft_type}; start from a base "
                "model that had no adapters"
            )
        self._plan_growth(ATTRIBUTE, layer)

    def _grow(self, name: str, layer: AdapterLayer) -> None:
        assert isinstance(layer, PromptLayer)
        layer.add_adapter(self.adapter_name, self._new)

    def _place(self) -> dict[str, Any]:
        base: Any = self.model
        dtype = torch.promote_types(base.dtype, torch.float32) if self._widen else base.dtype
        return {"device": base.device, "dtype": dtype}

    def _tokens(self) -> VirtualTokens:
        """As PEFT makes them, in the same order, so that one seed gives one start. Of a network only the output is left
        where nothing is to be trained: the file has no more."""
        config: Any = self.config
        count, width, task = config.num_virtual_tokens, config.token_dim, config.task_type
        rows = count * config.num_transformer_submodules
        if isinstance(config, PrefixTuningConfig):
            out = 2 * config.num_layers * width  # type: ignore[operator]
            transformed = config.prefix_projection and not config.inference_mode
            embedding = nn.Embedding(count, width if transformed else out)
            head = prefix_head(width, config.encoder_hidden_size, out) if transformed else None  # type: ignore[arg-type]
            if config.init_weights == "zero":
                for parameter in (head[-1] if head is not None else embedding).parameters():
                    nn.init.zeros_(parameter)
            return PrefixTokens(
                embedding,
                head,
                count,
                task,
                layers=config.num_layers,  # type: ignore[arg-type]
                heads=config.num_attention_heads,  # type: ignore[arg-type]
                stride=config.num_transformer_submodules,  # type: ignore[arg-type]
            )
        embedding = nn.Embedding(rows, width)
        if isinstance(config, PromptTuningConfig):
            if not config.inference_mode:
                self._begin(config, embedding)
            return VirtualTokens(embedding, None, count, task)
        return VirtualTokens(embedding, self._prompt_head(config), count, task)

    def _prompt_head(self, config: PromptEncoderConfig) -> nn.Module | None:
        width, hidden = config.token_dim, config.encoder_hidden_size
        assert width is not None and hidden is not None
        if config.inference_mode:
            return None
        if config.encoder_reparameterization_type == "MLP":
            return mlp_head(width, hidden)
        return LSTMHead(width, hidden, config.encoder_num_layers, config.encoder_dropout)

    def _begin(self, config: PromptTuningConfig, embedding: nn.Embedding) -> None:
        """Embeddings of tokens of the vocabulary, or of a text."""
        rows, vocabulary = embedding.num_embeddings, self._embeddings.num_embeddings
        if config.prompt_tuning_init == "RANDOM":
            return
        if config.prompt_tuning_init == "SAMPLE_VOCAB":
            ids = torch.randint(0, vocabulary, (rows,))
        else:
            ids = _text_ids(config, rows, vocabulary)
        weight: Tensor = self._embeddings.weight
        with torch.no_grad():
            embedding.weight = nn.Parameter(self._embeddings(ids.to(weight.device)).float())

    def _plan_copies(self) -> None:
        super()._plan_copies()
        hooked = {id(module) for module, _ in self._hooks}
        for swap in self._swaps:
            if any(id(module) in hooked for module in swap.old.modules()):
                raise ValueError(
                    f"modules_to_save: matches {swap.attribute!r}, which takes the virtual tokens: its trained copy would go "
                    "without them. Name parts of it"
                )

    # Doing it.

    def apply(self) -> None:
        if self._added is not None:
            self.model.add_module(ATTRIBUTE, self._added)
            for module, make in self._hooks:
                hook = make(self._added, module)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        super().apply()

    def undo(self) -> None:
        super().undo()
        if self._added is not None:
            for handle in self._handles:
                handle.remove()
            self.model._modules.pop(ATTRIBUTE, None)

    def _kind(self) -> type[PeftModel]:
        with contextlib.suppress(ImportError):
            from .hf import TransformersPromptModel

            return TransformersPromptModel
        return PromptModel


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _decoder_layers(base: Any) -> int:
    for name in ("num_decoder_layers", "decoder_layers", "num_hidden_layers"):
        value = getattr(base, name, None)
        if value is not None and (name == "num_hidden_layers" or base.is_encoder_decoder):
            return int(value)
    raise ValueError("num_layers: the model's configuration does not tell; prefix tuning needs it")


def _text_ids(config: PromptTuningConfig, rows: int, vocabulary: int) -> Tensor:
    """The tokens of ``prompt_tuning_init_text``, repeated or cut to ``rows``."""
    from transformers import AutoTokenizer

    settings = {
        k: v for k, v in (config.tokenizer_kwargs or {}).items() if k != "trust_remote_code"
    }
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **settings)
    ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids or max(ids) >= vocabulary:
        raise ValueError(
            f"prompt_tuning_init_text: {config.prompt_tuning_init_text!r} is {ids[:8]} to the tokenizer "
            f"{config.tokenizer_name_or_path!r}; accepted are tokens of the model, below {vocabulary}, one at least"
        )
    return torch.tensor((ids * math.ceil(rows / len(ids)))[:rows])
