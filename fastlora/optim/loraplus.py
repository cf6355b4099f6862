"""LoRA+ (arXiv 2402.12354): B learns faster than A, by parameter groups of any optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.optim import Optimizer

_Optimizer = TypeVar("_Optimizer", bound=Optimizer)
_EIGHT_BITS = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: Callable[..., _Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> _Optimizer:
    """An optimizer over what ``model`` trains, in four groups, those of PEFT:

        A       every other matrix                         lr
        E       the factors of adapted embeddings          loraplus_lr_embedding
        B       lora_B, and vectors (DoRA's magnitudes)    lr * loraplus_lr_ratio
        bias    of B what is a bias or a LayerNorm's       lr * loraplus_lr_ratio, no weight decay

    Args:
        model: with fastlora's adapters, or PEFT's.
        optimizer_cls: a class of torch.optim, bitsandbytes, ...
        lr: the learning rate of A.
        loraplus_lr_ratio: how much faster B learns; the paper's are 16 and around it, with a smaller lr than LoRA's own.
        loraplus_weight_decay: of the first three groups.
        loraplus_lr_embedding: the learning rate of embeddings' factors.
        kwargs: the optimizer's other arguments.

    Raises:
        ValueError: a rate or the ratio is negative or not finite, or nothing is trained.
    """
    for name, value in (
        ("lr", lr),
        ("loraplus_lr_embedding", loraplus_lr_embedding),
        ("loraplus_lr_ratio", loraplus_lr_ratio),
    ):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: got {value!r}; accepted are finite numbers from 0 on")
    groups: dict[str, list[nn.Parameter]] = {"A": [], "E": [], "B": [], "bias": []}
    normed = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if ".lora_embedding_" in f".{name}":
            group = "E"
        elif "lora_B" in name or parameter.ndim == 1:
            group = "bias" if "bias" in name or id(parameter) in normed else "B"
        else:
            group = "A"
        groups[group].append(parameter)
    if not any(groups.values()):
        raise ValueError(
            "model: trains nothing; put adapters in first, with fastlora.get_peft_model"
        )
    fast = lr * loraplus_lr_ratio
    rates = {"A": lr, "E": loraplus_lr_embedding, "B": fast, "bias": fast}
    optimizer = optimizer_cls(
        [
            {
                "params": parameters,
                "weight_decay": 0.0 if group == "bias" else loraplus_weight_decay,
                "lr": rates[group],
            }
            for group, parameters in groups.items()
        ],
        lr=lr,
        **kwargs,
    )
    if type(optimizer).__name__ in _EIGHT_BITS:
        _keep_embeddings_whole(model)
    return optimizer


def _keep_embeddings_whole(model: nn.Module) -> None:
    """bitsandbytes keeps the state of embeddings in 32 bits, as its authors advise."""
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
