"""``PeftModel``: a model with adapters that still looks like the model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..layers import AdapterLayer, LoRALayer
from ..layers.adapter import check_adapter_name
from ..methods import PeftConfig
from ..quant import NF4Tensor
from . import merge
from .merge import MergeReport


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


class AdaptedModel(_Delegate):
    """The middle level that gives parameters PEFT's names: ``base_model.model.<name>``."""

    _target = "model"

    def __init__(self, model: nn.Module) -> None:
        nn.Module.__init__(self)
        self.model = model
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class PeftModel(_Delegate):
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
    def peft_config(self) -> dict[str, PeftConfig]:
        """Adapter name -> its configuration."""
        return self._configs

    @property
    def peft_type(self) -> str | None:
        """The method of its adapters, by PEFT's name; None once all are deleted."""
        return next((config.peft_type for config in self._configs.values()), None)

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active)

    @property
    def active_adapter(self) -> str:
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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_base_model()(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's ``generate``, with this object's ``generation_config`` if it has one."""
        if "generation_config" in self.__dict__:
            kwargs.setdefault("generation_config", self.__dict__["generation_config"])
        return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

    # Which adapters act and train.

    def adapter_layers(self) -> Iterator[AdapterLayer]:
        """Every module that carries adapters."""
        return (m for m in self.get_base_model().modules() if isinstance(m, AdapterLayer))

    def _check_known(self, adapter_name: str) -> None:
        if adapter_name not in self._configs:
            raise ValueError(
                f"adapter_name: got {adapter_name!r}; this model has {sorted(self._configs)}"
            )

    def check_change(self, what: str) -> None:
        """ValueError if the adapters cannot be changed now: they are merged."""
        for layer in self.adapter_layers():
            layer.check_change(what)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Another adapter on the same base. Those that are active stay so; the new one waits for ``set_adapter``.

        Args:
            adapter_name: its name.
            peft_config: what to adapt, with the method of the adapters that there are; PEFT's own work as well.
            low_cpu_mem_usage: PEFT's; its zeros stand for values that a file brings. Nothing to save here.
            autocast_adapter_dtype: see ``get_peft_model``.

        Raises:
            TypeError, ValueError, NotImplementedError: as ``get_peft_model``; the name is taken, the method is another, adapters
                are merged, or two adapters would train one bias. The model is then as it was.
        """
        self.add_loaded(adapter_name, peft_config, lambda: None, autocast_adapter_dtype)

    def add_loaded(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        fill: Callable[[], None],
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """``add_adapter``, and ``fill`` after it: the adapter stays only if that goes well."""
        from .entry import plan

        config = self._check_addition(adapter_name, peft_config)
        base, active = self.get_base_model(), self.active_adapters
        injection = plan(base, config, adapter_name, autocast_adapter_dtype, None, active)
        try:
            injection.apply()
            self._configs[adapter_name] = injection.config
            fill()
        except BaseException:
            self._configs.pop(adapter_name, None)
            injection.undo()
            raise

    def _check_addition(self, adapter_name: str, peft_config: Any) -> PeftConfig:
        from .entry import own_config

        config = own_config(peft_config)
        self.check_change("add_adapter")
        if adapter_name in self._configs:
            raise ValueError(
                f"adapter_name: {adapter_name!r} exists already; delete_adapter it first, or choose another name"
            )
        if self._configs and config.peft_type != self.peft_type:
            raise ValueError(
                f"peft_config: is {config.peft_type}, the model's adapters are {self.peft_type}; one model takes one method"
            )
        every = [config, *self._configs.values()] if self._configs else []
        if any(getattr(other, "bias", "none") != "none" for other in every):
            raise ValueError(
                "peft_config: bias other than 'none' trains biases of the base itself, which only one adapter can; use "
                "bias='none'"
            )
        return config

    def set_adapter(self, adapter_name: str | Iterable[str], inference_mode: bool = False) -> None:
        """Make ``adapter_name`` the active adapter, trainable unless ``inference_mode``; several are stacked: their
        updates are added.

        Raises:
            ValueError: there is no such adapter, or none given; adapters are merged; or two of them trained their own copy
                of a module whole. The model is then as it was.
        """
        from .inject import set_trainable

        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if not names:
            raise ValueError(
                "adapter_name: got none; disable_adapter_layers() makes the model act as its base"
            )
        for name in names:
            self._check_known(name)
        self.check_change("set_adapter")
        for layer in self.adapter_layers():
            layer.check_active(names)
        base = self.get_base_model()
        set_trainable(base, self._configs[names[0]], names, not inference_mode)
        self._active = names

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. If it alone was active, the first that is left becomes active, with a warning as in PEFT;
        without any left the model acts as its base.

        Raises:
            ValueError: there is no such adapter, or adapters are merged.
        """
        self._check_known(adapter_name)
        self.check_change("delete_adapter")
        left = [name for name in self._configs if name != adapter_name]
        active = [name for name in self._active if name != adapter_name] or left[:1]
        if left and active[0] not in self._active:
            warnings.warn(
                f"adapter {adapter_name!r} was active and is deleted; {active[0]!r} is active now",
                stacklevel=2,
            )
        trained = self._trains(adapter_name)
        for layer in self.adapter_layers():
            layer.delete_adapter(adapter_name)
        del self._configs[adapter_name]
        if active:
            self.set_adapter(active, inference_mode=not trained)
        self._active = active

    def _trains(self, adapter_name: str) -> bool:
        return any(
            parameter.requires_grad
            for layer in self.adapter_layers()
            for parameter in layer.adapter_parameters(adapter_name)
        )

    def rename_adapter(self, adapter_name: str, new_name: str) -> None:
        """Give an adapter another name; which are active and trained stays.

        Raises:
            ValueError: there is no such adapter, the new name is taken or no name, or adapters are merged. The model is then
                as it was.
        """
        self._check_known(adapter_name)
        self.check_change("rename_adapter")
        if check_adapter_name(new_name) in self._configs:
            raise ValueError(f"new_name: adapter {new_name!r} exists already; choose another name")
        for layer in self.adapter_layers():
            layer.rename_adapter(adapter_name, new_name)
        renamed = {adapter_name: new_name}
        self._configs = {renamed.get(name, name): value for name, value in self._configs.items()}
        self._active = [renamed.get(name, name) for name in self._active]

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Let a LoRA adapter act ``scale`` times as strongly as its ``lora_alpha`` says, in every layer.

        Raises:
            ValueError: there is no such adapter, adapters are merged, or ``scale`` is not finite.
        """
        self._check_known(adapter_name)
        self.check_change("set_scale")
        for layer in self.adapter_layers():
            if isinstance(layer, LoRALayer) and adapter_name in layer.r:
                layer.set_scale(adapter_name, scale)

    def enable_adapter_layers(self) -> None:
        """Let the adapters act again.

        Raises:
            ValueError: adapters were merged, and the weights were sharded since; so for ``disable_adapter_layers``.
        """
        merge.check_exchange(self, True)
        for module in self.adapter_layers():
            module.enable_adapters(True)

    def disable_adapter_layers(self) -> None:
        """Make the model act as its base."""
        merge.check_exchange(self, False)
        for module in self.adapter_layers():
            module.enable_adapters(False)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model's outputs within ``with model.disable_adapter():``."""
        before = [(module, module.adapters_enabled) for module in self.adapter_layers()]
        self.disable_adapter_layers()
        try:
            yield
        finally:
            for module, enabled in before:
                module.enable_adapters(enabled)

    # Merging.

    def merge_report(self, dequantize: bool | torch.dtype = False) -> list[MergeReport]:
        """What merging would cost, layer by layer; nothing is changed. See ``merge_adapter`` and ``merge_and_unload``."""
        return merge.report(self.get_base_model(), dequantize)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = True
    ) -> list[MergeReport]:
        """Put the active adapter into the base weights, W + s B A summed in fp32; ``unmerge_adapter`` takes it out again.

        A 4-bit weight is quantised again in blocks of the same sizes. That changes what the model computes, and may cost
        more than the adapter is worth: the report says by how much, and a warning where it takes more than a tenth of
        an update. The originals are kept beside the new weights, and disabling the adapter brings them back as well.
        While merged nothing trains. The state_dict then holds the merged weights and the adapter: loaded into a model
        that is not merged, the adapter would count twice. ``unmerge_adapter`` before a checkpoint is written.

        Args:
            adapter_names: PEFT's; None or the active adapter.
            safe_merge: PEFT's; either way a sum that is not finite is refused.

        Returns:
            A ``MergeReport(name, error, update)`` for each merged layer.

        Raises:
            ValueError: merged already, no adapter acts, ``adapter_names`` are others, or a weight that cannot be merged
                (sharded, FP4, NaN in an adapter).
            NotImplementedError: a layer whose base is not fastlora's to write (bitsandbytes', Conv1D). The model is then
                as it was.
        """
        self._check_active(adapter_names)
        merge.check_not_sharded(self)
        return merge.merge(self.get_base_model())

    def unmerge_adapter(self) -> None:
        """The base weights from before ``merge_adapter``, bit for bit, and the adapter beside them.

        Raises:
            ValueError: the weights were sharded since (``fully_shard``); the model is then as it was.
        """
        merge.unmerge(self)

    def merge_and_unload(
        self,
        dequantize: bool | torch.dtype = False,
        *,
        progressbar: bool = False,
        safe_merge: bool = True,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """The base model with the active adapter in its weights and none of fastlora's adapter layers left.

        All weights are made before the first is replaced, so that for a moment there are two of each. It warns as
        ``merge_adapter`` does. Biases and ``modules_to_save`` come out as they were trained.

        Args:
            dequantize: every 4-bit linear becomes an nn.Linear of this dtype, which transformers saves and any engine
                reads. True: of the dtype that most of the model's other parameters have. False: it stays a
                ``QLoRALinear``, quantised again; what transformers' ``save_pretrained`` writes of that, nothing reads.
            progressbar: PEFT's; there is none.
            safe_merge, adapter_names: see ``merge_adapter``.

        Raises:
            ValueError, NotImplementedError: as ``merge_adapter``; the model is then as it was.
        """
        self._check_active(adapter_names)
        base = self.get_base_model()
        merge.unload(base, dequantize)
        return base

    def _check_active(self, adapter_names: list[str] | None) -> None:
        if adapter_names is not None and list(adapter_names) != self.active_adapters:
            raise ValueError(
                f"adapter_names: got {adapter_names!r}; accepted is None or the active {self.active_adapters}. "
                "set_adapter makes another active"
            )

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

    def _require_input_grads(self) -> None:
        enable = getattr(self.get_base_model(), "enable_input_require_grads", None)
        if enable is not None:
            enable()

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
        trainable = 0
        fours = [m for m in self.modules() if isinstance(m, NF4Tensor)]
        inside = {id(p) for four in fours for p in four.parameters()}
        total = sum(four.shape.numel() for four in fours)
        for parameter in self.parameters():
            count = 0 if id(parameter) in inside else parameter.numel()
            state = getattr(parameter, "quant_state", None)
            if state is not None and getattr(state, "shape", None) is not None:
                count = torch.Size(state.shape).numel()
            total += count
            trainable += count if parameter.requires_grad else 0
        return trainable, total

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
        **kwargs: Any,
    ) -> None:
        """Write every adapter (or those selected) in PEFT's layout; see ``save_adapter``.

        ``state_dict``: values to write instead of the model's own (a gathered one, say).
        ``path_initial_model_for_weight_conversion``: turns PiSSA and OLoRA into plain LoRA. Other
        keywords, which transformers passes to every model, mean nothing for an adapter.

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
        if is_main_process:
            for name in names:
                save_adapter(
                    self, save_directory, name, state_dict, path_initial_model_for_weight_conversion
                )

    def load_adapter(
        self, model_id: str | Path, adapter_name: str, is_trainable: bool = False
    ) -> None:
        """Read an adapter, a new one or other values for one that is there; see ``fastlora.load_adapter``. As in PEFT, a
        load that is not for training puts the model into eval mode and leaves what requires grad as it is."""
        from ..io.adapter import load_adapter

        load_adapter(self, model_id, adapter_name, is_trainable=True if is_trainable else None)
        if not is_trainable:
            self.eval()

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
    ) -> PeftModel:
        """``model`` with the adapter in the folder ``model_id``; see ``fastlora.load_adapter``."""
        from ..io.adapter import load_adapter

        return load_adapter(model, model_id, adapter_name, is_trainable=is_trainable)
