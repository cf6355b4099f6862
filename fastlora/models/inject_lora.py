"""How LoRA enters a model: modules become the layers of a table, beside Parameters and rows that have adapters alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..layers import (
    AdapterLayer,
    LoRAConv1D,
    LoRAEmbedding,
    LoRALayer,
    LoRALinear,
    LoRAParameter,
    LoRAWrapper,
    QLoRALinear,
    TiedLoRALinear,
    TiedTokens,
    TrainableTokens,
)
from ..layers.embedding import embedding_problem
from ..layers.inits import changes_base_weight
from ..layers.plain import FLOATS, is_conv1d, is_plain_conv1d, is_plain_linear
from ..layers.wrapper import linear_features
from ..methods.matching import (
    describe_experts,
    expert_parameters,
    pattern_value,
    quantizable,
    resolve_targets,
    shortest_names,
    unmatched_patterns,
)
from ..quant import NF4Tensor
from .inject import Swap
from .inject_parts import PartsInjection
from .replication import check_replication, replicated

# What takes a module's place: the layer of the first line that fits.
_LAYERS: tuple[tuple[Callable[[Any], bool], Callable[..., LoRALayer]], ...] = (
    (is_plain_linear, LoRALinear.from_linear),
    (is_plain_conv1d, LoRAConv1D),
    (lambda module: embedding_problem(module) is None, LoRAEmbedding),
    (lambda module: linear_features(module) is not None, LoRAWrapper),
)


class LoraInjection(PartsInjection):
    """Low-rank updates at linear modules, and the base in 4 bits where the configuration says so."""

    way_out = ", or use peft.get_peft_model, and fastlora.accelerate(model) on the result"

    def _rebuild(self) -> list[Swap]:
        wanted = self.config.layer_replication
        if self._active is not None:
            check_replication(self.model, wanted)
            return []
        changes = replicated(self.model, wanted) if wanted else []
        return [Swap(owner, name, getattr(owner, name), new) for owner, name, new in changes]

    def _resolve(self) -> None:
        config, model = self.config, self.model
        if self._active is not None and config.quantize:
            raise ValueError(
                "quantize: describes the base, which has adapters already; give it with the first adapter"
            )
        all_linear = (
            isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
        )
        if config.target_modules is None and config.target_parameters:
            self._resolve_ties()
            return
        config.target_modules = targets = resolve_targets(config, model)
        if all_linear and isinstance(targets, list):
            self._drop_attention_outputs(targets)
            config.target_modules = shortest_names(targets, self._modules)
        self._resolve_ties()

    def _drop_attention_outputs(self, targets: list[str]) -> None:
        inside = [name for name in targets if isinstance(self._parent(name), nn.MultiheadAttention)]
        for name in inside:
            targets.remove(name)
        if inside:
            warnings.warn(
                f"target_modules='all-linear': left out {inside}, whose weight "
                "torch.nn.MultiheadAttention reads without calling the module",
                stacklevel=6,
            )

    def _targets(self) -> list[str]:
        parameters = self._target_parameters()
        only_parameters = parameters and not self.config.target_modules
        names = [] if only_parameters else super()._targets()
        names = [name for name in names if name not in self._tied_targets]
        adapted = [*names, *self._tied_targets, *parameters]
        for field in ("rank_pattern", "alpha_pattern"):
            unused = unmatched_patterns(getattr(self.config, field), adapted)
            if unused:
                warnings.warn(
                    f"{field}: {unused} match no adapted module and are not used", stacklevel=6
                )
        return names

    def _plan_layers(self) -> None:
        config = self.config
        quantized = quantizable(config, self.model) if config.quantize else []
        if config.quantize and (experts := expert_parameters(self.model)):
            warnings.warn(f"quantize: {describe_experts(experts)}", stacklevel=5)
        self._quantized = {name for name in quantized if self._is_quantizable(name)}
        super()._plan_layers()
        self._correct_fan_in_fan_out()
        self._warn_of_shared()
        self._plan_parameters()
        self._plan_ties()
        self._plan_tokens()
        adapted = {id(swap.old) for swap in self._swaps}
        for name in sorted(self._quantized):
            if id(self._modules[name]) not in adapted:
                self._swap_child(name, self._in_nf4(self._modules[name], r=None))
        self._plan_encoders()

    def _correct_fan_in_fan_out(self) -> None:
        """The layers say how they store their weight; as in PEFT, a configuration that says otherwise is corrected."""
        config = self.config
        adapted = [swap.old for swap in self._swaps] + [growth.layer for growth in self._growths]
        linears = [module for module in adapted if linear_features(module) is not None]
        stored = any(isinstance(module, LoRAConv1D) or is_conv1d(module) for module in linears)
        if linears and stored != config.fan_in_fan_out:
            kind = "Conv1D modules" if stored else "no Conv1D"
            warnings.warn(
                f"fan_in_fan_out: is {config.fan_in_fan_out}, and target_modules matches {kind}; set to {stored}",
                stacklevel=6,
            )
            config.fan_in_fan_out = stored

    def _warn_of_shared(self) -> None:
        shared = [
            swap.attribute
            for swap in self._swaps
            if self._users[id(getattr(swap.old, "weight", None))] > 1
        ]
        if shared and not self._tied_targets and not self.config.layer_replication:
            warnings.warn(
                f"target_modules: {sorted(set(shared))} share their weight with another module (tied weights), which gets no "
                "part of the update; merging will give them a weight of their own",
                stacklevel=6,
            )

    def _is_quantizable(self, name: str) -> bool:
        """Alone with its weight, computing what its class says, and asked for its output rather than its weight."""
        module = self._modules[name]
        return (
            is_plain_linear(module)
            and module.weight.dtype != torch.float64
            and self._users[id(module.weight)] == 1
            and self._owners[id(module)] == 1
            and not isinstance(
                self._parent(name), (nn.MultiheadAttention, nn.TransformerEncoderLayer)
            )
        )

    def _problem(self, name: str, module: nn.Module) -> str | None:
        if isinstance(self._parent(name), nn.MultiheadAttention):
            return "torch.nn.MultiheadAttention reads its weight past it: an adapter would idle"
        if isinstance(module, (LoRAParameter, TrainableTokens, TiedTokens)):
            return "another adapter is on its Parameters (target_parameters) or rows (trainable_token_indices) alone"
        if isinstance(module, nn.Embedding):
            return embedding_problem(module)
        if linear_features(module) is None:
            kind = type(module).__name__
            return (
                f"a {kind} is not a linear map with a known size; fastlora adapts linear modules and embeddings, and "
                "other modules' Parameters with target_parameters"
            )
        return None

    def _settings(self, name: str, weight: Any) -> dict[str, Any]:
        """Of the adapter of the module ``name``, as ``LoRALayer.add_adapter`` takes them."""
        config = self.config
        dtype = None
        if not self._widen:
            is_float = isinstance(weight, torch.Tensor) and weight.dtype in FLOATS
            dtype = weight.dtype if is_float or isinstance(weight, NF4Tensor) else None
        return {
            "r": pattern_value(config.rank_pattern, name, config.r),
            "lora_alpha": pattern_value(config.alpha_pattern, name, config.lora_alpha),
            "lora_dropout": config.lora_dropout,
            "use_rslora": config.use_rslora,
            "init_lora_weights": config.init_lora_weights,
            "adapter_dtype": dtype,
            "use_dora": config.use_dora,
            "lora_bias": config.lora_bias,
        }

    def _check_split(self, name: str, module: nn.Module) -> None:
        config = self.config
        if (
            changes_base_weight(config.init_lora_weights)
            and not isinstance(module, nn.Embedding)
            and self._users[id(getattr(module, "weight", None))] > 1
        ):
            raise ValueError(
                f"init_lora_weights: {config.init_lora_weights!r} would change the weight of "
                f"{name!r}, which another module shares (tied weights); exclude it, or use "
                "init_lora_weights=True"
            )

    def _layer(self, name: str, module: nn.Module) -> LoRALayer:
        self._check_split(name, module)
        config, weight = self.config, getattr(module, "weight", None)
        settings = {**self._settings(name, weight), "adapter_name": self.adapter_name}
        if name in self._quantized:
            if config.init_lora_weights == "loftq":
                assert isinstance(config.loftq_config, dict)
                settings["loftq_iter"] = config.loftq_config["loftq_iter"]
            return self._in_nf4(module, **settings)
        make = next(make for fits, make in _LAYERS if fits(module))
        return make(module, **settings)

    def _grow(self, name: str, layer: AdapterLayer) -> None:
        assert isinstance(layer, LoRALayer)
        layer.add_adapter(self.adapter_name, **self._settings(name, getattr(layer, "weight", None)))

    def _plan_growth(self, name: str, layer: AdapterLayer) -> None:
        init = self.config.init_lora_weights
        if changes_base_weight(init) and (layer.adapters or not isinstance(layer, QLoRALinear)):
            raise ValueError(
                f"init_lora_weights: {init!r} would change the base weight under the adapters {layer.adapters}; use "
                "it for the first adapter, and True here"
            )
        if isinstance(layer, TiedLoRALinear):
            raise ValueError(
                f"it shares the adapters {layer.adapters} of the input embeddings (ensure_weight_tying), and can have no other; "
                "set ensure_weight_tying here too"
            )
        super()._plan_growth(name, layer)

    def _in_nf4(self, module: nn.Module, **settings: Any) -> LoRALayer:
        assert isinstance(module, nn.Linear)
        return QLoRALinear.from_linear(module, device=self._device, **settings)

    def _plan_encoders(self) -> None:
        """torch's fused encoder path reads linear1 and linear2's weights past their forward (in
        eval, without grad): the two attributes by which torch itself decides against that path."""
        owners = {id(swap.owner): swap.owner for swap in self._swaps}
        for layer in owners.values():
            if isinstance(layer, nn.TransformerEncoderLayer):
                self._set(layer, "activation_relu_or_gelu", 0)
                for encoder in self._modules.values():
                    if isinstance(encoder, nn.TransformerEncoder) and layer in list(encoder.layers):
                        self._set(encoder, "use_nested_tensor", False)
