"""The training loop: exact to resume, bounded in time, careful with what a user could lose."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ..io.checkpoint import (
    Checkpoint,
    load_optimizer,
    optimizer_tensors,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from ..optim import create_loraplus_optimizer
from .base import CausalLM
from .config import FinetuneConfig
from .display import Display
from .errors import InputError, Interrupted, RunError
from .packing import IGNORED, Batch, BatchOrder, Block, collate
from .report import RunLog
from .schedule import Horizon, lr_factor
from .unfreezing import Unfreezing

SAVED = "everything is saved, --resume continues"
MAX_SKIPPED = 20  # fp16 steps in a row that overflowed before it is called divergence


class StopRequest:
    """The first SIGINT or SIGTERM asks to stop at the next safe point; the second acts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextlib.contextmanager
    def listening(self, tell: Callable[[str], None]) -> Iterator[StopRequest]:
        """Listen during the block. Only the main thread can; elsewhere this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return

        def handler(number: int, _frame: Any) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt
            self.signal = number
            tell("stopping after this step and saving; once more stops at once, without saving")

        previous = {
            number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield self
        finally:
            for number, old in previous.items():
                signal.signal(number, old)

    def check(self, message: str) -> None:
        """Raise ``Interrupted`` if a stop was asked for."""
        if self.signal is not None:
            raise Interrupted(message, self.signal)


def summed_loss(lm: CausalLM, batch: Batch, device: torch.device) -> torch.Tensor:
    """Negative log-likelihood of the batch's targets, summed: fp32 0-d, in nats."""
    logits = lm.logits(batch.input_ids.to(device), batch.position_ids.to(device))
    # Labels move one to the left instead of logits one to the right: the logits are the big tensor.
    labels = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED).to(device)
    return F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


@torch.no_grad()
def mean_loss(
    lm: CausalLM,
    blocks: list[Block],
    batch_size: int,
    device: torch.device,
    pad_id: int,
    progress: Callable[[float], None] = lambda done: None,
) -> float:
    """Mean loss per target token over ``blocks``, in nats; draws nothing random."""
    was_training = lm.model.training
    lm.model.eval()
    total, targets = 0.0, 0
    for start in range(0, len(blocks), batch_size):
        batch = collate(blocks[start : start + batch_size], pad_id)
        total += float(summed_loss(lm, batch, device))
        targets += batch.targets
        progress(min(1.0, (start + batch_size) / len(blocks)))
    lm.model.train(was_training)
    return total / targets


def adamw(
    model: torch.nn.Module, config: FinetuneConfig, foreach: bool | None = None
) -> torch.optim.AdamW:
    """The run's optimizer, over what ``model`` trains; ``foreach`` as torch has it. Biases and norms are not decayed; with
    LoRA+ the groups are PEFT's."""
    if config.loraplus_ratio is not None:
        return create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=config.rate,
            loraplus_lr_ratio=config.loraplus_ratio,
            loraplus_weight_decay=config.weight_decay,
            foreach=foreach,
        )
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {
                "params": [p for p in parameters if p.ndim > 1],
                "weight_decay": config.weight_decay,
            },
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=config.rate,
        foreach=foreach,
    )


def planned_steps(config: FinetuneConfig, blocks: int) -> int:
    """Optimizer steps of a run over so many blocks, where no clock ends it."""
    steps = max(1, math.ceil(config.epochs * _batch_order(config, blocks).steps_per_epoch))
    return min(steps, config.max_steps or steps)


def _batch_order(config: FinetuneConfig, blocks: int) -> BatchOrder:
    return BatchOrder(blocks, config.batch_size * config.grad_accumulation, config.seed)


class Trainer:
    """AdamW on one model's trainable parameters; counts its ``step``, ``seconds``, ``tokens``."""

    def __init__(
        self,
        lm: CausalLM,
        blocks: list[Block],
        config: FinetuneConfig,
        device: torch.device,
        dtype: torch.dtype,
        pad_id: int,
        log: RunLog,
        display: Display,
        stop: StopRequest,
    ) -> None:
        self.lm, self.blocks, self.config = lm, blocks, config
        self.device, self.pad_id = device, pad_id
        self.log, self.display, self.stop = log, display, stop
        self.parameters = {name: p for name, p in lm.model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise InputError("nothing to train: the adapter has no trainable parameter")
        self.optimizer = adamw(lm.model, config)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]  # at their peak
        self.unfreezing = Unfreezing(self.parameters, config.unfreeze_over)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.order = _batch_order(config, len(blocks))
        self.horizon = Horizon(
            planned_steps(config, len(blocks)),
            config.max_minutes * 60 if config.max_minutes else None,
        )
        # On a GPU torch takes a mere warning for leave to run attention's usual backward.
        self.strict = device.type == "cuda"
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        self.skipped = 0
        self.saved_step = -1

    @contextlib.contextmanager
    def _deterministic(self) -> Iterator[None]:
        """torch's deterministic kernels for the time of the block, as far as the model has them.

        fastlora's own are always so; attention's backward and others have to be asked.
        """
        was = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        memory: Any = torch.utils.deterministic
        fill = memory.fill_uninitialized_memory
        memory.fill_uninitialized_memory = False  # a debugging aid that costs bandwidth
        torch.use_deterministic_algorithms(True, warn_only=not self.strict)
        try:
            if self.strict:
                self._try_determinism()
            yield
        finally:
            torch.use_deterministic_algorithms(was, warn_only=warn_only)
            memory.fill_uninitialized_memory = fill

    def _try_determinism(self) -> None:
        """Try one block; a model with an op that has no deterministic kernel goes without.

        Leaves gradients, parameters and random states as they were.
        """
        tensors, words = rng_state()
        try:
            batch = collate([self.blocks[self.order(self.step)[0]]], self.pad_id)
            summed_loss(self.lm, batch, self.device).backward()
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            torch.use_deterministic_algorithms(True, warn_only=True)
            reason = str(error).splitlines()[0]
            self.display.warn(f"{reason} A resumed run may differ in the last digits")
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            set_rng_state(tensors, words)

    # -- one step ----------------------------------------------------------------------------------

    def train_step(self) -> dict[str, Any]:
        """One optimizer step over ``batch_size * grad_accumulation`` blocks; returns its log entry.

        The loss is the mean over all target tokens of the step, however they fall into
        micro-batches. Parameters change only when loss and gradient are finite.
        """
        start = time.perf_counter()
        config = self.config
        chosen = [self.blocks[i] for i in self.order(self.step)]
        length = config.seq_length if config.packs else None
        batches = [
            collate(chosen[i : i + config.batch_size], self.pad_id, length)
            for i in range(0, len(chosen), config.batch_size)
        ]
        targets = sum(batch.targets for batch in batches)
        progress = self.horizon.progress(self.step, self.seconds)
        self.unfreezing.at(progress)
        factor = lr_factor(progress, config.warmup, config.schedule)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        total = torch.zeros((), device=self.device)
        for batch in batches:
            loss = summed_loss(self.lm, batch, self.device) / targets
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(
            list(self.parameters.values()), config.grad_clip if config.grad_clip > 0 else math.inf
        )
        # The step's one synchronisation.
        loss_value, norm_value = torch.stack([total, norm.to(total)]).tolist()
        self._check_finite(loss_value, norm_value)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = sum(len(segment) for block in chosen for segment in block)
        seconds = time.perf_counter() - start
        self.step += 1
        self.seconds += seconds
        self.tokens += tokens
        return {
            "step": self.step,
            "loss": loss_value,
            "learning_rate": config.rate * factor,
            "grad_norm": norm_value,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(tokens / seconds, 1),
        }

    def _check_finite(self, loss: float, norm: float) -> None:
        overflow = self.scaler.is_enabled() and math.isfinite(loss) and not math.isfinite(norm)
        self.skipped = self.skipped + 1 if overflow else 0
        if overflow and self.skipped <= MAX_SKIPPED:
            return  # fp16: the scaler skips this step and lowers its scale
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = "loss" if not math.isfinite(loss) else "gradient"
        value = loss if what == "loss" else norm
        kept = (
            f"The checkpoint and the adapter of step {self.saved_step} are kept"
            if self.saved_step >= 0
            else "No checkpoint had been written yet"
        )
        raise RunError(
            f"the {what} became {value} at step {self.step + 1} (learning rate "
            f"{self.optimizer.param_groups[0]['lr']:.3g}). {kept}. Try a lower --learning-rate, a longer --warmup, "
            "a smaller --grad-clip, --dtype float32 (or bfloat16), and look for odd records in the data"
        )

    # -- the run -----------------------------------------------------------------------------------

    def run(self, save: Callable[[], None], evaluate: Callable[[], None]) -> None:
        """Train to the horizon; ``save`` and ``evaluate`` are called when their time has come.

        Raises ``Interrupted`` after saving when a signal came, ``RunError`` when the loss or
        gradient is not finite.
        """
        self.lm.model.train()
        self.display.start("training")
        with self._deterministic() if self.config.deterministic else contextlib.nullcontext():
            while not self.finished:
                entry = self.train_step()
                self.log.add(entry)
                self._show(entry)
                self._due(save, evaluate)
        self.display.stop()

    def _due(self, save: Callable[[], None], evaluate: Callable[[], None]) -> None:
        """What falls due after a step."""
        every = self.config.eval_every
        if every and self.step % every == 0 and not self.finished:
            evaluate()
        if self.stop.signal is not None:
            save()
            self.stop.check(f"stopped at step {self.step}; {SAVED}")
        if self.config.save_every and self.step % self.config.save_every == 0:
            save()

    @property
    def finished(self) -> bool:
        """Whether the horizon is reached."""
        return self.horizon.finished(self.step, self.seconds, self.seconds / max(1, self.step))

    def _show(self, entry: dict[str, Any]) -> None:
        left = (self.horizon.max_steps - self.step) * self.seconds / self.step
        if self.horizon.max_seconds is not None:
            left = min(left, max(0.0, self.horizon.max_seconds - self.seconds))
        done = 1.0 if self.finished else self.seconds / (self.seconds + left)
        self.display.update(self.step, entry["loss"], entry["tokens_per_second"], done, left)

    # -- state -------------------------------------------------------------------------------------

    def save(self, root: Path, extra: dict[str, Any]) -> Path:
        """Checkpoint everything the next step depends on; ``extra`` (JSON) travels with it."""
        self.log.sync()
        optimizer, optimizer_state = optimizer_tensors(self.optimizer)
        rng, rng_words = rng_state()
        path = save_checkpoint(
            root,
            self.step,
            {"parameters": self.parameters, "optimizer": optimizer, "rng": rng},
            {
                "seconds": self.seconds,
                "tokens": self.tokens,
                "skipped": self.skipped,
                "optimizer": optimizer_state,
                "scaler": self.scaler.state_dict(),
                "rng": rng_words,
                **extra,
            },
            keep=self.config.keep_last,
        )
        self.saved_step = self.step
        return path

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from ``checkpoint``: the next step is bit for bit the saved run's next."""
        saved = checkpoint.tensors["parameters"]
        wrong = {
            name
            for name in set(saved) | set(self.parameters)
            if name not in saved
            or name not in self.parameters
            or saved[name].shape != self.parameters[name].shape
        }
        if wrong:
            raise InputError(
                f"{checkpoint.path} holds other parameters than this run trains ({len(wrong)} differ, first "
                f"{min(wrong)!r}): the model or the adapter's options changed"
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(saved[name])
        state = checkpoint.state
        load_optimizer(self.optimizer, checkpoint.tensors["optimizer"], state["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        set_rng_state(checkpoint.tensors["rng"], state["rng"])
        self.step, self.seconds, self.tokens = checkpoint.step, state["seconds"], state["tokens"]
        self.skipped, self.saved_step = state["skipped"], checkpoint.step
