"""The learning rate along a run, and when a run ends."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlora.training.schedule import WARMUP_START, Horizon, lr_factor

UNIT = st.floats(0.0, 1.0)


@given(progress=UNIT, warmup=UNIT, schedule=st.sampled_from(["cosine", "constant"]))
def test_factor_stays_between_zero_and_one(progress: float, warmup: float, schedule: str) -> None:
    assert 0.0 <= lr_factor(progress, warmup, schedule) <= 1.0


@given(a=UNIT, b=UNIT, warmup=st.floats(0.01, 0.9))
def test_rises_through_the_warmup_and_falls_after(a: float, b: float, warmup: float) -> None:
    low, high = sorted((a, b))
    if high < warmup:
        assert lr_factor(low, warmup) <= lr_factor(high, warmup)
    elif low >= warmup:
        assert lr_factor(low, warmup) >= lr_factor(high, warmup)


def test_values_of_the_cosine() -> None:
    assert lr_factor(0.0, 0.1) == pytest.approx(WARMUP_START)
    assert lr_factor(0.05, 0.1) == pytest.approx(0.55)
    assert lr_factor(0.1, 0.1) == pytest.approx(1.0)
    assert lr_factor(0.55, 0.1) == pytest.approx(0.5)
    assert lr_factor(0.325, 0.1) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert lr_factor(1.0, 0.1) == pytest.approx(0.0)
    assert lr_factor(0.9, 0.1, "constant") == 1.0


@given(step=st.integers(0, 10_000), total=st.integers(1, 10_000), seconds=st.floats(0, 1e6))
def test_progress_by_steps_ignores_the_clock(step: int, total: int, seconds: float) -> None:
    horizon = Horizon(total)
    assert horizon.progress(step, seconds) == min(1.0, (step + 0.5) / total)
    assert horizon.finished(step, seconds, 1.0) == (step >= total)


@given(elapsed=st.lists(st.floats(0, 200), min_size=2, max_size=20).map(sorted))
def test_progress_by_time_never_goes_back(elapsed: list[float]) -> None:
    horizon = Horizon(1000, max_seconds=100.0)
    progress = [horizon.progress(step, seconds) for step, seconds in enumerate(elapsed)]
    assert progress == sorted(progress)
    assert progress[-1] <= 1.0


def test_time_limit_stops_before_the_step_that_would_exceed_it_but_never_before_the_first() -> None:
    horizon = Horizon(1000, max_seconds=10.0)
    assert not horizon.finished(0, 0.0, 99.0)
    assert not horizon.finished(4, 8.0, 2.0)
    assert horizon.finished(4, 8.0, 2.1)
