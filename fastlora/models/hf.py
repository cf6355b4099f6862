"""The PeftModel of transformers models: also a ``peft.PeftModel``, as Trainer and TRL expect.

Imported only when there is such a model and peft is installed. The class stands at module level so
that it pickles.
"""

from __future__ import annotations

from typing import Any, NoReturn

import peft
from peft.tuners.tuners_utils import BaseTunerLayer

from ..layers import BottleneckLayer, LoRALayer, PromptLayer, TiedTokens
from ..layers.merging import Mergeable
from .peft_model import PeftModel
from .prompt_model import PromptModel

# Libraries ask whether a module is an adapter layer by this class: TRL refuses an adapted lm_head
# (its loss reads the weight past the module), and accelerate's FSDP checkpoints find the adapters
# through it. A copy that is trained whole is none: whoever reads its weight reads the trained one.
for _kind in (LoRALayer, Mergeable, BottleneckLayer, PromptLayer, TiedTokens):
    BaseTunerLayer.register(_kind)


class TransformersPeftModel(PeftModel, peft.PeftModel):  # type: ignore[misc, override]
    """fastlora's methods come first; of peft.PeftModel it has the type, and push_to_hub."""


def _refusal(name: str) -> Any:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"{name}: fastlora's PeftModel does not have it yet. Save the adapter and load it with "
            "stock peft.PeftModel.from_pretrained, which has; fastlora.accelerate(model) makes "
            "that model fast"
        )

    refuse.__name__ = name
    return refuse


# PEFT's methods work on PEFT's layers. One that has no counterpart here must say so instead of
# doing nothing.
for _name, _value in vars(peft.PeftModel).items():
    if callable(_value) and not _name.startswith("_") and not hasattr(PeftModel, _name):
        setattr(TransformersPeftModel, _name, _refusal(_name))


class TransformersPromptModel(PromptModel, TransformersPeftModel):  # type: ignore[misc, override]
    """The same for virtual tokens."""
