"""EVA (arXiv 2410.07170): every A becomes the leading principal components of its layer's inputs, seen batch by batch, and
ranks go where components explain most.

Semantics are PEFT's: incremental PCA with centred batches, converged where a batch turns no component further than ``tau``
allows; layers that are given the same tensor share one; the sum of ranks stays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers import LoRALayer
from ..layers.inits import check_init
from ..methods import EvaConfig, LoraConfig
from ..methods.matching import pattern_value, shortest_names
from ..ops.support import MAX_RANK
from .peft_model import PeftModel

_MOST_PASSES = 100  # over the data, after which components that still turn will not settle

ModelInputs = Callable[[Any, LoraConfig], Any]
LayerInputs = Callable[[Any, Any, str], Tensor]


def tokens_of(model_input: Any, config: LoraConfig) -> Tensor:
    """Which tokens of a language model's batch count: not padding, nor those without a label. Indices [n, 2]."""
    if not isinstance(model_input, Mapping) or "input_ids" not in model_input:
        raise TypeError(
            "dataloader: its batches are no dicts with input_ids; give prepare_model_inputs_fn and prepare_layer_inputs_fn, "
            "or None for both where every row of a layer's input counts"
        )
    mask = model_input.get("attention_mask", torch.ones_like(model_input["input_ids"])).bool()
    assert isinstance(config.eva_config, EvaConfig)
    if config.eva_config.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != config.eva_config.label_mask_value)
    return mask.nonzero()


def rows_of_tokens(layer_input: Any, tokens: Any, layer_name: str) -> Tensor:
    """The rows [n, K] of a layer's input [batch, length, K] that ``tokens_of`` chose."""
    rows: Tensor = _first(layer_input)[tokens.T.unbind()]
    return rows


def _all_rows(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    rows = _first(layer_input)
    return rows.reshape(-1, rows.shape[-1])


def _first(layer_input: Any) -> Tensor:
    found: Tensor = layer_input if isinstance(layer_input, Tensor) else layer_input[0]
    return found


def _call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs)


class _Components:
    """Principal components [n, K] of rows that come in batches, with the share of the variance that each explains."""

    def __init__(self, n: int, tau: float) -> None:
        self.n, self.tau = n, tau
        self.count, self.spread = (
            0,
            0.0,
        )  # rows so far, and the sum of their squared distances to the mean
        self.mean = self.directions = self.sizes = self.shares = torch.empty(0)
        self.converged = torch.zeros(n, dtype=torch.bool)

    def add(self, rows: Tensor) -> None:
        """Take a batch [m, K] in; one of fewer than n rows is left out."""
        m = rows.shape[0]
        if m < self.n:
            return
        rows = rows.float()
        mean = rows.mean(0, dtype=torch.float64)
        stack = rows - mean.float()
        spread = float(stack.square().sum(dtype=torch.float64))
        if self.count:
            weight = self.count * m / (self.count + m)
            shift = self.mean - mean
            spread += self.spread + weight * float(shift.square().sum())
            known = self.sizes[:, None] * self.directions
            # In fp64 from here on, as PEFT's is: the randomised SVD below then draws the same numbers.
            stack = torch.cat((known.double(), stack.double(), weight**0.5 * shift[None]))
            mean = (self.mean * self.count + mean * m) / (self.count + m)
        with _seeded(rows.device, 42):
            _, sizes, v = torch.svd_lowrank(stack, q=2 * self.n, niter=4)
        directions = v.t()
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        directions = (directions * largest.sign())[: self.n]
        if self.count:
            same = torch.cosine_similarity(directions, self.directions)
            self.converged = (same >= self.tau).cpu()
        self.count, self.mean, self.spread = self.count + m, mean, spread
        self.directions, self.sizes = directions, sizes[: self.n]
        self.shares = (self.sizes.double().square() / spread).cpu()


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """The device's generator with a seed of its own for a while; no other is touched."""
    generator = torch.default_generator
    if device.type != "cpu":
        generator = getattr(torch, device.type).default_generators[device.index or 0]
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


class _Budget(NamedTuple):
    """What is to be shared out: each layer's upper limit, and the sum of ranks."""

    limits: dict[str, int]
    total: int


@torch.no_grad()
def get_eva_state_dict(
    model: PeftModel,
    dataloader: Iterable[Any],
    forward_fn: Callable[[nn.Module, Any], Any] = _call,
    prepare_model_inputs_fn: ModelInputs | None = tokens_of,
    prepare_layer_inputs_fn: LayerInputs | None = rows_of_tokens,
    adapter_name: str = "default",
) -> dict[str, Tensor]:
    """A of every adapted layer by EVA: module name, as in ``model.named_modules()`` -> [its new rank, K]. Nothing is changed.

    Args:
        model: a model whose adapter has ``init_lora_weights="eva"``; its base alone is run, in eval mode.
        dataloader: batches, run through again until all components have converged.
        forward_fn: how a batch is run; by default ``model(**batch)``.
        prepare_model_inputs_fn, prepare_layer_inputs_fn: of a batch and the configuration, and of a layer's input, what the
            former gave and the layer's name, the rows [n, K] that count. By default a language model's tokens; None: all.
        adapter_name: the adapter.

    Raises:
        TypeError, ValueError: no such model, adapter or data; a batch of fewer rows than components throughout.
        RuntimeError: the components do not settle.
    """
    config = _check(model, adapter_name)
    layers = _layers(model, adapter_name)
    assert isinstance(config.eva_config, EvaConfig)
    choose = prepare_layer_inputs_fn or _all_rows
    batch_of: list[Any] = [None]

    def inputs_of(batch: Any) -> Any:
        return prepare_model_inputs_fn(batch, config) if prepare_model_inputs_fn else batch

    def run(batch: Any, names: list[str], take: Callable[[str, Tensor], None]) -> None:
        batch_of[0] = inputs_of(batch)

        def hook(name: str) -> Callable[..., None]:
            return lambda module, args, output: take(name, choose(args[0], batch_of[0], name))

        handles = [layers[name].register_forward_hook(hook(name)) for name in names]
        try:
            forward_fn(model, batch)
        finally:
            for handle in handles:
                handle.remove()

    with _as_base(model):
        batches = _again_and_again(dataloader, _device(model))
        heads: dict[str, str] = {}  # layer -> the first one that is given the same rows
        seen: dict[bytes, str] = {}

        def compare(name: str, rows: Tensor) -> None:
            heads[name] = seen.setdefault(_fingerprint(rows), name)

        run(next(batches), list(layers), compare)
        idle = [name for name in layers if name not in heads]
        if idle:
            raise ValueError(f"dataloader: a batch does not reach {idle[0]!r}, which is adapted")
        budget = _budget(layers, heads, config, adapter_name)
        found = {
            name: _Components(budget.limits[name], config.eva_config.tau)
            for name in layers
            if heads[name] == name
        }
        ranks = dict(budget.limits)
        # The first batch was looked at, not taken in: the loader starts anew, as PEFT's does.
        for batch in _again_and_again(dataloader, _device(model)):
            open_ = [n for n, c in found.items() if not bool(c.converged[: ranks[n]].all())]
            if not open_:
                break
            run(batch, open_, lambda name, rows: found[name].add(rows))
            if all(components.count for components in found.values()):
                ranks = _share_out(found, heads, budget)
    result = {}
    for name, rank in ranks.items():
        components = found[heads[name]]
        a = components.directions[:rank]
        if config.eva_config.whiten:
            a = a / components.sizes[:rank, None].sqrt()
        result[name] = a.to(torch.float32, copy=True)
    return result


@torch.no_grad()
def initialize_lora_eva_weights(
    model: PeftModel,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = _call,
    prepare_model_inputs_fn: ModelInputs | None = tokens_of,
    prepare_layer_inputs_fn: LayerInputs | None = rows_of_tokens,
    adapter_name: str = "default",
) -> None:
    """Give an adapter with ``init_lora_weights="eva"`` its A, and its layers their ranks, from data.

    A layer whose rank becomes 0 loses the adapter. The model's configuration says afterwards what it is: ``target_modules``,
    ``rank_pattern`` and ``alpha_pattern``. Make optimizers after this, for parameters are replaced where a rank changes.

    Args:
        dataloader, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name: see ``get_eva_state_dict``.
        eva_state_dict: what that gave; instead of a dataloader.

    Raises:
        TypeError, ValueError, RuntimeError: as ``get_eva_state_dict``; or ``eva_state_dict`` does not fit. The model is
            then as it was.
    """
    config = _check(model, adapter_name)
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("dataloader: got None without eva_state_dict; give one of them")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
        )
    layers = _layers(model, adapter_name)
    _check_fits(eva_state_dict, layers)
    _put_in(layers, eva_state_dict, config, adapter_name)
    names = [_inside(name) for name, layer in layers.items() if adapter_name in layer.adapters]
    base = model.get_base_model()
    config.target_modules = shortest_names(names, (name for name, _ in base.named_modules()))
    config.rank_pattern, config.alpha_pattern = {}, {}
    for name, layer in layers.items():
        if adapter_name in layer.adapters:
            if layer.r[adapter_name] != config.r:
                config.rank_pattern[_inside(name)] = layer.r[adapter_name]
            if layer.lora_alpha[adapter_name] != config.lora_alpha:
                config.alpha_pattern[_inside(name)] = layer.lora_alpha[adapter_name]


def _check(model: Any, adapter_name: str) -> LoraConfig:
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"model: got {type(model).__name__}; accepted is a fastlora.PeftModel. For a stock peft model use "
            "peft.initialize_lora_eva_weights"
        )
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, LoraConfig) or check_init(config.init_lora_weights) != "eva":
        raise ValueError(
            f"adapter_name: {adapter_name!r} is no adapter with init_lora_weights='eva'; this model has "
            f"{sorted(model.peft_config)}"
        )
    for name, layer in _layers(model, adapter_name).items():
        if not layer.is_linear:
            raise ValueError(
                f"adapter_name: {adapter_name!r} has init_lora_weights='eva' and adapts {_inside(name)!r} "
                f"({type(layer).__name__}), whose input has no components; accepted are linear modules"
            )
    model.check_change("initialize_lora_eva_weights")
    return config


def _layers(model: PeftModel, adapter_name: str) -> dict[str, LoRALayer]:
    modules = model.named_modules()
    return {n: m for n, m in modules if isinstance(m, LoRALayer) and adapter_name in m.adapters}


def _inside(name: str) -> str:
    """A module's name in the base model."""
    return name.removeprefix("base_model.model.")


def _device(model: PeftModel) -> torch.device | None:
    """The one device of the model; None: there are several, and the batches must be where they belong."""
    devices = {p.device for p in model.parameters() if p.device.type != "meta"}
    return devices.pop() if len(devices) == 1 else None


@contextmanager
def _as_base(model: PeftModel) -> Iterator[None]:
    """The model without its adapters, in eval mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with model.disable_adapter():
            yield
    finally:
        for module in training:
            module.training = True


def _again_and_again(dataloader: Iterable[Any], device: torch.device | None) -> Iterator[Any]:
    for _ in range(_MOST_PASSES):
        empty = True
        for batch in dataloader:
            empty = False
            yield _to(batch, device)
        if empty:
            raise ValueError("dataloader: is empty, or cannot be run through again")
    raise RuntimeError(
        f"dataloader: after {_MOST_PASSES} passes the components of some layer have not settled, or no batch has as many "
        "rows as components; give larger batches, more data, or a smaller EvaConfig(tau=..., rho=...)"
    )


def _to(batch: Any, device: torch.device | None) -> Any:
    if device is None:
        return batch
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_to(value, device) for value in batch)
    return batch


def _fingerprint(rows: Tensor) -> bytes:
    data: Any = rows.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(data).digest() + repr(tuple(rows.shape)).encode()


def _budget(
    layers: dict[str, LoRALayer], heads: dict[str, str], config: LoraConfig, adapter_name: str
) -> _Budget:
    assert isinstance(config.eva_config, EvaConfig)
    ranks = {name: layer.r[adapter_name] for name, layer in layers.items()}
    most = {
        name: min(round(rank * config.eva_config.rho), layers[name].in_features, MAX_RANK)
        for name, rank in ranks.items()
    }
    limits = {
        name: max(most[other] for other in layers if heads[other] == heads[name]) for name in layers
    }
    return _Budget(limits, sum(ranks.values()))


def _share_out(
    found: dict[str, _Components], heads: dict[str, str], budget: _Budget
) -> dict[str, int]:
    """Ranks that use the budget up on the components that explain most of their layers' variance."""
    order = [name for name in heads if heads[name] == name]
    order += [name for name in heads if heads[name] != name]
    names = [name for name in order for _ in found[heads[name]].shares[: budget.limits[name]]]
    shares = torch.cat([found[heads[n]].shares[: budget.limits[n]] for n in order])
    ranks = dict.fromkeys(heads, 0)
    for index in shares.argsort(descending=True, stable=True)[: budget.total].tolist():
        ranks[names[index]] += 1
    for name, head in heads.items():  # a head converges for all that share its rows
        if ranks[head] < ranks[name]:
            ranks[head], ranks[name] = ranks[name], ranks[head]
    return ranks


def _check_fits(values: Mapping[str, Tensor], layers: dict[str, LoRALayer]) -> None:
    if set(values) != set(layers):
        odd = sorted(set(values) ^ set(layers))
        raise ValueError(
            f"eva_state_dict: has other layers than the adapter, {odd[0]!r} for one; make it with get_eva_state_dict"
        )
    for name, value in values.items():
        k = layers[name].in_features
        if value.ndim != 2 or value.shape[1] != k or value.shape[0] > MAX_RANK:
            raise ValueError(
                f"eva_state_dict: {name!r} is {list(value.shape)}; accepted is [rank, {k}], rank up to {MAX_RANK}"
            )


def _put_in(
    layers: dict[str, LoRALayer],
    values: Mapping[str, Tensor],
    config: LoraConfig,
    adapter_name: str,
) -> None:
    assert isinstance(config.eva_config, EvaConfig)
    for name, layer in layers.items():
        a, old = values[name], layer.r[adapter_name]
        rank = a.shape[0]
        if rank == 0:
            layer.delete_adapter(adapter_name)
            continue
        if rank != old:
            alpha = pattern_value(config.alpha_pattern, _inside(name), config.lora_alpha)
            if config.eva_config.adjust_scaling_factors:
                alpha *= rank / old
            _resize(layer, adapter_name, rank, alpha)
        layer.lora_A[adapter_name].copy_(a)


def _resize(layer: LoRALayer, name: str, rank: int, alpha: float) -> None:
    """The adapter anew with another rank, all else as it was."""
    like, active = layer.lora_A[name], list(layer.active_adapters)
    settings = layer.lora_dropout[name], layer.use_rslora[name], "eva", like.dtype
    dora = name in layer.lora_magnitude_vector
    layer.delete_adapter(name)
    layer.add_adapter(name, rank, alpha, *settings, use_dora=dora)
    layer.active_adapters = active
    for parameter in layer.adapter_parameters(name):
        parameter.requires_grad_(like.requires_grad)
