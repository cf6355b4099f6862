"""Every contender computes the formula, and one that does not is caught before it is timed."""

import dataclasses
import shutil

import pytest
import torch

from fastlora.testing import providers as contenders
from fastlora.testing.linear_bench import build_checked
from fastlora.testing.linear_check import OUTPUTS, Truth, WrongResult
from fastlora.testing.providers import BASE, YARDSTICK, Case, Operands, Provider, all_providers

CPU = torch.device("cpu")
PROVIDERS = all_providers()
COMPILED = "peft-16bit-compile"
CASES = [
    Case(48, 96, 80, 8, dtype="float32"),
    Case(48, 96, 80, 8, dtype="float32", bias=True),
    Case(48, 96, 80, 4),
    Case(48, 96, 80, 4, adapter_dtype="float32", bias=True),
    Case(48, 96, 80, 4, dtype="float16"),
    Case(192, 256, 160, 16, dtype="float32", dropout=0.3),
    Case(192, 256, 160, 16, dropout=0.3),
    Case(1, 96, 80, 8, train=False),
]


def check(provider, case, seed=0):
    operands = Operands.draw(case, CPU, seed)
    truth = Truth.of(operands, case.train)
    _, yardstick = build_checked(
        PROVIDERS[YARDSTICK], case.without_dropout(), operands, truth, None
    )
    return build_checked(provider, case, operands, truth, yardstick)


PAIRS = [
    (name, case)
    for name, provider in PROVIDERS.items()
    for case in CASES
    if name != COMPILED and (provider.ours or not provider.refuses(case, CPU))
]


@pytest.mark.parametrize(("name", "case"), PAIRS, ids=lambda it: getattr(it, "name", it))
def test_provider_computes_the_formula(name, case):
    provider = PROVIDERS[name]
    if reason := provider.refuses(case, CPU):
        pytest.skip(reason)  # a backend this machine cannot run
    built, errors = check(provider, case)
    expected = OUTPUTS[: 4 if provider.adapter else 2] if case.train else OUTPUTS[:1]
    assert tuple(errors) == expected
    assert all(0.0 <= error < 0.02 for error in errors.values())
    y = built.forward()
    assert y.shape == (case.m, case.n)
    assert y.dtype == contenders.DTYPES[case.dtype]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
def test_the_compiled_provider_computes_the_formula():
    _, errors = check(PROVIDERS[COMPILED], CASES[2])
    assert tuple(errors) == OUTPUTS


def test_peers_refuse_what_they_do_not_stand_for():
    plain, fp32, dropout = CASES[2], CASES[0], CASES[6]
    assert "fp32" in PROVIDERS["peft-16bit"].refuses(fp32, CPU)
    assert "dropout" in PROVIDERS["mm-addmm"].refuses(dropout, CPU)
    for name in ("peft-default", "peft-16bit", "mm-addmm", "fastlora-torch"):
        assert PROVIDERS[name].refuses(plain, CPU) is None


def test_gradients_come_in_the_dtype_of_what_they_belong_to():
    case = CASES[3]
    for name in (YARDSTICK, "mm-addmm", "peft-default", "fastlora-torch"):
        operands = Operands.draw(case, CPU)
        dtypes = [out.dtype for out in PROVIDERS[name].build(case, operands).forward_backward()]
        assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32], name


def test_forward_backward_accumulates_nothing():
    case = CASES[0]
    built = PROVIDERS[YARDSTICK].build(case, Operands.draw(case, CPU))
    first, second = built.forward_backward(), built.forward_backward()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(leaf.grad is None for leaf in built.leaves)


def test_generation_records_nothing_for_backward():
    case = CASES[-1]
    provider = PROVIDERS["torch-eager"]
    built = provider.build(case, Operands.draw(case, CPU))
    with provider.context(case):
        assert not built.forward().requires_grad


def test_the_low_rank_term_is_as_large_as_the_frozen_one():
    truth = Truth.of(Operands.draw(CASES[0], CPU), train=True)
    for frozen, low in zip(truth.frozen[:2], truth.low_rank[:2], strict=True):
        assert 0.5 < (low.norm() / frozen.norm()).item() < 2.0


# ---- wrong contenders ----------------------------------------------------------------------------------------


def broken(edit):
    """A provider whose outputs went through ``edit(name, output, case, operands)``."""

    def build(case, operands):
        inner = PROVIDERS[YARDSTICK].build(case, operands)

        class Edited:
            def forward(self):
                return edit("y", inner.forward(), case, operands)

            def forward_backward(self):
                outputs = zip(OUTPUTS, inner.forward_backward(), strict=True)
                return tuple(edit(name, out, case, operands) for name, out in outputs)

        return Edited()

    return Provider("broken", "wrong on purpose", build)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("fault", ["sign", "scale", "nan"])
def test_a_wrong_output_is_caught(output, fault):
    def edit(name, out, case, operands):
        if name != output:
            return out
        if fault == "nan":
            out = out.clone()
            out.view(-1)[3] = float("nan")
            return out
        return out * {"sign": -1.0, "scale": 1.05}[fault]

    with pytest.raises(WrongResult, match=f"^{output} is off"):
        check(broken(edit), CASES[2])


def test_a_forgotten_adapter_is_caught():
    forgetful = dataclasses.replace(PROVIDERS[BASE], adapter=True)
    with pytest.raises(WrongResult, match="y is off"):
        check(forgetful, CASES[0])


DROPOUT = Case(512, 512, 512, 16, dtype="float32", dropout=0.1)


def eager_with(dropout):
    def build(case, operands):
        o = operands
        a, b = contenders._adapters(o)
        return contenders.Trainable(
            lambda x: x @ o.weight.t() + dropout(x, case.dropout) @ a.t() @ b.t() * o.scaling,
            case,
            o,
            (a, b),
        )

    return Provider("broken", "wrong on purpose", build)


WRONG_DROPOUT = {
    "none": lambda x, p: x,
    "not rescaled": lambda x, p: x * (torch.rand_like(x) >= p),
    "rescaled twice": lambda x, p: torch.nn.functional.dropout(x, p) / (1.0 - p),
    "p for 1-p": lambda x, p: torch.nn.functional.dropout(x, 1.0 - p),
    "applied twice": lambda x, p: torch.nn.functional.dropout(torch.nn.functional.dropout(x, p), p),
    "not in backward": lambda x, p: x + (torch.nn.functional.dropout(x, p) - x).detach(),
}


@pytest.mark.parametrize("fault", WRONG_DROPOUT)
def test_wrong_dropout_is_caught(fault):
    right = eager_with(torch.nn.functional.dropout)
    check(right, DROPOUT)
    exact_at_zero = eager_with(lambda x, p: WRONG_DROPOUT[fault](x, p) if p else x)
    with pytest.raises(WrongResult, match=r"under dropout 0\.1"):
        check(exact_at_zero, DROPOUT)


# ---- cases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m": 0}, "m: got 0"),
        ({"r": 0}, "r: got 0"),
        ({"dtype": "int8"}, "dtype: got 'int8'; accepted are bfloat16"),
        ({"adapter_dtype": "half"}, "dtype: got 'half'"),
        ({"dropout": 1.0}, "dropout: got 1.0"),
        ({"dropout": 0.1, "train": False}, "generation has no dropout"),
    ],
)
def test_bad_cases_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CASES[0], **change)


def test_published_cases_have_names_of_their_own_and_hold_the_bars():
    from benchmarks.cases import LINEAR, LINEAR_CPU, LINEAR_QUICK

    for cases in (LINEAR, LINEAR_CPU, LINEAR_QUICK):
        assert len({case.name for case in cases}) == len(cases)
    assert set(LINEAR_QUICK) <= set(LINEAR)
    names = {case.name for case in LINEAR}
    for shape in (
        "8192x4096x4096",
        "8192x4096x14336",
        "8192x14336x4096",
    ):  # the shapes the issue sets bars for
        assert {f"{shape}-r16", f"{shape}-r16-p0.05", f"{shape}-r64"} <= names
