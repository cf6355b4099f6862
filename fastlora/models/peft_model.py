"""``PeftModel``: a model with adapters that still looks like the model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..layers import AdapterLayer, LoRAParameter, TiedTokens, TrainableCopy, TrainableTokens
from ..methods import PeftConfig
from ..quant import NF4Tensor
from .adapters import Adapters

if TYPE_CHECKING:
    from .status import TunerLayerStatus, TunerModelStatus

# What transformers' Trainer calls its checkpoints' folders.
_TRAINERS = re.compile(r"checkpoint-\d+")


class _Delegate(nn.Module):
    """A module that asks the one kept under ``_target`` for attributes it lacks."""

    _target: str

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name == self._target or self._target not in self.__dict__.get("_modules", {}):
                raise  # not built yet (unpickling, deepcopy): nothing to ask
            return getattr(self._modules[self._target], name)


def _checkpoints(model: nn.Module) -> bool:
    """Whether a transformers model has gradient checkpointing on (it has had two names)."""
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):
        if hasattr(type(model), name):
            return bool(getattr(model, name))
    return False


def _require_input_grads(model: nn.Module) -> None:
    enable = getattr(model, "enable_input_require_grads", None)
    if enable is not None:
        enable()


def _beams(model: Any, options: dict[str, Any]) -> int:
    """How many rows ``generate`` makes of each prompt."""
    config = options.get("generation_config") or model.generation_config
    beams, returned = (
        options.get(name) or getattr(config, name, None) or 1
        for name in ("num_beams", "num_return_sequences")
    )
    return int(beams if beams > 1 else returned)


class AdaptedModel(_Delegate):
    """The middle level that gives parameters PEFT's names: ``base_model.model.<name>``."""

    _target = "model"

    def __init__(self, model: nn.Module) -> None:
        nn.Module.__init__(self)
        self.model = model
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class PeftModel(Adapters, _Delegate):
    """A model with fastlora's adapter layers; made by ``fastlora.get_peft_model``.

    Every attribute it lacks comes from the base model (``config``, ``device``,
    ``get_input_embeddings``, ...). Its state_dict is the base model's and the adapters', under
    PEFT's prefix ``base_model.model.``.
    """

    _target = "base_model"

    def __init__(self, model: nn.Module, configs: dict[str, PeftConfig], active: str) -> None:
        nn.Module.__init__(self)  # not super(): peft.PeftModel's would build PEFT's own layers
        self.base_model = AdaptedModel(model)
        self._configs = configs
        self._active = [active]
        self.training = model.training
        if _checkpoints(model):
            self._require_input_grads()

    # What it is.

    @property
    def active_adapter(self) -> str:
        if not self._active:
            raise ValueError("active_adapter: all adapters are deleted; add_adapter first")
        return self._active[0]

    @property
    def active_peft_config(self) -> PeftConfig:
        return self._configs[self.active_adapter]

    @property
    def modules_to_save(self) -> set[str] | None:
        return {
            name
            for config in self._configs.values()
            for name in getattr(config, "modules_to_save", None) or []
        } or None

    def get_base_model(self) -> nn.Module:
        """The model given to ``get_peft_model``, with the adapter layers in it."""
        model: nn.Module = self.base_model.model
        return model

    @property
    def prefix(self) -> str:
        """What the names of the adapters' parameters have in them, by which TRL leaves them out of what it sends to vLLM."""
        return self.active_peft_config.prefix

    @property
    def targeted_module_names(self) -> list[str]:
        """The names, in the base model, of the modules that have adapters (as wholes; not ``modules_to_save``)."""
        return [
            name
            for name, layer in self.get_base_model().named_modules()
            if isinstance(layer, AdapterLayer)
            and layer.adapters
            and not isinstance(layer, (LoRAParameter, TrainableCopy, TrainableTokens, TiedTokens))
        ]

    @property
    def targeted_parameter_names(self) -> list[str]:
        """The names of the Parameters that have adapters (``target_parameters``)."""
        return [
            f"{name.replace('.base_layer', '')}.{layer.parameter_name}"
            for name, layer in self.get_base_model().named_modules()
            if isinstance(layer, LoRAParameter) and layer.adapters
        ]

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The state of every module with adapters; see ``models/status.py``."""
        from .status import get_layer_status

        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The state of the whole model; see ``models/status.py``."""
        from .status import get_model_status

        return get_model_status(self)

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        return getattr(self.get_base_model(), "dtype", None)

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base model's. ``adapter_names``: an adapter for each item of the batch; see ``mixed_batch``.

        Raises:
            ValueError: as ``mixed_batch``; ``adapter_names`` under gradient checkpointing, whose backward needs them too.
        """
        if adapter_names is None:
            return self.get_base_model()(*args, **kwargs)
        if self.training and torch.is_grad_enabled() and _checkpoints(self.get_base_model()):
            raise ValueError(
                "adapter_names: with gradient checkpointing backward computes the forward again; put both into "
                "`with model.mixed_batch(adapter_names):`"
            )
        with self.mixed_batch(adapter_names):
            return self.get_base_model()(*args, **kwargs)

    def generate(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """The base model's ``generate``, with this object's ``generation_config`` if it has one. ``adapter_names``: as in
        ``forward``, one for each prompt."""
        if "generation_config" in self.__dict__:
            kwargs.setdefault("generation_config", self.__dict__["generation_config"])
        base: Any = self.get_base_model()
        if adapter_names is None:
            return base.generate(*args, **kwargs)
        with self.mixed_batch(adapter_names, _beams(base, kwargs)):
            return base.generate(*args, **kwargs)

    # Gradient checkpointing: reentrant checkpoints give no gradient unless some input requires one.

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The base model's own, with gradients required of its embeddings' output."""
        base: Any = self.get_base_model()
        base.gradient_checkpointing_enable(*args, **kwargs)
        self._require_input_grads()

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As ``gradient_checkpointing_enable``, under its name in newer transformers."""
        base: Any = self.get_base_model()
        base.activation_checkpointing_enable(*args, **kwargs)
        self._require_input_grads()

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """Require gradients of the output of ``model``'s embeddings (PEFT's name for it)."""
        _require_input_grads(model)

    def _require_input_grads(self) -> None:
        _require_input_grads(self.get_base_model())

    # What is trained.

    def trainable_record(self) -> list[dict[str, Any]]:
        """One entry per trained parameter, in order: ``name``, ``shape``, ``dtype``, ``count``."""
        return [
            {
                "name": n,
                "shape": list(p.shape),
                "dtype": str(p.dtype).removeprefix("torch."),
                "count": p.numel(),
            }
            for n, p in self.named_parameters()
            if p.requires_grad
        ]

    def trainable_json(self) -> str:
        """``trainable_parameters.json``: the record and its totals, to reproduce the run by."""
        trainable, total = self.get_nb_trainable_parameters()
        record = {"trainable": trainable, "total": total, "parameters": self.trainable_record()}
        return json.dumps(record, indent=2)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trained, all) numbers of parameters; a 4-bit weight counts as what it stands for."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print the two numbers and their ratio, in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        percent = 100 * trainable / total if total else 0.0
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: "
            f"{percent:.4f}"
        )

    # Files.

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        state_dict: dict[str, Any] | None = None,
        resumable: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Write every adapter (or those selected) in PEFT's layout; see ``save_adapter``.

        ``state_dict``: values to write instead of the model's own (a gathered one, say).
        ``path_initial_model_for_weight_conversion``: turns PiSSA and OLoRA into plain LoRA.
        ``resumable``: write also what training goes on from, where an adapter's file does not hold that; None: into folders
        called as Trainer calls its checkpoints, checkpoint-<step>. Other keywords, which transformers passes to every
        model, mean nothing for an adapter.

        Raises:
            ValueError: an adapter that does not exist, or an option that fastlora does not have.
        """
        from ..io.adapter import save_adapter

        if not safe_serialization:
            raise ValueError("safe_serialization: got False; only safetensors files are written")
        if save_embedding_layers is True:
            raise ValueError(
                "save_embedding_layers: got True; name the embeddings in "
                "LoraConfig(modules_to_save=...)"
            )
        names = list(self._configs) if selected_adapters is None else list(selected_adapters)
        for name in names:
            self._check_known(name)
        if resumable is None:
            resumable = _TRAINERS.fullmatch(Path(save_directory).name) is not None
        initial = path_initial_model_for_weight_conversion
        if is_main_process:
            for name in names:
                save_adapter(self, save_directory, name, state_dict, initial, resumable)

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: torch.device | str | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        """Read an adapter, a new one or other values for one that is there; see ``fastlora.load_adapter``. As in PEFT, a
        load that is not for training puts the model into eval mode and leaves what requires grad as it is.

        ``torch_device``, ``low_cpu_mem_usage``: PEFT's; values are read on the CPU and go where the model is.
        """
        from ..io.adapter import load_adapter

        trains = True if is_trainable else None
        load_adapter(self, model_id, adapter_name, trains, autocast_adapter_dtype)
        if not is_trainable:
            self.eval()

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> PeftModel:
        """``model`` with the adapter in the folder ``model_id``; see ``fastlora.load_adapter``. ``low_cpu_mem_usage``: PEFT's;
        nothing to save here."""
        from ..io.adapter import load_adapter

        return load_adapter(
            model, model_id, adapter_name, is_trainable, autocast_adapter_dtype, config
        )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all) numbers of a model's parameters; a 4-bit weight counts as what it stands for."""
    trainable = 0
    fours = [m for m in model.modules() if isinstance(m, NF4Tensor)]
    inside = {id(p) for four in fours for p in four.parameters()}
    total = sum(four.shape.numel() for four in fours)
    for parameter in model.parameters():
        count = 0 if id(parameter) in inside else parameter.numel()
        state = getattr(parameter, "quant_state", None)
        if state is not None and getattr(state, "shape", None) is not None:
            count = torch.Size(state.shape).numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total
