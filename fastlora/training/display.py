"""What a run shows while it goes: a progress bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

import contextlib
import resource
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

PLAIN_SECONDS = 10.0  # a plain line at most this often


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's peak resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not rusage's where it can be helped: a process inherits that of the one it was forked from.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def clock(seconds: float) -> str:
    """``h:mm:ss`` or ``mm:ss``."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute:02}:{second:02}"


class Display:
    """Progress of one phase at a time; ``say`` and ``warn`` print above it."""

    def __init__(self, console: Console, device: torch.device) -> None:
        self.console, self.device = console, device
        self._progress: Progress | None = None
        self._last_line = 0.0

    def say(self, text: str) -> None:
        """A line for the reader, as it is: paths and samples are not markup."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line that must not be missed."""
        self.console.print(
            f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True
        )

    def start(self, what: str) -> None:
        """Begin a phase."""
        self.stop()
        self._last_line = 0.0
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:3.0f}%"),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                console=self.console,
                expand=True,
                transient=True,
            )
            self._progress.add_task(what, total=1.0, status="")
            self._progress.start()

    def update(
        self, step: int, loss: float, tokens_per_second: float, done: float, eta: float
    ) -> None:
        """After a step: ``done`` in [0, 1], ``eta`` in seconds."""
        gib = peak_memory(self.device) / 2**30
        status = f"step {step}  loss {loss:.4f}  {tokens_per_second:,.0f} tok/s  ETA {clock(eta)}  {gib:.2f} GiB"
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=done, status=status)
        elif time.monotonic() - self._last_line >= PLAIN_SECONDS or done >= 1.0:
            self._last_line = time.monotonic()
            self.say(f"{status}  {done:4.0%}")

    def advance(self, done: float, status: str = "") -> None:
        """Progress of a phase without losses (an evaluation); silent where there is no terminal."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=done, status=status)

    def stop(self) -> None:
        """End the phase and take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
