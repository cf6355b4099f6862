"""Where bottleneck adapters stand in a transformer: which module, what its output is added to, and the adapters library's
name for the place.

The modules are found in every layer of the model's stacks by the names that a kind of layer gives them. Encoder and
decoder stacks are counted through, as in the library.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn


class Sublayer(NamedTuple):
    """Names from the transformer layer on."""

    module: str  # whose output is adapted
    norm: (
        str | None
    )  # whose input that output is added to; None: a block of dense, dropout and LayerNorm
    saved_as: str


class Kind(NamedTuple):
    """A kind of transformer layer: its attention and its feed-forward sublayer."""

    attention: Sublayer
    feed_forward: Sublayer
    absent: tuple[str, ...] = ()  # names that such a layer does not have
    sandwiched: bool = False  # the model has a norm between the sublayer and the sum


class Place(NamedTuple):
    """One adapter's: names from the model on."""

    module: str
    norm: str | None
    saved_as: str
    layer: int


def _kind(module: str, norm: str, inner: str, second_norm: str, **rest: Any) -> Kind:
    """Of a layer that adapters of the library are children of."""
    return Kind(
        Sublayer(module, norm, "attention_adapters"),
        Sublayer(inner, second_norm, "output_adapters"),
        **rest,
    )


_BEFORE_FEED_FORWARD, _AFTER_FEED_FORWARD = (
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_LLAMA = _kind(
    "self_attn",
    "input_layernorm",
    "mlp",
    "post_attention_layernorm",
    absent=(_BEFORE_FEED_FORWARD, _AFTER_FEED_FORWARD, "post_self_attn_layernorm"),
)
_GEMMA2 = _kind("self_attn", "input_layernorm", "mlp", _BEFORE_FEED_FORWARD, sandwiched=True)
_BERT = Kind(
    Sublayer("attention.output", None, "attention.output"), Sublayer("output", None, "output")
)
_T5_ENCODER = Kind(
    Sublayer("layer.0.dropout", "layer.0.layer_norm", "layer.0"),
    Sublayer("layer.1.dropout", "layer.1.layer_norm", "layer.1"),
    absent=("layer.2",),
)
_T5_DECODER = Kind(
    Sublayer("layer.0.dropout", "layer.0.layer_norm", "layer.0"),
    Sublayer("layer.2.dropout", "layer.2.layer_norm", "layer.2"),
)
# transformers' model_type -> the kinds its layers are of. An architecture that is not here is looked at as if it were
# Llama's or BERT's, which most are like.
KINDS: dict[str, tuple[Kind, ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3"), (_LLAMA,)),
    **dict.fromkeys(("gemma2", "gemma3_text"), (_GEMMA2,)),
    "gpt2": (_kind("attn", "ln_1", "mlp", "ln_2"),),
    "gpt_neox": (_kind("attention", "input_layernorm", "mlp", "post_attention_layernorm"),),
    "opt": (_kind("self_attn", "self_attn_layer_norm", "fc2", "final_layer_norm"),),
    "bloom": (
        _kind(
            "self_attention.dense",
            "input_layernorm",
            "mlp.dense_4h_to_h",
            "post_attention_layernorm",
        ),
    ),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), (_BERT,)),
    **dict.fromkeys(("t5", "mt5"), (_T5_ENCODER, _T5_DECODER)),
}
_LOOKALIKES = (_LLAMA, _BERT)


def find_places(
    model: nn.Module, modules: dict[str, nn.Module], attention: bool, feed_forward: bool
) -> list[Place]:
    """The places in every layer of ``model``, in order; none where no layers of a known kind are found.

    Args:
        model: a transformers model.
        modules: its modules by name, as ``base_view`` gives them.
        attention, feed_forward: at which sublayers.
    """
    places = []
    for index, (name, kind) in enumerate(_layers(model, modules)):
        wanted = [kind.attention] if attention else []
        wanted += [kind.feed_forward] if feed_forward else []
        for sublayer in wanted:
            norm = None if sublayer.norm is None else f"{name}.{sublayer.norm}"
            places.append(
                Place(f"{name}.{sublayer.module}", norm, f"{name}.{sublayer.saved_as}", index)
            )
    return places


def stream_problem(model: nn.Module) -> str | None:
    """Why what a sublayer's output is added to cannot be had in this model."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "apply_residual_connection_post_layernorm", False):
        return "this model adds normed residuals (apply_residual_connection_post_layernorm)"
    if getattr(config, "do_layer_norm_before", True) is False:
        return "this model's norms are behind the sums (do_layer_norm_before=False)"
    return None


def is_sandwiched(model: nn.Module) -> bool:
    """Whether the model has a norm of its own between a sublayer and the sum."""
    return any(kind.sandwiched for kind in KINDS.get(_type(model), ()))


def _layers(model: nn.Module, modules: dict[str, nn.Module]) -> Iterator[tuple[str, Kind]]:
    kinds = KINDS.get(_type(model), _LOOKALIKES)
    for name, module in modules.items():
        if isinstance(module, nn.ModuleList) and len(module):
            fitting = [kind for kind in kinds if all(_is(layer, kind) for layer in module)]
            for i in range(len(module) if fitting else 0):
                yield f"{name}.{i}", fitting[0]


def _type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", None) or ""


def _is(layer: nn.Module, kind: Kind) -> bool:
    sublayers = (kind.attention, kind.feed_forward)
    needed = [name for s in sublayers for name in (s.module, s.norm or f"{s.module}.LayerNorm")]
    needed += [
        f"{s.module}.{part}" for s in sublayers if s.norm is None for part in ("dense", "dropout")
    ]
    return all(_has(layer, name) for name in needed) and not any(
        _has(layer, name) for name in kind.absent
    )


def _has(module: Any, path: str) -> bool:
    """Through adapter layers too, which have their base's attributes."""
    for part in path.split("."):
        module = getattr(module, part, None)
        if not isinstance(module, nn.Module):
            return False
    return True
