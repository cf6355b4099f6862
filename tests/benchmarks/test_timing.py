"""The timing rule on synthetic clocks, where the right answer is known."""

import gc
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from fastlora.testing.timing import (
    Ceilings,
    Contender,
    DeviceClock,
    Rule,
    host_loop,
    l2_bytes,
    measure,
    measure_ceilings,
    median_interval,
    orders,
)

CPU = torch.device("cpu")
RULE = Rule(rounds=15, warmup=1, resamples=500)


class FakeClock:
    """Reads each call's duration off a script instead of a clock: contender name -> one time per call."""

    def __init__(self, scripts, warmup=1):
        self.left = {name: [0.0] * warmup + list(times) for name, times in scripts.items()}
        self.calls = []

    def __call__(self, run):
        name = run()
        self.calls.append(name)
        return self.left[name].pop(0)


def run_scripts(scripts, rule=RULE):
    clock = FakeClock(scripts, rule.warmup)
    contenders = {name: Contender(lambda name=name: name) for name in scripts}
    return measure(contenders, next(iter(scripts)), clock, rule), clock


def test_every_round_is_a_fresh_permutation_from_a_fixed_seed():
    drawn = orders(5, 40, seed=3)
    assert all(sorted(order) == list(range(5)) for order in drawn)
    assert drawn == orders(5, 40, seed=3)
    assert drawn != orders(5, 40, seed=4)
    for place in range(5):  # nobody owns a place
        assert {order[place] for order in drawn} == set(range(5))


def test_rounds_interleave_the_contenders():
    _, clock = run_scripts({name: [1.0] * 15 for name in "abcd"})
    rounds = [clock.calls[4 + 4 * i : 8 + 4 * i] for i in range(15)]
    assert clock.calls[:4] == list("abcd")  # warm-up
    assert all(sorted(calls) == list("abcd") for calls in rounds)
    assert len({tuple(calls) for calls in rounds}) > 5


def test_drift_that_hits_all_contenders_leaves_the_ratio_alone():
    drift = np.linspace(1.0, 3.0, 15)
    timings, _ = run_scripts({"base": 100.0 * drift, "lora": 103.0 * drift})
    ratio = timings["lora"].ratio
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.03, 1.03, 1.03))
    assert timings["lora"].median_us == pytest.approx(206.0)
    assert timings["base"].ratio.median == 1.0


def test_ratio_is_the_median_of_ratios_not_the_ratio_of_medians():
    base = np.array([1.0] * 8 + [10.0] * 7)
    lora = np.array([2.0] * 8 + [10.0] * 7)[::1]
    lora[:3], base[:3] = 20.0, 10.0
    timings, _ = run_scripts({"base": base, "lora": lora})
    assert timings["lora"].ratio.median == pytest.approx(np.median(lora / base)) == 2.0
    assert np.median(lora) / np.median(base) == 1.0  # what the wrong statistic would say


def test_interval_covers_the_true_median_about_as_often_as_it_says():
    generator = np.random.default_rng(11)
    covered = 0
    for _ in range(400):
        interval = median_interval(generator.lognormal(0.0, 0.05, 25).tolist(), RULE)
        covered += interval.low <= 1.0 <= interval.high
    assert 0.90 <= covered / 400 <= 0.99


def test_interval_narrows_with_rounds_and_repeats():
    generator = np.random.default_rng(5)
    few = generator.normal(1.0, 0.1, 15).tolist()
    many = generator.normal(1.0, 0.1, 400).tolist()
    narrow, wide = median_interval(many, RULE), median_interval(few, RULE)
    assert narrow.high - narrow.low < 0.5 * (wide.high - wide.low)
    assert wide == median_interval(few, RULE)
    assert wide.low < wide.median < wide.high


def test_too_few_rounds_are_refused():
    with pytest.raises(ValueError, match="got 14; the timing rule asks for at least 15"):
        Rule(rounds=14)


@pytest.mark.parametrize("fails_at", [0, 7], ids=["in warm-up", "in a round"])
def test_a_failing_contender_is_reported_and_the_others_go_on(fails_at):
    calls = []

    def fail():
        calls.append(1)
        if len(calls) > fails_at:
            raise RuntimeError("no memory\nfor this")
        return "broken"

    contenders = {name: Contender(lambda name=name: name) for name in ("base", "fine")}
    contenders["broken"] = Contender(fail)
    scripts = {name: [2.0] * 15 for name in contenders}
    timings = measure(contenders, "base", FakeClock(scripts), RULE)
    assert list(timings) == ["base", "fine", "broken"]
    assert timings["broken"].error == "RuntimeError: no memory for this"
    assert timings["broken"].times_us == []
    assert timings["broken"].ratio is None
    assert timings["broken"].median_us is None
    assert timings["fine"].ratio.median == 1.0
    assert len(timings["fine"].times_us) == 15
    assert len(calls) == fails_at + 1  # it is not called again


def test_a_failing_base_leaves_times_without_ratios():
    def fail():
        raise MemoryError("out")

    timings = measure(
        {"base": Contender(fail), "fine": Contender(lambda: "fine")},
        "base",
        FakeClock({"fine": [2.0] * 15}),
        RULE,
    )
    assert timings["base"].error == "MemoryError: out"
    assert timings["fine"].median_us == 2.0
    assert timings["fine"].ratio is None


def test_an_unknown_base_is_refused():
    with pytest.raises(ValueError, match="base: got 'x'"):
        measure({"a": Contender(int)}, "x", FakeClock({}), RULE)


def test_the_context_is_entered_outside_the_timed_region():
    log = []

    @contextmanager
    def around():
        log.append("enter")
        yield
        log.append("leave")

    def clock(run):
        log.append("start")
        run()
        log.append("stop")
        return 1.0

    measure({"base": Contender(lambda: log.append("run"), around)}, "base", clock, RULE)
    assert log == ["enter", "start", "run", "stop", "leave"] * 16


def test_collection_is_off_while_timing_and_back_on_after():
    seen = []
    measure({"base": Contender(lambda: seen.append(gc.isenabled()))}, "base", host_clock, RULE)
    assert not any(seen)
    assert gc.isenabled()


def host_clock(run):
    run()
    return 1.0


def test_the_clock_times_the_call_and_not_the_flush():
    clock = DeviceClock(CPU, flush_bytes=2**20)
    clock._buffer.fill_(1)
    flushed = []
    elapsed = clock(lambda: (flushed.append(not clock._buffer.any().item()), time.sleep(0.02)))
    assert flushed == [True]
    assert 20_000 <= elapsed < 200_000


@pytest.mark.gpu
def test_what_a_clean_flush_leaves_costs_nothing_to_write_back():
    """A call that reads as much as the L2 holds: after a flush that wrote, it evicts what was written."""
    device = torch.device("cuda")
    data = torch.ones(l2_bytes(device) // 4, device=device)
    dirty, clean = (DeviceClock(device, clean=clean) for clean in (False, True))
    times = {clock: [clock(data.sum) for _ in range(30)][10:] for clock in (dirty, clean)}
    assert np.median(times[clean]) < 0.95 * np.median(times[dirty])


def test_host_loop_is_the_time_per_call():
    calls = []
    per_call = host_loop(lambda: (calls.append(1), time.sleep(0.001)), CPU, n=20)
    assert len(calls) == 20
    assert 1_000 <= per_call < 10_000


def test_the_floor_is_the_larger_of_both_terms():
    ceilings = Ceilings(copy_bytes_per_s=2e12, gemm_flops_per_s=1e15)
    assert ceilings.floor_us(flops=1e12, moved_bytes=1e9) == pytest.approx(1000.0)
    assert ceilings.floor_us(flops=1e11, moved_bytes=1e9) == pytest.approx(500.0)


def test_ceilings_of_this_cpu_are_plausible():
    ceilings = measure_ceilings(CPU, torch.float32, DeviceClock(CPU, 2**20), RULE)
    assert 1e8 < ceilings.copy_bytes_per_s < 1e13
    assert 1e8 < ceilings.gemm_flops_per_s < 1e14


@pytest.mark.gpu
def test_device_clock_waits_for_the_device():
    device = torch.device("cuda")
    clock = DeviceClock(device)
    small, large = (torch.randn(n, n, device=device) for n in (64, 4096))
    times = {
        n: [clock(lambda t=t: t @ t) for _ in range(8)][3:] for n, t in ((64, small), (4096, large))
    }
    assert np.median(times[4096]) > 20 * np.median(times[64])
