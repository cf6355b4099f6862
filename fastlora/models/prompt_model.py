"""``PromptModel``: the PeftModel of prompt tuning, P-tuning and prefix tuning."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor, nn

from ..layers import PromptLayer
from .peft_model import PeftModel
from .prompt_forward import NO_CHECKPOINTING

# Generation with these asks the cache for its length or makes it longer by itself, and knows of no virtual tokens.
_DYNAMIC = (None, "dynamic", "dynamic_full", "offloaded")
_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


class PromptModel(PeftModel):
    """A model with virtual tokens; made by ``fastlora.get_peft_model``.

    They act by hooks on the base model, so that its own forward and ``generate`` have them as well.
    """

    @property
    def prompt_encoder(self) -> nn.ModuleDict:
        """Adapter name -> its virtual tokens."""
        return self._prompts().encoders

    def _prompts(self) -> PromptLayer:
        return next(layer for layer in self.adapter_layers() if isinstance(layer, PromptLayer))

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """What the adapter's file holds of its virtual tokens, on the CPU."""
        self._check_known(adapter_name)
        entry = self._prompts().adapter_tensors(adapter_name)["prompt_embeddings"]
        return entry.tensor.detach().cpu()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's ``generate``. Lengths (``max_length``, ``min_length``) count no virtual tokens, as in PEFT.

        Raises:
            ValueError: a cache of fixed size or with something in it, or assisted generation: these count tokens by the cache,
                where virtual tokens are too. Prefix tuning and ``use_cache=False``: a prefix is in the cache.
        """
        if self._prompts().acting() is not None:
            self._check_generation(kwargs)
        return super().generate(*args, **kwargs)

    def _check_generation(self, kwargs: dict[str, Any]) -> None:
        defaults = kwargs.get("generation_config") or getattr(self, "generation_config", None)

        def setting(name: str) -> Any:
            return kwargs[name] if name in kwargs else getattr(defaults, name, None)

        if setting("cache_implementation") not in _DYNAMIC:
            raise ValueError(
                f"cache_implementation: got {setting('cache_implementation')!r}; accepted with virtual tokens are "
                f"{', '.join(map(repr, _DYNAMIC))}: the others have no room for them"
            )
        for name in _ASSISTED:
            if setting(name) is not None:
                raise ValueError(
                    f"{name}: got {setting(name)!r}; assisted generation cuts the cache by lengths without virtual tokens. "
                    "Leave it out"
                )
        if setting("use_cache") is False and self._prompts().peft_type == "PREFIX_TUNING":
            raise ValueError("use_cache: got False; a prefix is in the cache. Leave it out")
        cache = kwargs.get("past_key_values")
        if cache is not None and (
            cache.get_seq_length() or getattr(cache, "is_compileable", False)
        ):
            raise ValueError(
                "past_key_values: got a cache of fixed size, or one with something in it, which generate would count without "
                "the virtual tokens; give it none, or an empty DynamicCache"
            )

    # Gradient checkpointing: see NO_CHECKPOINTING.

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """See ``PeftModel``.

        Raises:
            ValueError: prefix tuning, which has no gradient then.
        """
        self._refuse_checkpointing()
        super().gradient_checkpointing_enable(*args, **kwargs)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As ``gradient_checkpointing_enable``."""
        self._refuse_checkpointing()
        super().activation_checkpointing_enable(*args, **kwargs)

    def _refuse_checkpointing(self) -> None:
        if self._prompts().peft_type == "PREFIX_TUNING":
            raise ValueError(NO_CHECKPOINTING)


def _refusal(name: str) -> Any:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"{name}: virtual tokens are input to the model and no change of its weights; keep the adapter beside the base"
        )

    refuse.__name__ = name
    return refuse


for _name in ("merge_report", "merge_adapter", "unmerge_adapter", "merge_and_unload", "set_scale"):
    setattr(PromptModel, _name, _refusal(_name))
