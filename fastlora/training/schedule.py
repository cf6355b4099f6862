"""How long a run is and how the learning rate moves along it."""

from __future__ import annotations

import math
from dataclasses import dataclass

WARMUP_START = (
    0.1  # the first step still learns: warm-up rises from a tenth of the rate, not from zero
)


@dataclass(frozen=True)
class Horizon:
    """The end of a run: so many optimizer steps or, if given, seconds, whichever comes first."""

    max_steps: int
    max_seconds: float | None = None

    def progress(self, step: int, seconds: float) -> float:
        """Where in [0, 1] step ``step`` (from 0) stands, ``seconds`` after the start.

        By steps alone this depends on nothing else, so a resumed run sees the same learning rates.
        With a time limit the clock decides as soon as it is ahead of the step count.
        """
        by_steps = (step + 0.5) / self.max_steps  # the middle of the step: never 0, never 1
        by_time = seconds / self.max_seconds if self.max_seconds is not None else 0.0
        return min(1.0, max(by_steps, by_time))

    def finished(self, step: int, seconds: float, step_seconds: float) -> bool:
        """Whether to stop before step ``step``, given how long a step has been taking."""
        if step >= self.max_steps:
            return True
        # The first step always runs: a run that trains nothing would report nothing.
        return (
            self.max_seconds is not None and step > 0 and seconds + step_seconds > self.max_seconds
        )


def lr_factor(progress: float, warmup: float, schedule: str = "cosine") -> float:
    """The learning rate's factor in (0, 1] at ``progress`` in [0, 1].

    Linear from ``WARMUP_START`` to 1 over the first ``warmup`` share of the run, then ``"cosine"``
    (half a period, 1 to 0: Loshchilov and Hutter 2017, without restarts) or ``"constant"``.
    """
    if progress < warmup:
        return WARMUP_START + (1.0 - WARMUP_START) * progress / warmup
    if schedule == "constant" or warmup >= 1.0:
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * (progress - warmup) / (1.0 - warmup)))
