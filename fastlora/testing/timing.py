"""The project's timing rule: every figure fastlora publishes was taken by the functions of this file.

Contenders are timed in rounds. A round times each of them once, in an order that is shuffled anew, so that a clock,
a temperature or a neighbour that drifts touches all of them alike. Every timed call starts with a cold L2. What is
reported is a ratio: time over the base contender's time *of the same round*, median over the rounds, with a
bootstrap 95 % interval of that median. Absolute times move by several per cent between runs; these ratios do not.

Two clocks measure a call. The *device clock* (CUDA events around one call) sees what the GPU takes, as in a training
step whose host runs ahead: the GPU is held for ``HOST_LEAD_US`` before each call, alike for all, so that no contender's
Python shows. The *host loop* (100 calls back to back between two synchronisations) is what a loop pays when the host
does not run ahead, Python and launches included. On a machine without CUDA the device clock is ``time.perf_counter``.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch

MIN_ROUNDS = 15
HOST_LEAD_US = 3000  # several times the slowest contender's Python
_CYCLES_PER_US = (
    2000  # at the highest clock of today's GPUs; a slower clock only lengthens the lead
)
_MIB = 2**20

Call = Callable[[], object]
Clock = Callable[[Call], float]


@dataclass(frozen=True)
class Rule:
    """What a published figure must fulfil; written into every result file.

    Args:
        rounds: timed rounds, at least ``MIN_ROUNDS``.
        warmup: untimed calls of each contender before the first round.
        seed: of the order of contenders and of the bootstrap.
        resamples: bootstrap resamples.
        confidence: of the interval.

    Raises:
        ValueError: fewer rounds than ``MIN_ROUNDS``.
    """

    rounds: int = 25
    warmup: int = 3
    seed: int = 0
    resamples: int = 4000
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.rounds < MIN_ROUNDS:
            raise ValueError(
                f"rounds: got {self.rounds}; the timing rule asks for at least {MIN_ROUNDS}"
            )


@dataclass(frozen=True)
class Interval:
    """A median and the bootstrap interval around it (dimensionless: a ratio of two times)."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Contender:
    """One thing to time: ``run()`` does the work; ``around()`` is entered before the clock starts, left after."""

    run: Call
    around: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass
class Timing:
    """One contender's times, us per round, and its ratio to the base. ``error`` says why there are none."""

    times_us: list[float] = field(default_factory=list)
    ratio: Interval | None = None
    error: str | None = None

    @property
    def median_us(self) -> float | None:
        return float(np.median(self.times_us)) if self.times_us else None


# ---- clocks --------------------------------------------------------------------------------------------------


class DeviceClock:
    """Time of one call on ``device`` in us, after its caches were flushed. CUDA events, or perf_counter on a CPU.

    The flush writes a buffer four times the size of the L2, 256 MiB at least, which leaves the L2 full of lines that
    the timed call has to write back. With ``clean`` it reads the buffer after that: what is timed is the call's own
    traffic. Before the flush the GPU spins, while the host queues the timed call.
    """

    def __init__(
        self, device: torch.device, flush_bytes: int | None = None, clean: bool = False
    ) -> None:
        self.device, self.clean = device, clean
        if flush_bytes is None:
            flush_bytes = 64 * _MIB
            if device.type == "cuda":
                flush_bytes = max(4 * l2_bytes(device), 256 * _MIB)
        self.flush_bytes = flush_bytes
        self._buffer = torch.empty(flush_bytes, dtype=torch.int8, device=device)

    def __call__(self, run: Call) -> float:
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda._sleep(HOST_LEAD_US * _CYCLES_PER_US)
        self._buffer.zero_()
        if self.clean:
            self._buffer.view(torch.int32).sum()
        if self.device.type != "cuda":
            started = time.perf_counter()
            run()
            return (time.perf_counter() - started) * 1e6
        with torch.cuda.device(self.device):
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            # Waiting here gives every call the same lead of the host, and an asynchronous fault its right owner.
            end.synchronize()
            return start.elapsed_time(end) * 1e3


def l2_bytes(device: torch.device) -> int:
    """Size of the L2 cache of a CUDA device in bytes."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def synchronize(device: torch.device) -> None:
    """Wait for ``device``; on a CPU there is nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_loop(run: Call, device: torch.device, n: int = 100) -> float:
    """us per call of ``n`` calls back to back between two synchronisations: host time included, caches warm."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(n):
        run()
    synchronize(device)
    return (time.perf_counter() - started) / n * 1e6


# ---- statistics ----------------------------------------------------------------------------------------------


def orders(contenders: int, rounds: int, seed: int) -> list[list[int]]:
    """The order of each round: a fresh permutation of ``range(contenders)`` from a fixed seed."""
    generator = np.random.default_rng(seed)
    return [generator.permutation(contenders).tolist() for _ in range(rounds)]


def median_interval(values: list[float], rule: Rule) -> Interval:
    """Median of ``values`` and its percentile-bootstrap interval (Efron and Tibshirani, 1993, chapter 13)."""
    sample = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(rule.seed)
    picks = generator.integers(0, len(sample), size=(rule.resamples, len(sample)))
    tail = (1.0 - rule.confidence) / 2.0
    low, high = np.quantile(np.median(sample[picks], axis=1), [tail, 1.0 - tail])
    return Interval(float(np.median(sample)), float(low), float(high))


# ---- measuring -----------------------------------------------------------------------------------------------


def measure(
    contenders: Mapping[str, Contender], base: str, clock: Clock, rule: Rule
) -> dict[str, Timing]:
    """Time ``contenders`` against ``base`` by the rule.

    A contender that raises, in warm-up or in any round, is reported with its error and without a time; the others
    go on. If that contender is the base, the others keep their times and have no ratio.

    Returns:
        One ``Timing`` for every contender, in the order given.

    Raises:
        ValueError: ``base`` is no contender.
    """
    if base not in contenders:
        raise ValueError(f"base: got {base!r}; accepted are the contenders {list(contenders)}")
    timings = {name: Timing() for name in contenders}
    names = list(contenders)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for name in names:
            for _ in range(rule.warmup):
                _time_once(contenders[name], clock, timings[name], keep=False)
        for order in orders(len(names), rule.rounds, rule.seed):
            for name in (names[index] for index in order):
                _time_once(contenders[name], clock, timings[name], keep=True)
    finally:
        if collecting:
            gc.enable()
    for timing in timings.values():
        if timing.error:
            timing.times_us.clear()
    base_times = timings[base].times_us
    for timing in timings.values():
        if timing.times_us and base_times:
            ratios = [t / b for t, b in zip(timing.times_us, base_times, strict=True)]
            timing.ratio = median_interval(ratios, rule)
    return timings


def _time_once(contender: Contender, clock: Clock, timing: Timing, keep: bool) -> None:
    if timing.error:
        return
    try:
        with contender.around():
            elapsed = clock(contender.run)
    except Exception as error:  # whatever a contender raises is its result
        timing.error = describe(error)
        return
    if keep:
        timing.times_us.append(elapsed)


def describe(error: BaseException) -> str:
    """An exception in one line, short enough for a table."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


# ---- ceilings ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """What the device was seen to reach in the same run: bytes/s of a copy, FLOP/s of a large square GEMM."""

    copy_bytes_per_s: float
    gemm_flops_per_s: float

    def floor_us(self, flops: float, moved_bytes: float) -> float:
        """The least time, us, in which ``flops`` and ``moved_bytes`` can be done: the larger of the two terms."""
        return max(flops / self.gemm_flops_per_s, moved_bytes / self.copy_bytes_per_s) * 1e6


def measure_ceilings(
    device: torch.device, dtype: torch.dtype, clock: Clock, rule: Rule
) -> Ceilings:
    """Measure both ceilings of ``device`` for ``dtype``; a copy counts the bytes it reads and those it writes."""
    on_gpu = device.type == "cuda"
    size, copied = (8192, 1024 * _MIB) if on_gpu else (512, 64 * _MIB)
    generator = torch.Generator(device).manual_seed(rule.seed)
    left, right = (
        torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2)
    )
    source = torch.randint(0, 256, (copied,), generator=generator, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timings = measure(
        {"gemm": Contender(lambda: left @ right), "copy": Contender(lambda: target.copy_(source))},
        "copy",
        clock,
        rule,
    )
    times = {}
    for name, timing in timings.items():
        if timing.median_us is None:
            raise RuntimeError(
                f"the {name} that measures the ceiling of {device} failed: {timing.error}"
            )
        times[name] = timing.median_us * 1e-6
    return Ceilings(2.0 * copied / times["copy"], 2.0 * size**3 / times["gemm"])
