"""Merging a model's adapters into its weights: every weight is made first, then all are put in, or none."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ..layers import AdapterLayer, PromptLayer, TiedTokens, TrainableCopy
from ..layers.merging import Mergeable, Merged, is_sharded
from ..layers.plain import FLOATS

_NOTICEABLE = 0.1  # of an update: what rounding may take of it without a warning


class MergeReport(NamedTuple):
    """One merged layer: its name, and Frobenius norms relative to that of the exact W + s B A, which is summed in fp32.

    ``error`` is that of what was rounded away, ``update`` that of s B A: where the first reaches the second, the update
    is lost.
    """

    name: str
    error: float
    update: float


def report(model: nn.Module, dequantize: bool | torch.dtype) -> list[MergeReport]:
    """What ``merge`` would cost; nothing is changed, and one layer at a time is made."""
    return [MergeReport(name, *made[1:]) for name, _, made in _made(model, dequantize)]


def merge(model: nn.Module) -> list[MergeReport]:
    """Merge in place, keeping the originals, and warn of what it cost."""
    planned = list(_made(model, False))
    reports = [MergeReport(name, *made[1:]) for name, _, made in planned]
    _warn(reports, False)  # before anything is changed: a warning may be an error
    _warn_of_ties(
        model,
        [name for name, *_ in planned],
        "before unmerge_adapter(), tie_weights() would undo that",
    )
    for _, layer, made in planned:
        layer.use_merged(made.weight)
    return reports


def check_exchange(model: nn.Module, enabled: bool) -> None:
    """ValueError if switching the adapters of ``model`` would exchange sharded weights; nothing is changed."""
    sharded = _under_fsdp(model)
    for name, layer in model.named_modules():
        if isinstance(layer, Mergeable):
            try:
                layer.check_exchange(enabled, id(layer) in sharded)
            except ValueError as error:
                raise ValueError(f"module {name!r}: {error}") from error


def check_not_sharded(model: nn.Module) -> None:
    """ValueError if merging in place would put weights where FSDP keeps its own."""
    sharded = _under_fsdp(model)
    for name, layer in model.named_modules():
        if id(layer) in sharded and isinstance(layer, Mergeable) and layer.acting_adapters():
            raise ValueError(
                f"module {name!r}: weight: is sharded, or gathered by FSDP for a while; merge before fully_shard"
            )


def check_not_under_fsdp(model: nn.Module, what: str) -> None:
    """ValueError if FSDP keeps an adapter layer's Parameters."""
    sharded = _under_fsdp(model)
    for name, layer in model.named_modules():
        if isinstance(layer, AdapterLayer) and (
            id(layer) in sharded or any(map(is_sharded, layer.parameters()))
        ):
            raise ValueError(
                f"{what}: module {name!r} is sharded, or FSDP's to shard; do it before fully_shard"
            )


def _under_fsdp(model: nn.Module) -> set[int]:
    """The ids of modules whose parameters FSDP puts in and takes out.

    The parameters alone do not tell: those of the outermost module stay gathered after forward, plain ones to look at.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # not imported: nothing is sharded by it
    kinds = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp else ()
    roots = [module for module in model.modules() if isinstance(module, kinds)]
    return {id(module) for root in roots for module in root.modules()}


def unmerge(model: nn.Module) -> None:
    """The weights from before ``merge``."""
    check_exchange(model, False)
    for layer in model.modules():
        if isinstance(layer, Mergeable):
            layer.unmerge()


def unload(model: nn.Module, dequantize: bool | torch.dtype) -> None:
    """Merge, and put layers without adapters where those with are; with ``dequantize`` none stays in 4 bits."""
    planned = list(_made(model, dequantize, unloading=True))
    copies = [
        (name, m) for name, m in model.named_modules() if isinstance(m, (TrainableCopy, TiedTokens))
    ]
    merged = [(name, made) for name, layer, made in planned if layer.acting_adapters()]
    _warn([MergeReport(name, *made[1:]) for name, made in merged], dequantize)
    _warn_of_ties(
        model,
        [name for name, _ in merged],
        "config.tie_word_embeddings becomes False where it said so",
    )
    were_tied = _ends_are_tied(model)
    swaps = [(name, layer.as_base(made.weight)) for name, layer, made in planned]
    swaps += [(name, copy.acting()) for name, copy in copies]
    for name, module in reversed(swaps):  # of layers in one another the innermost first
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    if were_tied and not _ends_are_tied(model):
        first, last = _ends(model)
        if first.weight.shape == last.weight.shape and torch.equal(first.weight, last.weight):
            last.weight = first.weight  # both got one update: ensure_weight_tying
            return
        # Or the next tie_weights(), which from_pretrained calls too, would drop the update.
        config: Any = getattr(model, "config", None)
        for part in filter(None, (config, getattr(config, "text_config", None))):
            part.tie_word_embeddings = False


def unload_unmerged(model: nn.Module) -> None:
    """Put layers without adapters where those with are, and no hooks of fastlora's."""
    layers = [
        (n, m) for n, m in model.named_modules() if isinstance(m, AdapterLayer) and m.adapters
    ]
    bare = [(n, None if isinstance(m, PromptLayer) else m.without_adapters()) for n, m in layers]
    gone = {id(layer) for _, layer in layers}
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [k for k, hook in hooks.items() if id(getattr(hook, "layer", None)) in gone]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    for name, module in reversed(bare):  # of layers in one another the innermost first
        parent, _, child = name.rpartition(".")
        if module is None:
            del model.get_submodule(parent)._modules[child]
        else:
            setattr(model.get_submodule(parent), child, module)


def _made(
    model: nn.Module, dequantize: bool | torch.dtype, unloading: bool = False
) -> Iterator[tuple[str, Mergeable, Merged]]:
    """(name, layer, its merged weight) of the layers where an adapter acts, or if ``unloading`` of all that cannot stay.

    Raises:
        ValueError: ``dequantize`` is neither a bool nor a float dtype, adapters are merged already, or none acts; and as
            ``Mergeable.merged_weight``.
        NotImplementedError: a layer that cannot be merged.
    """
    if not isinstance(dequantize, bool) and dequantize not in FLOATS:
        raise ValueError(
            f"dequantize: got {dequantize!r}; accepted are True, False and {', '.join(map(str, FLOATS))}"
        )
    layers = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, AdapterLayer) and not isinstance(m, (TrainableCopy, TiedTokens))
    ]
    if any(layer.merged_adapters for _, layer in layers):
        raise ValueError("merge: adapters are merged already; unmerge_adapter() first")
    if not any(layer.acting_adapters() for _, layer in layers):
        raise ValueError(
            "merge: no adapter acts; enable_adapter_layers() or set_adapter(...) first"
        )
    if dequantize is True:
        dequantize = _float_dtype(model, layers) or True
    for name, layer in layers:
        if layer.acting_adapters() or (unloading and (layer.adapters or dequantize)):
            try:
                made = layer.merged_weight(dequantize)
            except (ValueError, NotImplementedError) as error:
                raise type(error)(f"module {name!r}: {error}") from error
            assert isinstance(layer, Mergeable)
            yield name, layer, made


def _float_dtype(model: nn.Module, layers: list[tuple[str, AdapterLayer]]) -> torch.dtype | None:
    """What the model computes in: the dtype of most of its float parameters but for adapters. None: it has none.

    A 4-bit weight knows the dtype that it was quantised from, and not that the model was cast since.
    """
    adapters = {id(p) for _, m in layers for name in m.adapters for p in m.adapter_parameters(name)}
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in adapters:
            sizes[parameter.dtype] += parameter.numel()
    return max(sizes, key=sizes.__getitem__) if sizes else None


def _warn_of_ties(model: nn.Module, merged: list[str], what: str) -> None:
    """Say which of the ``merged`` layers share their weight with another module, which goes on with the old one."""
    holders: dict[int, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), {})[name] = module
    for name in merged:
        layer: Any = model.get_submodule(name)
        own = layer.weight_holders()
        found = holders.get(id(layer.weight), {})
        others = [other for other, module in found.items() if module not in own]
        if others:
            warnings.warn(
                f"merging gives {name!r} a weight of its own, which it shared with {others[0]!r}: that one gets no part of its update. "
                f"They must not be tied again; {what}",
                stacklevel=4,
            )


def _ends_are_tied(model: Any) -> bool:
    """Whether a transformers model's output layer has the weight of its input embeddings."""
    try:
        first, last = _ends(model)
        return first.weight is last.weight
    except (AttributeError, NotImplementedError):
        return False  # no such ends: a plain torch model, or one without text


def _ends(model: Any) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def _warn(reports: list[MergeReport], dequantize: bool | torch.dtype) -> None:
    losing = [r for r in reports if r.error > _NOTICEABLE * r.update]
    if losing:
        worst = max(losing, key=lambda r: r.error)
        advice = "" if dequantize else "; merge_and_unload(dequantize=True) has no 4-bit rounding"
        warnings.warn(
            f"merging rounds away more than {_NOTICEABLE:.0%} of the update in {len(losing)} of {len(reports)} layers: in "
            f"{worst.name!r} the error is {worst.error:.2%} of the weight, the update {worst.update:.2%}. "
            f"merge_report() lists all{advice}",
            stacklevel=4,
        )
