"""What a method's run does with a model: how the base is loaded, what of it is trained, what is saved. Which methods there
are, and their options, is in ``methods.py``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import methods
from ..io import save_adapter
from ..io.adapter import adapter_size
from ..io.checkpoint import replace_file
from ..io.files import safetensors_size
from ..layers.inits import changes_base_weight
from ..models import get_peft_model
from ..models.budget import rank_for_share
from ..models.eva import initialize_lora_eva_weights
from . import base
from .blocks import Data
from .config import FinetuneConfig
from .errors import InputError
from .output import OutputDirectory
from .packing import BatchOrder, collate


class Engine:
    """One way to train a model: a ``FinetuneConfig`` and what its ``method`` means."""

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config

    def describe(self) -> str:
        """For the reader."""
        config = self.config
        values = {name: config.chosen(name) for name in config.kind.options}
        if config.trainable_share is not None:
            values["r"] = None
        return " ".join(
            [
                config.method,
                *(f"{name}={_short(v)}" for name, v in values.items() if v is not None),
            ]
        )

    def stored_as(self, dtype: torch.dtype) -> torch.dtype:
        """The base's dtype in a run that computes in ``dtype``."""
        return dtype

    def cast_to(self, dtype: torch.dtype) -> torch.dtype | None:
        """What autocast makes of products in a run that computes in ``dtype``; None: all is in that dtype, or sees to it."""
        return dtype if self.config.kind.trains_base and dtype != torch.float32 else None

    def check_base(self) -> None:
        """``InputError`` where ``--model`` is none that this method takes; reads no weights."""

    def load(self, dtype: torch.dtype, device: torch.device) -> Any:
        """The base, frozen. Raises ``InputError``."""
        self.check_base()
        return base.load_model(self.config.model, self.stored_as(dtype), device)

    def enter(self, model: Any, device: torch.device, say: Callable[[str], None]) -> Any:
        """The model to train, on ``device``: those of its parameters require grad, in fp32, that are trained.

        On the meta device an initialisation that reads the base's weights is left out: shapes do not depend on it.
        """
        raise NotImplementedError

    def begin(self, lm: base.CausalLM, data: Data, pad_id: int) -> None:
        """What the start of training takes from data, before there is an optimizer."""

    def count(self, model: Any) -> tuple[int, int]:
        """(trained, all) parameters of what ``enter`` returned, as everything below takes it."""
        raise NotImplementedError

    def rank(self, model: Any) -> int | None:
        """Of the adapter, if there is one."""
        return None

    def saved_bytes(self, model: Any, dtype: torch.dtype) -> int:
        """Of the file of weights that ``save`` writes (of one file, where it writes several)."""
        raise NotImplementedError

    def result(self, out: OutputDirectory) -> Path:
        """Where ``save`` puts what was trained."""
        raise NotImplementedError

    def save(self, model: Any, out: OutputDirectory, tokenizer: Any, dtype: torch.dtype) -> None:
        """Write what was trained; what was there before stays until the new files are whole."""
        raise NotImplementedError


class AdapterEngine(Engine):
    """An adapter in or beside a frozen base, which some methods hold in 4 bits."""

    def load(self, dtype: torch.dtype, device: torch.device) -> Any:
        # What is quantised is loaded on the CPU: in full precision it need not fit on the GPU.
        quantised = "quantize" in self.config.kind.fixed
        return super().load(dtype, torch.device("cpu") if quantised else device)

    def enter(self, model: Any, device: torch.device, say: Callable[[str], None]) -> Any:
        config = self.config
        try:
            adapter = self._configuration(model, on_meta=device.type == "meta")
            if config.trainable_share is not None:
                adapter.r = rank_for_share(model, adapter, config.trainable_share)
                say(f"rank {adapter.r} trains at most {config.trainable_share:.2%} of the model")
            adapted = get_peft_model(model, adapter, device=device)
        except (ValueError, NotImplementedError) as error:
            raise InputError(f"the adapter cannot be added to {config.model}: {error}") from error
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = (
                    parameter.data.float()
                )  # an optimizer's small steps vanish in 16 bits
        return adapted

    def _configuration(self, model: Any, on_meta: bool) -> Any:
        """The method's, with the run's options."""
        config, kind = self.config, self.config.kind
        fields = dict(kind.fixed)
        for name, option in kind.options.items():
            value = config.chosen(name)
            if option.field is not None and value is not None:
                fields[option.field] = option.values.get(value, value)
        if "target_modules" in fields:
            fields["target_modules"] = _target_modules(fields["target_modules"], model)
        if on_meta and changes_base_weight(fields.get("init_lora_weights", True)):
            del fields["init_lora_weights"]
        if config.prompt_text is not None:
            folder, gguf = base.locate(config.model)
            fields |= {
                "prompt_tuning_init": "TEXT",
                "prompt_tuning_init_text": config.prompt_text,
                "tokenizer_name_or_path": str(folder.resolve()),
                "tokenizer_kwargs": {"gguf_file": gguf} if gguf else None,
            }
        assert kind.configuration is not None
        return getattr(methods, kind.configuration)(
            task_type="CAUSAL_LM",
            base_model_name_or_path=str(Path(config.model).resolve()),
            **fields,
        )

    def begin(self, lm: base.CausalLM, data: Data, pad_id: int) -> None:
        if self.config.init != "eva":
            return
        try:
            initialize_lora_eva_weights(
                lm.model,
                _EvaBatches(self.config, data, pad_id),
                forward_fn=lambda _, batch: lm.logits(batch["input_ids"], batch["position_ids"]),
            )
        except (ValueError, RuntimeError) as error:
            raise InputError(f"--init eva: {error}") from error

    def count(self, model: Any) -> tuple[int, int]:
        trained, total = model.get_nb_trainable_parameters()
        return trained, total

    def rank(self, model: Any) -> int | None:
        rank = getattr(model.peft_config["default"], "r", None)
        return None if rank is None else int(rank)

    def saved_bytes(self, model: Any, dtype: torch.dtype) -> int:
        return adapter_size(model)

    def result(self, out: OutputDirectory) -> Path:
        return out.adapter

    def save(self, model: Any, out: OutputDirectory, tokenizer: Any, dtype: torch.dtype) -> None:
        save_adapter(model, out.adapter)


class FullEngine(Engine):
    """All parameters, kept in fp32; products are autocast to the run's dtype. Saved as a plain checkpoint in that dtype."""

    def stored_as(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def check_base(self) -> None:
        how = base.quantization(self.config.model)
        if how is not None:
            raise InputError(
                f"--method full: --model {self.config.model} is quantised ({how}), and such weights cannot be trained; "
                "give the original model, or --method qlora"
            )

    def enter(self, model: Any, device: torch.device, say: Callable[[str], None]) -> Any:
        return model.to(device).requires_grad_(True)

    def count(self, model: Any) -> tuple[int, int]:
        total = sum(parameter.numel() for parameter in model.parameters())
        return total, total

    def saved_bytes(self, model: Any, dtype: torch.dtype) -> int:
        on_meta = {n: p.to("meta", dtype) for n, p in model.named_parameters()}
        return safetensors_size(on_meta)

    def result(self, out: OutputDirectory) -> Path:
        return out.model

    def save(self, model: Any, out: OutputDirectory, tokenizer: Any, dtype: torch.dtype) -> None:
        building = out.model.with_name(f".{out.model.name}.building")
        before = out.model.with_name(f".{out.model.name}.before")
        for left in (building, before):
            shutil.rmtree(left, ignore_errors=True)
        # On the CPU: a GPU that trains all of a model has no room for a copy of it. By memory: tied weights stay one.
        state = model.state_dict()
        cast = {
            (v.data_ptr(), v.shape): v.to("cpu", dtype if v.is_floating_point() else v.dtype)
            for v in state.values()
        }
        state = {name: cast[v.data_ptr(), v.shape] for name, v in state.items()}
        with base.quiet_transformers():
            model.save_pretrained(building, state_dict=state)
        tokenizer.save_pretrained(building)
        file = building / "config.json"  # transformers notes the dtype that it trained in
        written = json.loads(file.read_bytes()) | {"dtype": str(dtype).removeprefix("torch.")}
        replace_file(file, (json.dumps(written, indent=2) + "\n").encode())
        if out.model.exists():
            out.model.rename(before)
        building.rename(out.model)
        shutil.rmtree(before, ignore_errors=True)


def engine_of(config: FinetuneConfig) -> Engine:
    """What does ``config.method``."""
    return (FullEngine if config.kind.configuration is None else AdapterEngine)(config)


class _EvaBatches:
    """The training data as EVA looks at it, the same at every pass: a step's rows after another's."""

    def __init__(self, config: FinetuneConfig, data: Data, pad_id: int) -> None:
        self._blocks, self._pad_id = data.training, pad_id
        self._order = BatchOrder(len(data.training), config.batch_size, config.seed)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for step in range(self._order.steps_per_epoch):
            yield vars(collate([self._blocks[i] for i in self._order(step)], self._pad_id))


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _is_other(module: nn.Module) -> bool:
    return bool(module._parameters) and not _is_linear(module)


def _target_modules(wanted: str, model: nn.Module) -> str | list[str]:
    """``--target-modules`` as LoraConfig takes it; every name must exist: no typo is ignored."""
    if wanted == "all-linear":
        return wanted
    if wanted.startswith("regex:"):
        return wanted.removeprefix("regex:")
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    modules = dict(model.named_modules())
    unknown = [n for n in names if not any(m == n or m.endswith(f".{n}") for m in modules)]
    if unknown:
        linears, others = (
            sorted({n.rsplit(".", 1)[-1] for n, m in modules.items() if fits(m)})
            for fits in (_is_linear, _is_other)
        )
        raise InputError(
            f"--target-modules: the model has no module {', '.join(unknown)}; its linear layers are "
            f"{', '.join(linears)}, other modules with weights {', '.join(others)} (or give all-linear, or regex:PATTERN)"
        )
    return names
