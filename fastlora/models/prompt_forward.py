"""How virtual tokens enter a model's forward: hooks that change its arguments.

Hooks and not a forward of one's own: ``generate`` calls the base model, and an encoder, past whatever wraps them. On a
step of ``generate`` the cache says what is to be done: while it is empty the virtual tokens go in; afterwards they are in
it, and only masks and positions, which generate counts without them, are extended. The classes stand at module level so
that a model with hooks pickles.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import PrefixTokens, PromptLayer, VirtualTokens

Arguments = dict[str, Any]

# task_type of models whose labels are one a token, and of those to which PEFT gives token types: virtual tokens get some.
_TOKEN_LABELS = ("CAUSAL_LM", "TOKEN_CLS")
_TOKEN_TYPES = ("SEQ_CLS", "TOKEN_CLS")
_IGNORED_LABEL = -100


class Hook:
    """A forward pre-hook (``with_kwargs=True``) that changes arguments while an adapter of ``layer`` acts.

    Args:
        layer: has the virtual tokens.
        module: what the hook is for.
    """

    def __init__(self, layer: PromptLayer, module: nn.Module) -> None:
        self.layer = layer
        self._names = tuple(inspect.signature(module.forward).parameters)

    def __call__(self, module: nn.Module, args: Any, kwargs: Arguments) -> Any:
        tokens = self.layer.acting()
        if tokens is None:
            return None
        arguments = {**dict(zip(self._names, args)), **kwargs}
        self.change(module, arguments, tokens)
        return (), arguments

    def change(self, module: nn.Module, arguments: Arguments, tokens: VirtualTokens) -> None:
        raise NotImplementedError


class PromptHook(Hook):
    """Embeddings in front of the input's: for a model that is one stack, decoder or encoder."""

    def change(self, module: nn.Module, arguments: Arguments, tokens: VirtualTokens) -> None:
        past = _past(arguments)
        _extend_mask(arguments, tokens.count)
        _prompt_positions(arguments, tokens, past)
        if tokens.task_type not in _TOKEN_TYPES:
            _ignore(arguments, "token_type_ids")
        if past:
            return
        _prepend(module, arguments, tokens)
        types, labels = arguments.get("token_type_ids"), arguments.get("labels")
        if types is not None:
            arguments["token_type_ids"] = _front(types, tokens.count, 0)
        if labels is not None and tokens.task_type in _TOKEN_LABELS:
            arguments["labels"] = _front(labels, tokens.count, _IGNORED_LABEL)


class EncoderPromptHook(Hook):
    """Embeddings in front of an encoder's input. Its mask comes extended from the whole model, and as it was from
    ``generate``."""

    def change(self, module: nn.Module, arguments: Arguments, tokens: VirtualTokens) -> None:
        mask = arguments.get("attention_mask")
        if mask is not None and mask.shape[-1] != _input(arguments).shape[1] + tokens.count:
            _extend_mask(arguments, tokens.count)
        _prepend(module, arguments, tokens)


class CrossAttentionHook(Hook):
    """The mask by which a decoder sees an encoder that has virtual tokens."""

    def change(self, module: nn.Module, arguments: Arguments, tokens: VirtualTokens) -> None:
        _extend_mask(arguments, tokens.count)


class PrefixHook(Hook):
    """Keys and values in front of every layer's, through the cache."""

    def change(self, module: Any, arguments: Arguments, tokens: VirtualTokens) -> None:
        assert isinstance(tokens, PrefixTokens)
        if module.training:
            check_no_checkpointing(module)
        past = _past(arguments)
        self.extend_mask(arguments, tokens.count, past)
        if arguments.get("position_ids") is not None:
            arguments["position_ids"] = arguments["position_ids"] + tokens.count
        if tokens.task_type not in _TOKEN_TYPES:
            _ignore(arguments, "token_type_ids")
        if past:
            return
        cache = arguments.get("past_key_values")
        arguments["past_key_values"] = cache = self.new_cache(module) if cache is None else cache
        rows = _rows(arguments)
        for index, pair in enumerate(tokens.keys_values(module.dtype)):
            keys, values = (part.expand(rows, -1, -1, -1) for part in pair)
            self.growing(cache).update(keys, values, index)

    def extend_mask(self, arguments: Arguments, count: int, past: int) -> None:
        if arguments.get("attention_mask") is None and not past:
            # An encoder takes the number of keys from its mask.
            arguments["attention_mask"] = torch.ones(
                _input(arguments).shape[:2], dtype=torch.long, device=_input(arguments).device
            )
        _extend_mask(arguments, count)

    def new_cache(self, module: Any) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=module.config)

    def growing(self, cache: Any) -> Any:
        """The cache that grows with every token."""
        return cache


class EncoderDecoderPrefixHook(PrefixHook):
    """The same for the self-attention of a decoder behind an encoder."""

    def extend_mask(self, arguments: Arguments, count: int, past: int) -> None:
        _extend_mask(arguments, count, "decoder_attention_mask")

    def new_cache(self, module: Any) -> Any:
        from transformers import DynamicCache, EncoderDecoderCache

        return EncoderDecoderCache(super().new_cache(module), DynamicCache(config=module.config))

    def growing(self, cache: Any) -> Any:
        return cache.self_attention_cache


def check_no_checkpointing(model: nn.Module) -> None:
    """ValueError if gradient checkpointing is on: layers that compute again get no cache, so that a prefix would be lost."""
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(NO_CHECKPOINTING)


NO_CHECKPOINTING = (
    "gradient checkpointing: transformers takes the cache away from layers that compute again, and a prefix is in the "
    "cache; train without it (gradient_checkpointing_disable()), or use prompt tuning or P-tuning"
)


def _past(arguments: Arguments) -> int:
    cache = arguments.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def _input(arguments: Arguments) -> Tensor:
    """Token ids [rows, length] or embeddings [rows, length, width]."""
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        raise ValueError(
            f"input_ids, inputs_embeds: got {'neither' if ids is None else 'both'}; accepted is one of them"
        )
    return arguments["input_ids" if embeds is None else "inputs_embeds"]


def _rows(arguments: Arguments) -> int:
    """How many sequences the layers with a cache get."""
    for name in ("decoder_input_ids", "decoder_inputs_embeds", "labels"):
        if arguments.get(name) is not None:
            return int(arguments[name].shape[0])
    return _input(arguments).shape[0]


def _prepend(module: Any, arguments: Arguments, tokens: VirtualTokens) -> None:
    given = _input(arguments)
    if arguments.pop("input_ids", None) is not None:
        given = module.get_input_embeddings()(given)
    prompt = tokens()[: tokens.count].to(given).expand(given.shape[0], -1, -1)
    arguments["inputs_embeds"] = torch.cat((prompt, given), dim=1)


def _extend_mask(arguments: Arguments, count: int, name: str = "attention_mask") -> None:
    """Let a mask see the virtual tokens; none stays none, which sees all there is."""
    mask = arguments.get(name)
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        got = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"{name}: got {got}; accepted with virtual tokens is [rows, length]. A static cache makes others: generate with "
            "cache_implementation='dynamic'"
        )
    arguments[name] = _front(mask, count, 1)


def _prompt_positions(arguments: Arguments, tokens: VirtualTokens, past: int) -> None:
    positions = arguments.get("position_ids")
    if positions is None:
        return
    if tokens.task_type != "CAUSAL_LM":
        _ignore(arguments, "position_ids")
        return
    positions = positions + tokens.count
    if not past:
        before = torch.arange(tokens.count, dtype=positions.dtype, device=positions.device)
        positions = torch.cat((before.expand(*positions.shape[:-1], -1), positions), dim=-1)
    arguments["position_ids"] = positions


def _ignore(arguments: Arguments, name: str) -> None:
    if arguments.pop(name, None) is not None:
        warnings.warn(
            f"{name}: not used, as in PEFT: task_type says that there are none for virtual tokens",
            stacklevel=8,
        )


def _front(tensor: Tensor, count: int, value: int) -> Tensor:
    """[rows, length] with ``count`` times ``value`` in front."""
    return torch.cat((tensor.new_full((tensor.shape[0], count), value), tensor), dim=1)
