"""Run cases x providers of the linear benchmark into one report: what ``benchmarks/`` and the CLI share."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .environment import environment
from .linear_check import Truth, check_dropout, check_exact
from .providers import BASE, DTYPES, YARDSTICK, Built, Case, Operands, Provider, all_providers
from .timing import (
    Ceilings,
    Contender,
    DeviceClock,
    Interval,
    Rule,
    describe,
    host_loop,
    measure,
    measure_ceilings,
    synchronize,
)

SCHEMA = 1
LOOP_ROWS = 2048  # up to here the host can be slower than a GPU, so the host loop is run too

Progress = Callable[[str], None]


@dataclass
class Row:
    """One provider on one pass ("fwd", "fwd+bwd") of one case. Times in us; both ratios are over ``frozen``."""

    case: str
    direction: str
    provider: str
    status: str = "ok"  # ok | error | unsupported, the last two with a reason
    reason: str | None = None
    median_us: float | None = None
    ratio: Interval | None = None
    loop_us: float | None = None
    loop_ratio: Interval | None = None
    roofline_percent: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    launches: dict[str, int] = field(default_factory=dict)
    kernels: list[dict[str, Any]] = field(default_factory=list)
    times_us: list[float] = field(default_factory=list)


@dataclass
class Report:
    """A run: where and by what rule, the ceilings measured per dtype, the rows, and what was left out with its reason."""

    environment: dict[str, Any]
    rule: Rule
    flush_bytes: int
    providers: dict[str, str] = field(default_factory=dict)
    cases: dict[str, Case] = field(default_factory=dict)
    ceilings: dict[str, Ceilings] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The content of the JSON file."""
        return {"schema": SCHEMA, "benchmark": "linear", **asdict(self)}


def floor_us(case: Case, direction: str, ceilings: Ceilings) -> float:
    """The least time the LoRA linear needs at the measured ceilings, us: the roofline.

    Each pass costs the larger of its FLOPs over the GEMM rate and its bytes over the copy rate, every operand read
    once and every result written once. forward + backward is the sum of both passes: they cannot overlap.
    """
    m, k, n, r = case.m, case.k, case.n, case.r
    wide = DTYPES[case.dtype].itemsize
    adapters = (k + n) * r * DTYPES[case.adapter_dtype or case.dtype].itemsize
    bias = n * wide if case.bias else 0
    base_flops, low_flops = 2.0 * m * k * n, 2.0 * m * r * (k + n)
    # reads x, W, A, B, bias; writes y
    forward = ceilings.floor_us(
        base_flops + low_flops, (m * k + n * k + m * n) * wide + adapters + bias
    )
    if direction == "fwd":
        return forward
    # dX = dY W + g A, g = dY B, dA = g^T x, dB = dY^T h: reads dY, W, x, h, A, B; writes dX, dA, dB
    moved = (m * n + n * k + 2 * m * k + m * r) * wide + 2 * adapters
    return forward + ceilings.floor_us(base_flops + 2.0 * low_flops, moved)


def build_checked(
    provider: Provider,
    case: Case,
    operands: Operands,
    truth: Truth,
    yardstick: Mapping[str, float] | None,
) -> tuple[Built, dict[str, float]]:
    """Build ``provider`` and hold it to the truth; with dropout, exactly at p = 0, then by its statistics.

    ``yardstick`` holds plain torch's own errors; None measures without judging (plain torch itself).

    Returns:
        What to time, and its relative errors against fp64 at p = 0.

    Raises:
        WrongResult: it computes something else. Whatever else the provider raises passes through.
    """
    exact = case.without_dropout()
    built = provider.build(exact, operands)
    errors = truth.errors(_outputs(provider, built, exact), with_adapter=provider.adapter)
    if yardstick is not None:
        check_exact(errors, yardstick, case.dtype)
    if case.dropout and provider.adapter:
        built = provider.build(case, operands)
        with _fixed_rng(operands.x.device):
            check_dropout(_outputs(provider, built, case), truth, case)
    return built, errors


def _outputs(provider: Provider, built: Built, case: Case) -> tuple[Tensor, ...]:
    with provider.context(case):
        return built.forward_backward() if case.train else (built.forward(),)


@contextmanager
def _fixed_rng(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def _call(built: Built, direction: str) -> Callable[[], object]:
    return built.forward if direction == "fwd" else built.forward_backward


class LinearBench:
    """The linear benchmark on one device.

    Args:
        device: where to run.
        providers: contenders by name; the base is added where it is missing.
        rule: the timing rule.
        loop_rows: cases of at most this many rows also run the host loop; None: ``LOOP_ROWS`` on a GPU, none on a
            CPU, whose clock already counts the host.
        progress: is told what goes on, one line at a time.
    """

    def __init__(
        self,
        device: torch.device,
        providers: Mapping[str, Provider],
        rule: Rule,
        loop_rows: int | None = None,
        progress: Progress = print,
    ) -> None:
        known = all_providers()
        self.providers = {BASE: known[BASE], **providers}
        self.yardstick = known[YARDSTICK]
        self.device, self.rule, self.progress = device, rule, progress
        self.loop_rows = (
            (LOOP_ROWS if device.type == "cuda" else 0) if loop_rows is None else loop_rows
        )
        self.clock = DeviceClock(device)
        self.report = Report(
            environment(device),
            rule,
            self.clock.flush_bytes,
            {name: provider.about for name, provider in self.providers.items()},
        )

    def run(
        self,
        cases: Sequence[Case],
        budget_s: float | None = None,
        save: Callable[[Report], object] = lambda report: None,
    ) -> Report:
        """Run ``cases`` in order; ``save`` is called after each.

        Once the time left of ``budget_s`` is shorter than the slower of the last two cases, the remaining ones are
        listed in ``report.left_out``.
        """
        started = time.monotonic()
        durations: list[float] = []
        done: list[Case] = []
        broken: str | None = None
        for index, case in enumerate(cases, 1):
            began = time.monotonic()
            if broken:
                self.report.left_out[case.name] = f"the device had failed: {broken}"
                continue
            expected_end = began - started + max(durations[-2:], default=0.0)
            if budget_s is not None and expected_end > budget_s:
                self.report.left_out[case.name] = f"the time budget of {budget_s:.0f} s was used up"
                continue
            self.progress(f"[{index}/{len(cases)}] {case.name}  ({began - started:.0f} s)")
            try:
                self.run_case(case)
            except Exception as error:  # the case itself: no memory for its operands, say
                self.report.left_out[case.name] = describe(error)
                self.progress(f"    failed: {describe(error)}")
            else:
                done.append(case)
            broken = self._release()
            durations.append(time.monotonic() - began)
            self._save(started, save)
        if self.device.type == "cuda" and not broken:
            # Last of all: once the profiler has been on, launches stay slower in this process.
            self.progress("profiling fastlora's kernels")
            try:
                for case in done:
                    self._profile(case)
                    self._release()
            except RuntimeError as error:  # no CUPTI, or no right to use it
                self.report.left_out["kernel names"] = describe(error)
        self._save(started, save)
        return self.report

    def _save(self, started: float, save: Callable[[Report], object]) -> None:
        self.report.seconds = round(time.monotonic() - started, 1)
        save(self.report)

    def _release(self) -> str | None:
        """Free what the case held; returns the error of a device that no longer answers (an illegal access, say)."""
        gc.collect()
        if self.device.type == "cuda":
            try:
                synchronize(self.device)
                torch.cuda.empty_cache()
            except RuntimeError as error:
                return describe(error)
        return None

    def run_case(self, case: Case) -> None:
        """Draw operands, build and check every provider, time both passes; the rows go into ``report``."""
        if case.dtype not in self.report.ceilings:
            ceilings = measure_ceilings(self.device, DTYPES[case.dtype], self.clock, self.rule)
            self.report.ceilings[case.dtype] = ceilings
        self.report.cases[case.name] = case
        operands = Operands.draw(case, self.device)
        built, errors, failures = self._build_all(case, operands)
        for direction in case.passes:
            rows = self._time(case, direction, built)
            for name, (status, reason) in failures.items():
                rows[name] = Row(case.name, direction, name, status, reason)
            for name, row in rows.items():
                row.errors = errors.get(name, {})
                if name in built:
                    self.progress(f"    {direction:8} {name:20} {_summary(row)}")
            self.report.rows += (rows[name] for name in self.providers)

    def _build_all(
        self, case: Case, operands: Operands
    ) -> tuple[dict[str, Built], dict[str, dict[str, float]], dict[str, tuple[str, str]]]:
        """Every provider built and checked: (what to time, its errors, (status, reason) of what failed), by name."""
        truth = Truth.of(operands, case.train)
        _, yardstick = build_checked(self.yardstick, case.without_dropout(), operands, truth, None)
        built: dict[str, Built] = {}
        errors: dict[str, dict[str, float]] = {}
        failures: dict[str, tuple[str, str]] = {}
        for name, provider in self.providers.items():
            if reason := provider.refuses(case, self.device):
                failures[name] = ("unsupported", reason)
                continue
            try:
                checked = build_checked(provider, case, operands, truth, yardstick)
                built[name], errors[name] = checked
            except Exception as error:  # missing library, no memory, wrong result: each is a row
                failures[name] = ("error", describe(error))
        for name, (status, reason) in failures.items():
            self.progress(f"    {name}: {status}: {reason}")
        return built, errors, failures

    def _time(self, case: Case, direction: str, built: Mapping[str, Built]) -> dict[str, Row]:
        rows = {name: Row(case.name, direction, name) for name in built}
        if BASE not in built:
            for row in rows.values():
                row.status, row.reason = "error", "not timed: the base failed"
            return rows
        contenders = {
            name: Contender(_call(it, direction), partial(self.providers[name].context, case))
            for name, it in built.items()
        }
        floor = floor_us(case, direction, self.report.ceilings[case.dtype])
        for name, timing in measure(contenders, BASE, self.clock, self.rule).items():
            row = rows[name]
            row.times_us = [round(time_us, 2) for time_us in timing.times_us]
            row.median_us, row.ratio = timing.median_us, timing.ratio
            if row.median_us is not None and self.providers[name].adapter:
                row.roofline_percent = 100.0 * floor / row.median_us
            if timing.error:
                row.status, row.reason = "error", timing.error
        if case.m <= self.loop_rows:
            loop = partial(host_loop, device=self.device)
            for name, timing in measure(contenders, BASE, loop, self.rule).items():
                rows[name].loop_us, rows[name].loop_ratio = timing.median_us, timing.ratio
                if timing.error:
                    rows[name].status, rows[name].reason = "error", timing.error
        for name, row in rows.items():
            if self.providers[name].ours and row.status == "ok":
                row.launches = _launches(contenders[name])
        return rows

    def _profile(self, case: Case) -> None:
        """Record the kernels behind fastlora's rows of ``case``."""
        rows = [row for row in self.report.rows if row.case == case.name and row.status == "ok"]
        operands = Operands.draw(case, self.device)
        for row in rows:
            provider = self.providers[row.provider]
            if provider.ours:
                built = provider.build(case, operands)
                with provider.context(case):
                    row.kernels = kernels(_call(built, row.direction), self.device)


def _summary(row: Row) -> str:
    if row.median_us is None:
        return f"{row.status}: {row.reason}"
    loop = f"   host loop {row.loop_us:.1f} us  {row.loop_ratio}" if row.loop_us is not None else ""
    return f"{row.median_us:10.1f} us  {row.ratio}{loop}"


def _launches(contender: Contender) -> dict[str, int]:
    """fastlora's own launch counters of one call: {"gemm/triton": 1, ...}."""
    from .. import launches, reset_launches

    reset_launches()
    with contender.around():
        contender.run()
    return {f"{op}/{backend}": count for (op, backend), count in sorted(launches().items())}


def kernels(call: Callable[[], object], device: torch.device) -> list[dict[str, Any]]:
    """The device kernels of one ``call`` as the profiler names them: [{"name", "count", "us"}], longest first."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    call()  # whatever compiles or loads on first use is not what is asked for
    synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        call()
        synchronize(device)
    found: dict[str, dict[str, Any]] = {}
    for event in profile.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            entry = found.setdefault(event.name, {"name": event.name, "count": 0, "us": 0.0})
            entry["count"] += 1
            entry["us"] = round(entry["us"] + event.time_range.elapsed_us(), 2)
    return sorted(found.values(), key=lambda entry: -entry["us"])
