"""``get_peft_model``: computes every change to a model first, then makes them all or none."""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import nn

from ..layers import LoRALayer, LoRALinear, LoRAWrapper, QLoRALinear, TrainableCopy
from ..layers.base import check_adapter_name
from ..layers.inits import changes_base_weight
from ..layers.plain import FLOATS, is_plain_linear
from ..layers.wrapper import linear_features
from ..methods import LoraConfig
from ..methods.matching import (
    TASK_HEADS,
    describe_experts,
    expert_parameters,
    is_excluded,
    is_target,
    is_transformers_model,
    pattern_value,
    quantizable,
    resolve_targets,
    shortest_names,
    unmatched_patterns,
)
from ..quant import NF4Tensor
from .peft_model import PeftModel
from .placement import move

_STOCK = "peft.get_peft_model, and fastlora.accelerate(model) on the result"
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


def get_peft_model(
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    device: torch.device | str | None = None,
) -> PeftModel:
    """Put fastlora's LoRA layers into ``model``, in place, and freeze the rest.

    Args:
        model: any torch module, or a transformers model (quantised by bitsandbytes too).
        config: what to adapt; a ``peft.LoraConfig`` works as well. It is copied, not changed.
        adapter_name: name of the adapter.
        autocast_adapter_dtype: adapters of an fp16 or bf16 base are kept in fp32 (PEFT's default);
            False: in the base's dtype.
        device: where the model goes. With ``config.quantize`` it is quantised there, linear by linear, so that a base
            that was loaded on the CPU never has to fit on the GPU in full precision. None: where it is.

    Returns:
        A ``fastlora.PeftModel`` around ``model``; for a transformers model with peft installed it
        is a ``peft.PeftModel`` as well, which is how transformers' Trainer knows it.

    Raises:
        TypeError, ValueError, NotImplementedError: bad arguments, no module matched, or a module
            that cannot be adapted. The model is then as it was.
    """
    injection = Injection(model, config, adapter_name, autocast_adapter_dtype, device)
    try:
        injection.apply()
        if device is not None:
            move(model, device)
    except BaseException:  # no memory there, say
        injection.undo()
        raise
    return injection.wrap()


class _Swap(NamedTuple):
    owner: nn.Module
    attribute: str
    old: Any
    new: Any


class Injection:
    """All changes that a configuration means for a model. Building it changes nothing; ``apply``
    and ``undo`` do."""

    def __init__(
        self,
        model: nn.Module,
        config: LoraConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        _check_model(model)
        self.model = model
        self.adapter_name = check_adapter_name(adapter_name)
        self.config = _own_config(config)
        self._widen, self._device = autocast_adapter_dtype, device
        self._swaps: list[_Swap] = []
        self._trained_before = [(p, p.requires_grad) for p in model.parameters()]
        self._modules = dict(model.named_modules())
        try:
            self._resolve()
            self._plan_layers()
            self._plan_copies()
        finally:
            self._restore_trained()  # layers freeze the weights they share: not before apply()

    def _resolve(self) -> None:
        config, model = self.config, self.model
        heads = [
            name
            for name in TASK_HEADS.get(config.task_type or "", ())
            if name not in (config.modules_to_save or [])
        ]
        self._optional_copies = set(heads)
        if heads:
            config.modules_to_save = [*(config.modules_to_save or []), *heads]
        all_linear = (
            isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
        )
        config.target_modules = targets = resolve_targets(config, model)
        if all_linear and isinstance(targets, list):
            self._drop_attention_outputs(targets)
            config.target_modules = shortest_names(targets, self._modules)
        name = getattr(model, "name_or_path", None)
        if isinstance(name, str) and name:
            config.base_model_name_or_path = name

    def _drop_attention_outputs(self, targets: list[str]) -> None:
        inside = [name for name in targets if isinstance(self._parent(name), nn.MultiheadAttention)]
        for name in inside:
            targets.remove(name)
        if inside:
            warnings.warn(
                f"target_modules='all-linear': left out {inside}, whose weight "
                "torch.nn.MultiheadAttention reads without calling the module",
                stacklevel=5,
            )

    def _parent(self, name: str) -> nn.Module:
        return self._modules[name.rpartition(".")[0]]

    # The adapted layers.

    def _plan_layers(self) -> None:
        config = self.config
        names = [name for name in self._modules if name and is_target(config, name)]
        if not names:
            raise ValueError(self._no_match())
        if config.exclude_modules and not any(is_excluded(config, name) for name in self._modules):
            warnings.warn(
                f"exclude_modules={config.exclude_modules!r} matched no module", stacklevel=4
            )
        for field in ("rank_pattern", "alpha_pattern"):
            unused = unmatched_patterns(getattr(config, field), names)
            if unused:
                warnings.warn(
                    f"{field}: {unused} match no adapted module and are not used", stacklevel=4
                )
        self._owners = Counter(
            id(child) for m in self._modules.values() for child in m._modules.values()
        )
        users = Counter(id(p) for m in self._modules.values() for p in m._parameters.values())
        quantized = quantizable(config, self.model) if config.quantize else []
        if config.quantize and (experts := expert_parameters(self.model)):
            warnings.warn(f"quantize: {describe_experts(experts)}", stacklevel=4)
        self._quantized = {name for name in quantized if self._is_quantizable(name, users)}
        for name in names:
            module = self._modules[name]
            self._check_target(name, module)
            if (
                changes_base_weight(config.init_lora_weights)
                and users[id(getattr(module, "weight", None))] > 1
            ):
                raise ValueError(
                    f"init_lora_weights: {config.init_lora_weights!r} would change the weight of "
                    f"{name!r}, which another module shares (tied weights); exclude it, or use "
                    "init_lora_weights=True"
                )
            self._swap_child(name, self._layer(name, module))
        for name in sorted(self._quantized - set(names)):
            self._swap_child(name, self._in_nf4(self._modules[name], r=None))
        self._plan_encoders(names)

    def _is_quantizable(self, name: str, users: Counter[int]) -> bool:
        """Alone with its weight, computing what its class says, and asked for its output rather than its weight."""
        module = self._modules[name]
        return (
            is_plain_linear(module)
            and module.weight.dtype != torch.float64
            and users[id(module.weight)] == 1
            and self._owners[id(module)] == 1
            and not isinstance(
                self._parent(name), (nn.MultiheadAttention, nn.TransformerEncoderLayer)
            )
        )

    def _in_nf4(self, module: nn.Module, **settings: Any) -> LoRALayer:
        assert isinstance(module, nn.Linear)
        return QLoRALinear.from_linear(module, device=self._device, **settings)

    def _no_match(self) -> str:
        config = self.config
        extra = "".join(
            f", {name}={getattr(config, name)!r}"
            for name in (
                "exclude_modules",
                "modules_to_save",
                "layers_to_transform",
                "layers_pattern",
            )
            if getattr(config, name) is not None
        )
        linears = sorted(
            {
                name.rpartition(".")[2]
                for name, m in self._modules.items()
                if name and linear_features(m)
            }
        )
        return (
            f"target_modules: {config.target_modules!r}{extra} matches no module of this "
            f"{type(self.model).__name__}; its linear modules end in "
            f"{linears[:12]}{'...' if len(linears) > 12 else ''}"
        )

    def _check_target(self, name: str, module: nn.Module) -> None:
        kind, weight = type(module).__name__, getattr(module, "weight", None)
        if isinstance(self._parent(name), nn.MultiheadAttention):
            problem = "torch.nn.MultiheadAttention reads its weight past it: an adapter would idle"
        elif linear_features(module) is None:
            problem = (
                f"a {kind} is not a linear map with a known size; fastlora adapts linear modules"
            )
        elif self._owners[id(module)] > 1:
            problem = "the same module is used in several places of the model (not supported)"
        elif type(weight).__name__ == "DTensor":
            problem = "its weight is sharded already; call get_peft_model before that"
        else:
            return
        raise ValueError(
            f"target_modules: matches {name!r} ({kind}), but {problem}. Exclude it, or use {_STOCK}"
        )

    def _layer(self, name: str, module: nn.Module) -> LoRALayer:
        config = self.config
        weight = getattr(module, "weight", None)
        keep_dtype = not self._widen and isinstance(weight, torch.Tensor) and weight.dtype in FLOATS
        settings: dict[str, Any] = {
            "r": pattern_value(config.rank_pattern, name, config.r),
            "lora_alpha": pattern_value(config.alpha_pattern, name, config.lora_alpha),
            "lora_dropout": config.lora_dropout,
            "use_rslora": config.use_rslora,
            "init_lora_weights": config.init_lora_weights,
            "adapter_dtype": weight.dtype if keep_dtype and weight is not None else None,
            "adapter_name": self.adapter_name,
        }
        try:
            if isinstance(module, QLoRALinear):  # without an adapter, or the model was refused
                settings["adapter_dtype"] = None if self._widen else module.weight.dtype
                layer = QLoRALinear.from_quantized(module.weight, module.bias, **settings)
                return layer.train(module.training)
            if name in self._quantized:
                return self._in_nf4(module, **settings)
            if is_plain_linear(module):
                assert isinstance(module, nn.Linear)
                return LoRALinear.from_linear(module, **settings)
            return LoRAWrapper(module, **settings)
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"module {name!r}: {error}") from error

    def _swap_child(self, name: str, new: nn.Module) -> None:
        parent, child = self._parent(name), name.rpartition(".")[2]
        self._swaps.append(_Swap(parent, child, self._modules[name], new))

    def _plan_encoders(self, names: list[str]) -> None:
        """torch's fused encoder path reads linear1 and linear2's weights past their forward (in
        eval, without grad): the two attributes by which torch itself decides against that path."""
        for name in names:
            layer = self._parent(name)
            if isinstance(layer, nn.TransformerEncoderLayer):
                self._swaps.append(
                    _Swap(layer, "activation_relu_or_gelu", layer.activation_relu_or_gelu, 0)
                )
                for encoder in self._modules.values():
                    if isinstance(encoder, nn.TransformerEncoder) and layer in list(encoder.layers):
                        self._swaps.append(
                            _Swap(encoder, "use_nested_tensor", encoder.use_nested_tensor, False)
                        )

    # The modules trained whole.

    def _plan_copies(self) -> None:
        wanted = self.config.modules_to_save or []
        matches = {
            part: [name for name in self._modules if name and name.endswith(part)]
            for part in wanted
        }
        for part, names in matches.items():
            if not names and part not in self._optional_copies:
                raise ValueError(
                    f"modules_to_save: {part!r} matches no module of this "
                    f"{type(self.model).__name__}"
                )
        chosen = sorted({name for names in matches.values() for name in names})
        for name in chosen:
            module, kind = self._modules[name], type(self._modules[name]).__name__
            if isinstance(module, _CONTAINERS):
                raise ValueError(
                    f"modules_to_save: matches {name!r}, a {kind}, which has no forward of its own "
                    "to train"
                )
            if any(isinstance(m, NF4Tensor) for m in module.modules()):
                raise ValueError(
                    f"modules_to_save: {name!r} holds 4-bit weights, which cannot be trained whole"
                )
            if any(name.startswith(other + ".") for other in chosen):
                raise ValueError(
                    f"modules_to_save: matches {name!r} inside another matched module; name one of "
                    "them"
                )
            if self._owners[id(module)] > 1:
                raise ValueError(
                    f"modules_to_save: {name!r} is used in several places of the model; that is "
                    "not supported"
                )
            self._warn_if_tied(name, module)
            self._swap_child(name, TrainableCopy(module, self.adapter_name))

    def _warn_if_tied(self, name: str, module: nn.Module) -> None:
        own = {id(p) for p in module.parameters()}
        others = [n for n, m in self._modules.items() if n != name and not n.startswith(name + ".")]
        tied = [n for n in others if own & {id(p) for p in self._modules[n]._parameters.values()}]
        if tied:
            warnings.warn(
                f"modules_to_save: {name!r} shares weights with {tied}; its trained copy will not "
                "share them",
                stacklevel=5,
            )

    # Doing it.

    def _restore_trained(self) -> None:
        for parameter, trained in self._trained_before:
            parameter.requires_grad_(trained)

    def apply(self) -> None:
        """Make the changes: new layers, and all frozen but what the configuration trains."""
        for swap in self._swaps:
            setattr(swap.owner, swap.attribute, swap.new)
        self.model.requires_grad_(False)
        set_trainable(self.model, self.config, self.adapter_name, not self.config.inference_mode)

    def undo(self) -> None:
        """The model as it was before ``apply``."""
        for swap in reversed(self._swaps):
            setattr(swap.owner, swap.attribute, swap.old)
        self._restore_trained()

    def wrap(self) -> PeftModel:
        """The PeftModel around the changed model."""
        kind: type[PeftModel] = PeftModel
        if is_transformers_model(self.model):
            # Without peft the model trains in any loop of one's own, but Trainer does not see a
            # PEFT model.
            with contextlib.suppress(ImportError):
                from .hf import TransformersPeftModel as kind
        return kind(self.model, {self.adapter_name: self.config}, self.adapter_name)


def set_trainable(model: nn.Module, config: LoraConfig, adapter_name: str, trainable: bool) -> None:
    """Activate ``adapter_name`` everywhere and let it (and the biases ``config.bias`` names) train,
    or freeze them."""
    for module in model.modules():
        if isinstance(module, (LoRALayer, TrainableCopy)):
            module.set_adapter(adapter_name, trainable)
    for parameter in trained_biases(model, config).values():
        parameter.requires_grad_(trainable)


def trained_biases(model: nn.Module, config: LoraConfig) -> dict[str, nn.Parameter]:
    """The base biases that ``config.bias`` trains: parameter name in ``model`` -> parameter."""
    if config.bias == "none":
        return {}
    copies = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, TrainableCopy)
    )
    biases = {
        name: parameter
        for name, parameter in model.named_parameters()
        if (name == "bias" or name.endswith(".bias")) and not name.startswith(copies)
    }
    if config.bias == "all":
        return biases
    adapted = {
        id(m.bias)
        for m in model.modules()
        if isinstance(m, (LoRALinear, LoRAWrapper, QLoRALinear)) and m.bias is not None
    }
    return {name: parameter for name, parameter in biases.items() if id(parameter) in adapted}


def _own_config(config: Any) -> LoraConfig:
    if isinstance(config, LoraConfig):
        return copy.deepcopy(config)
    if hasattr(config, "to_dict") and hasattr(config, "peft_type"):
        return LoraConfig.from_dict(config.to_dict())
    raise TypeError(
        f"config: got {type(config).__name__}; accepted are fastlora.LoraConfig and peft.LoraConfig"
    )


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; accepted is a torch.nn.Module")
    if isinstance(model, PeftModel) or any(
        isinstance(m, TrainableCopy) or (isinstance(m, LoRALayer) and m.r) for m in model.modules()
    ):
        raise ValueError("model: has fastlora adapters already; start from the base model")
    if sys.modules.get("peft") is not None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        theirs = (
            m for m in model.modules() if not isinstance(m, LoRALayer)
        )  # hf.py registers ours
        if any(isinstance(m, BaseTunerLayer) for m in theirs):
            raise ValueError(
                "model: has PEFT adapters already; fastlora.accelerate(model) makes those fast"
            )
    wrappers = {
        "OptimizedModule": "torch.compile",
        "DistributedDataParallel": "DDP",
        "FullyShardedDataParallel": "FSDP",
    }
    if type(model).__name__ in wrappers:
        raise ValueError(
            f"model: is wrapped by {wrappers[type(model).__name__]} already; call get_peft_model "
            "first"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "model: is a TorchScript module, whose parts cannot be replaced; give the eager model"
        )
