"""A run from its first evaluation to its summary: what is measured, saved and told."""

from __future__ import annotations

import dataclasses
import errno
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from ..io.checkpoint import latest_checkpoint
from . import base
from .blocks import Data
from .config import FinetuneConfig
from .display import Display, clock, peak_memory
from .engine import Engine
from .errors import RunError
from .loop import SAVED, StopRequest, Trainer, mean_loss
from .output import OutputDirectory
from .packing import Block
from .report import RunLog, plot_curve, write_json
from .sample import Sampling, encode_prompt, generate

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Summary:
    """A finished run, as in ``summary.json``. Perplexities are per token, on held-out text; the watched ones on the general
    text of ``--watch``, None without it. What was trained lies in the folder ``adapter``, or with method "full" in ``model``; the other
    is None."""

    perplexity_before: float
    perplexity_after: float
    watched_perplexity_before: float | None
    watched_perplexity_after: float | None
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    trained_parameters: int
    total_parameters: int
    saved_bytes: int
    training_tokens: int
    held_out_tokens: int
    device: str
    dtype: str
    adapter: str | None
    model: str | None
    curve: str
    log: str
    sample_before: str | None
    sample_after: str | None


class Losses(NamedTuple):
    """Mean losses per token in nats: of the held-out data, and of the watched text if there is some."""

    held_out: float
    watched: float | None


class Session:
    """One call of ``finetune`` once its model and data are there: what is measured, saved and told."""

    def __init__(
        self,
        config: FinetuneConfig,
        device: torch.device,
        dtype: torch.dtype,
        display: Display,
        out: OutputDirectory,
        tokenizer: Any,
        data: Data,
        lm: base.CausalLM,
        engine: Engine,
    ) -> None:
        self.config, self.device, self.dtype, self.display = config, device, dtype, display
        self.out, self.tokenizer, self.data, self.lm = out, tokenizer, data, lm
        self.engine = engine
        self.pad_id = base.pad_id(tokenizer)
        self.stop = StopRequest()
        self.log = RunLog(out.log)
        self.trainer = Trainer(
            lm, data.training, config, device, dtype, self.pad_id, self.log, display, self.stop
        )
        self.trained, self.total = engine.count(lm.model)
        self.before = Losses(math.nan, None)
        self.sample_before: str | None = None
        self.exported_step = -1

    def go(self, resume: bool) -> Summary:
        """Evaluate, train, evaluate, report. Whatever ends it, the loss curve so far is drawn."""
        with self.stop.listening(self.display.warn):
            try:
                self._begin(resume)
                self.trainer.run(save=self._save, evaluate=self._evaluate_midway)
                self._save(final=True)
                return self._finish()
            finally:
                self.display.stop()
                self._plot()

    def _begin(self, resume: bool) -> None:
        self.display.say(
            f"training {self.trained:,} of {self.total:,} parameters ({self.trained / self.total:.2%})"
        )
        checkpoint = None
        if resume:
            checkpoint, skipped = latest_checkpoint(self.out.checkpoints)
            for message in skipped:
                self.display.warn(f"{message}; looking for an older checkpoint")
            if checkpoint is None:
                self.display.warn(
                    f"{self.out.path} holds no usable checkpoint: starting again from step 0"
                )
        if checkpoint is not None:
            self.trainer.restore(checkpoint)
            self.log.resume(checkpoint.step)
            self.before = Losses(*checkpoint.state["losses_before"])
            self.sample_before = checkpoint.state["sample_before"]
            self.display.say(f"resuming from step {checkpoint.step}")
        else:
            self.log.resume(-1)
            self.sample_before = self._sample()
            self.before = self._evaluate("before training")
        self._tell("before", self.before)

    def _tell(self, when: str, losses: Losses) -> None:
        self.display.say(f"held-out perplexity {when}: {_perplexity(losses.held_out):.2f}")
        if losses.watched is not None:
            self.display.say(f"watched perplexity {when}: {_perplexity(losses.watched):.2f}")

    def _evaluate(self, when: str) -> Losses:
        """The losses now, logged; those already logged for this step are not computed again."""
        last = self.log.entries[-1] if self.log.entries else {}
        if last.get("step") == self.trainer.step and last.get("eval_loss") is not None:
            return Losses(last["eval_loss"], last.get("watch_loss"))
        held_out = self._mean_loss(self.data.held_out, when)
        entry = {"step": self.trainer.step, "eval_loss": held_out}
        entry["perplexity"] = _perplexity(held_out)
        watched = None
        if self.data.watched:
            watched = self._mean_loss(self.data.watched, when)
            entry |= {"watch_loss": watched, "watch_perplexity": _perplexity(watched)}
        self.log.add(entry)
        return Losses(held_out, watched)

    def _mean_loss(self, blocks: list[Block], when: str) -> float:
        self.display.start(f"evaluating {when}")

        def progress(done: float) -> None:
            self.display.advance(done)
            if self.trainer.step == 0:
                self.stop.check("stopped before the first step: nothing was trained yet")
            elif self.trainer.step == self.trainer.saved_step:  # else the loop stops, and saves
                self.stop.check(f"stopped while evaluating {when}; {SAVED}")

        config = self.config
        loss = mean_loss(self.lm, blocks, config.batch_size, self.device, self.pad_id, progress)
        self.display.stop()
        if math.isnan(loss):
            raise RunError(
                f"the held-out loss is NaN at step {self.trainer.step}: the model overflows in {self.dtype}, or its "
                "weights are damaged; try --dtype float32 (or bfloat16)"
            )
        return loss

    def _evaluate_midway(self) -> None:
        losses = self._evaluate("during training")
        watched = "" if losses.watched is None else f", watched {_perplexity(losses.watched):.2f}"
        self.display.say(
            f"step {self.trainer.step}  held-out perplexity {_perplexity(losses.held_out):.2f}{watched}"
        )
        self.display.start("training")

    def _sample(self) -> str | None:
        if self.config.sample_prompt is None:
            return None
        sampling = Sampling(max_new_tokens=self.config.sample_tokens, seed=self.config.seed)
        ids = encode_prompt(self.config.sample_prompt, self.tokenizer, chat=False)
        return generate(self.lm.model, self.tokenizer, ids, sampling)

    def _save(self, final: bool = False) -> None:
        """Checkpoint and adapter (or model) of this step. Before the end, a full disk stops nothing."""
        step = self.trainer.step
        try:
            if self.trainer.saved_step != step:
                extra = {"losses_before": list(self.before), "sample_before": self.sample_before}
                self.trainer.save(self.out.checkpoints, extra)
            if self.exported_step != step:
                self.engine.save(self.lm.model, self.out, self.tokenizer, self.dtype)
                self.exported_step = step
        except (OSError, SafetensorError) as error:
            full = getattr(error, "errno", None) in _DISK_FULL or "os error 28" in str(error)
            kept = self.trainer.saved_step
            message = (
                f"step {step} could not be saved in {self.out.path}: {'the disk is full' if full else error}. "
                + (
                    f"The checkpoint of step {kept} is intact. "
                    if kept >= 0
                    else "There is no earlier checkpoint. "
                )
            )
            if final or self.stop.signal is not None:
                raise RunError(
                    message + "Free some space; --resume then does the steps since again"
                ) from error
            self.display.warn(
                message + "Training goes on and will save later: free some space meanwhile"
            )

    def _finish(self) -> Summary:
        before, after = self.before, self._evaluate("after training")
        trainer, out, result = self.trainer, self.out, self.engine.result(self.out)
        summary = Summary(
            perplexity_before=_perplexity(before.held_out),
            perplexity_after=_perplexity(after.held_out),
            watched_perplexity_before=_perplexity_or_none(before.watched),
            watched_perplexity_after=_perplexity_or_none(after.watched),
            steps=trainer.step,
            tokens=trainer.tokens,
            seconds=round(trainer.seconds, 3),
            tokens_per_second=round(trainer.tokens / trainer.seconds, 1),
            peak_memory_bytes=peak_memory(self.device),
            trained_parameters=self.trained,
            total_parameters=self.total,
            saved_bytes=sum(file.stat().st_size for file in result.glob("*.safetensors")),
            training_tokens=self.data.training_tokens,
            held_out_tokens=self.data.held_out_tokens,
            device=torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            adapter=str(result) if result == out.adapter else None,
            model=str(result) if result == out.model else None,
            curve=str(out.curve),
            log=str(out.log),
            sample_before=self.sample_before,
            sample_after=self._sample(),
        )
        say = self.display.say
        self._tell("after", after)
        say(
            f"{summary.steps} steps, {summary.tokens:,} tokens in {clock(summary.seconds)} "
            f"({summary.tokens_per_second:,.0f} tokens/s), peak memory {summary.peak_memory_bytes / 2**30:.2f} GiB"
        )
        if summary.sample_before is not None:
            prompt = self.config.sample_prompt
            say(
                f"\nsample before: {prompt}{summary.sample_before}\n\nsample after: {prompt}{summary.sample_after}\n"
            )
        write_json(out.summary, dataclasses.asdict(summary))
        say(
            f"{result.name + ':':<8} {result} ({summary.saved_bytes / 2**20:,.3g} MiB)\ncurve:   {summary.curve}\nlog:     {summary.log}"
        )
        return summary

    def _plot(self) -> None:
        """The curve of whatever was logged; a run that failed has one too."""
        title = f"{Path(self.config.model).name} on {Path(self.config.data).name}"
        try:
            plot_curve(self.log.entries, self.out.curve, title)
        except OSError as error:
            self.display.warn(f"no loss curve: {error}")


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700.0 else math.inf


def _perplexity_or_none(loss: float | None) -> float | None:
    return None if loss is None else _perplexity(loss)
