"""What ``--method``s differ in: how the base is loaded, what of it is trained, what is saved. The rest of a run asks here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..io import save_adapter
from ..io.adapter import adapter_size
from ..io.checkpoint import replace_file
from ..io.files import safetensors_size
from ..methods import LoraConfig
from ..models import get_peft_model
from ..models.budget import rank_for_share
from . import base
from .config import FinetuneConfig
from .errors import InputError
from .output import OutputDirectory


class Method:
    """One way to train a model: a ``FinetuneConfig`` and what its ``method`` means."""

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config

    def describe(self) -> str:
        """For the reader."""
        return self.config.method

    def stored_as(self, dtype: torch.dtype) -> torch.dtype:
        """The base's dtype in a run that computes in ``dtype``."""
        return dtype

    def cast_to(self, dtype: torch.dtype) -> torch.dtype | None:
        """What autocast makes of products in a run that computes in ``dtype``; None: the model is in that dtype."""
        return None

    def check_base(self) -> None:
        """``InputError`` where ``--model`` is none that this method takes; reads no weights."""

    def load(self, dtype: torch.dtype, device: torch.device) -> Any:
        """The base, frozen. Raises ``InputError``."""
        self.check_base()
        return base.load_model(self.config.model, self.stored_as(dtype), device)

    def enter(self, model: Any, device: torch.device, say: Callable[[str], None]) -> Any:
        """The model to train, on ``device``: those of its parameters require grad, in fp32, that are trained."""
        raise NotImplementedError

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


class LowRank(Method):
    """lora, rslora, qlora: an adapter beside a frozen base, which qlora holds in 4 bits."""

    def describe(self) -> str:
        config = self.config
        rank = f"r={config.r}"
        if config.trainable_share is not None:
            rank = f"r for {config.trainable_share:.2%}"
        return f"{config.method} {rank} alpha={config.alpha:g} on {config.target_modules}"

    def load(self, dtype: torch.dtype, device: torch.device) -> Any:
        # What is quantised is loaded on the CPU: in full precision it need not fit on the GPU.
        return super().load(dtype, torch.device("cpu") if self.config.method == "qlora" else device)

    def enter(self, model: Any, device: torch.device, say: Callable[[str], None]) -> Any:
        config = self.config
        try:
            lora = LoraConfig(
                r=config.r,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                target_modules=_target_modules(config.target_modules, model),
                use_rslora=config.method == "rslora",
                quantize="nf4" if config.method == "qlora" else None,
                task_type="CAUSAL_LM",
                base_model_name_or_path=str(Path(config.model).resolve()),
            )
            if config.trainable_share is not None:
                lora.r = rank_for_share(model, lora, config.trainable_share)
                say(f"rank {lora.r} trains at most {config.trainable_share:.2%} of the model")
            adapted = get_peft_model(model, lora, device=device)
        except (ValueError, NotImplementedError) as error:
            raise InputError(f"the adapter cannot be added to {config.model}: {error}") from error
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = (
                    parameter.data.float()
                )  # an optimizer's small steps vanish in 16 bits
        return adapted

    def count(self, model: Any) -> tuple[int, int]:
        trained, total = model.get_nb_trainable_parameters()
        return trained, total

    def rank(self, model: Any) -> int | None:
        return int(model.peft_config["default"].r)

    def saved_bytes(self, model: Any, dtype: torch.dtype) -> int:
        return adapter_size(model)

    def result(self, out: OutputDirectory) -> Path:
        return out.adapter

    def save(self, model: Any, out: OutputDirectory, tokenizer: Any, dtype: torch.dtype) -> None:
        save_adapter(model, out.adapter)


class Full(Method):
    """All parameters, kept in fp32; products are autocast to the run's dtype. Saved as a plain checkpoint in that dtype."""

    def stored_as(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def cast_to(self, dtype: torch.dtype) -> torch.dtype | None:
        return None if dtype == torch.float32 else dtype

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


def method_of(config: FinetuneConfig) -> Method:
    """The method that ``config.method`` names."""
    return (Full if config.method == "full" else LowRank)(config)


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
        linears = {
            name.rsplit(".", 1)[-1] for name, m in modules.items() if isinstance(m, nn.Linear)
        }
        raise InputError(
            f"--target-modules: the model has no module {', '.join(unknown)}; its linear layers are "
            f"{', '.join(sorted(linears))} (or give all-linear, or regex:PATTERN)"
        )
    return names
