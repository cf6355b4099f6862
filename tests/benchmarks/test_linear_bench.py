"""A whole run on small shapes: what it reports, what it writes, and what it says about contenders that fail."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import bench_linear
from benchmarks.cases import LINEAR_CPU
from fastlora.cli.bench import bench_app
from fastlora.testing import environment
from fastlora.testing.bench_report import markdown, save_all, save_json
from fastlora.testing.linear_bench import LinearBench, floor_us
from fastlora.testing.providers import BASE, Case, Provider, all_providers
from fastlora.testing.timing import Ceilings, Rule

CPU = torch.device("cpu")
RULE = Rule(rounds=15, warmup=1, resamples=200)
SMALL = Case(16, 64, 48, 4, dtype="float32")
SMALL_BF16 = Case(8, 64, 48, 4, train=False)
PLAIN = Case(16, 64, 48, 4)


def explode(case, operands):
    raise ModuleNotFoundError("No module named 'rival'")


def wrong(case, operands):
    built = all_providers()["torch-eager"].build(case, operands)
    call = built.call
    built.call = lambda x: 1.1 * call(x)
    return built


def bench(names, extra=(), **options):
    known = all_providers()
    providers = {name: known[name] for name in names} | {each.name: each for each in extra}
    lines = []
    return LinearBench(CPU, providers, RULE, progress=lines.append, **options), lines


@pytest.fixture(scope="module")
def report():
    """A run with good, missing, wrong and refusing contenders."""
    extra = [
        Provider("rival", "a library that is not here", explode),
        Provider("liar", "fast and wrong", wrong),
        Provider("choosy", "takes no bf16", explode, lambda case, device: "no bf16 here"),
    ]
    it, _ = bench(["torch-eager", "mm-addmm", "fastlora-torch"], extra)
    return it.run([SMALL, SMALL_BF16])


def rows_of(report, provider):
    return [row for row in report.rows if row.provider == provider]


def test_every_provider_has_a_row_for_every_pass(report):
    expected = {(SMALL.name, "fwd"), (SMALL.name, "fwd+bwd"), (SMALL_BF16.name, "fwd")}
    for provider in (BASE, "torch-eager", "mm-addmm", "fastlora-torch", "rival", "liar", "choosy"):
        assert {(row.case, row.direction) for row in rows_of(report, provider)} == expected
    assert len(report.rows) == 7 * 3


def test_good_contenders_are_timed(report):
    for provider in ("torch-eager", "mm-addmm", "fastlora-torch"):
        for row in rows_of(report, provider):
            assert row.status == "ok", row.reason
            assert len(row.times_us) == RULE.rounds
            assert row.ratio.low <= row.ratio.median <= row.ratio.high
            assert row.median_us > 0
            assert row.roofline_percent > 0
            assert set(row.errors) == ({"y", "dx", "da", "db"} if row.case == SMALL.name else {"y"})


def test_failing_contenders_are_reported(report):
    expected = {
        "rival": ("error", "No module named 'rival'"),
        "liar": ("error", "WrongResult: y is off"),
        "choosy": ("unsupported", "no bf16 here"),
    }
    for provider, (status, reason) in expected.items():
        for row in rows_of(report, provider):
            assert row.status == status
            assert reason in row.reason
            assert row.times_us == []
            assert row.ratio is None
    text = markdown(report)
    assert "- `rival`, all cases: error: ModuleNotFoundError" in text
    assert "- `choosy`, all cases: unsupported: no bf16 here" in text


def test_fastlora_rows_show_what_ran(report):
    forward, both = (
        row.launches for row in rows_of(report, "fastlora-torch") if row.case == SMALL.name
    )
    assert forward == {"down/torch": 1, "gemm/torch": 1}
    assert both["gemm/torch"] == 2
    assert all(name.endswith("/torch") for name in both)


def test_a_broken_base_is_said_and_nothing_is_compared():
    base = Provider(BASE, "broken", explode)
    it, _ = bench(["torch-eager"], [base])
    report = it.run([SMALL])
    assert all(row.status == "error" and row.ratio is None for row in report.rows)
    assert {row.reason for row in rows_of(report, "torch-eager")} == {"not timed: the base failed"}


def test_the_budget_leaves_cases_out_by_name():
    it, lines = bench(["torch-eager"])
    saved = []
    report = it.run(
        [SMALL, PLAIN, SMALL_BF16],
        budget_s=0.05,
        save=lambda report: saved.append(len(report.rows)),
    )
    assert {row.case for row in report.rows} == {SMALL.name}
    assert set(report.left_out) == {PLAIN.name, SMALL_BF16.name}
    assert "time budget of 0 s" in report.left_out[PLAIN.name]
    assert f"- {PLAIN.name}: left out: the time budget" in markdown(report)
    assert saved[0] == 4  # after the first case already
    assert any(SMALL.name in line for line in lines)


def test_a_case_that_cannot_be_set_up_is_left_out_with_its_reason(monkeypatch):
    it, _ = bench(["torch-eager"])
    real = it.run_case

    def run_case(case):
        if case == SMALL:
            raise torch.OutOfMemoryError("tried to allocate")
        real(case)

    monkeypatch.setattr(it, "run_case", run_case)
    report = it.run([SMALL, SMALL_BF16])
    assert report.left_out == {SMALL.name: "OutOfMemoryError: tried to allocate"}
    assert {row.case for row in report.rows} == {SMALL_BF16.name}


def test_a_device_that_died_ends_the_run_and_keeps_its_rows(monkeypatch):
    it, _ = bench(["torch-eager"])
    monkeypatch.setattr(it, "_release", lambda: "AcceleratorError: illegal access")
    saved = []
    report = it.run([SMALL, SMALL_BF16], save=saved.append)
    assert {row.case for row in report.rows} == {SMALL.name}
    assert report.left_out == {
        SMALL_BF16.name: "the device had failed: AcceleratorError: illegal access"
    }
    assert saved


def test_small_cases_run_the_host_loop():
    it, _ = bench(["torch-eager"], loop_rows=8)
    report = it.run([SMALL, SMALL_BF16])
    for row in report.rows:
        assert (row.loop_us is not None) == (row.case == SMALL_BF16.name)
    assert "host loop (100 calls" in markdown(report)


def test_the_floor_counts_every_operand_once():
    case = Case(8192, 4096, 14336, 16)
    m, k, n, r = 8192, 4096, 14336, 16
    compute_bound = Ceilings(copy_bytes_per_s=1e30, gemm_flops_per_s=1e12)
    assert floor_us(case, "fwd", compute_bound) == pytest.approx(
        2 * m * (k * n + r * k + r * n) / 1e6
    )
    assert floor_us(case, "fwd+bwd", compute_bound) == pytest.approx(
        m * (4 * k * n + 6 * r * (k + n)) / 1e6
    )
    memory_bound = Ceilings(copy_bytes_per_s=1e12, gemm_flops_per_s=1e30)
    forward = 2 * (m * k + n * k + m * n + r * (k + n)) / 1e6
    assert floor_us(case, "fwd", memory_bound) == pytest.approx(forward)
    backward = 2 * (m * n + n * k + m * k + m * k + m * r + 2 * r * (k + n)) / 1e6
    assert floor_us(case, "fwd+bwd", memory_bound) == pytest.approx(forward + backward)


# ---- files ---------------------------------------------------------------------------------------------------


def test_json_holds_the_whole_run(report, tmp_path):
    path = save_json(report, tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]  # no partial file stays
    found = json.loads(path.read_text())
    assert set(found) == {
        "schema", "benchmark", "environment", "rule", "flush_bytes", "providers", "cases", "ceilings", "rows",
        "left_out", "seconds",
    }  # fmt: skip
    assert (found["schema"], found["benchmark"]) == (1, "linear")
    assert {"device", "date", "commit", "python", "torch", "triton", "peft", "fastlora"} <= set(
        found["environment"]
    )
    assert found["rule"] == {
        "rounds": 15,
        "warmup": 1,
        "seed": 0,
        "resamples": 200,
        "confidence": 0.95,
    }
    assert found["cases"][SMALL.name]["k"] == 64
    assert set(found["ceilings"]) == {"float32", "bfloat16"}
    for row in found["rows"]:
        assert set(row) == {
            "case", "direction", "provider", "status", "reason", "median_us", "ratio", "loop_us", "loop_ratio",
            "roofline_percent", "errors", "launches", "kernels", "times_us",
        }  # fmt: skip
        assert row["status"] in ("ok", "error", "unsupported")
        assert (row["status"] == "ok") == (row["ratio"] is not None) == (row["reason"] is None)


def test_markdown_and_chart(report, tmp_path):
    paths = {path.suffix: path for path in save_all(report, tmp_path)}
    assert set(paths) == {".json", ".md", ".png"}
    assert paths[".png"].read_bytes().startswith(b"\x89PNG")
    text = paths[".md"].read_text()
    row = next(row for row in rows_of(report, "mm-addmm") if row.direction == "fwd+bwd")
    assert str(row.ratio) in text
    assert re.search(r"\*\*CPU figures", text)
    assert "down/torch x1" in text
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) >= 4
    for table in tables:
        assert len({len(line.strip("|").split("|")) for line in table.splitlines()}) == 1


def test_commit_is_told_or_looked_up(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTLORA_COMMIT", "abc123")
    assert environment.commit() == "abc123"
    monkeypatch.delenv("FASTLORA_COMMIT")
    monkeypatch.setattr(
        environment, "__file__", str(tmp_path / "site" / "fastlora" / "testing" / "environment.py")
    )
    assert environment.commit() == "unknown"


# ---- commands ------------------------------------------------------------------------------------------------


def test_script_runs_the_chosen_cases(tmp_path, capsys):
    name = LINEAR_CPU[-1].name
    code = bench_linear.main(
        ["--cases", f"^{name}$", "--providers", "eager|fastlora-torch", "--rounds", "15",
         "--out", str(tmp_path), "--device", "cpu"]
    )  # fmt: skip
    assert code == 0
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert {row["case"] for row in found["rows"]} == {name}
    assert {row["provider"] for row in found["rows"]} == {BASE, "torch-eager", "fastlora-torch"}
    assert "the figures are this CPU's" in capsys.readouterr().out


def test_script_says_what_there_is_when_nothing_matches(capsys):
    with pytest.raises(SystemExit) as stop:
        bench_linear.main(["--device", "cpu", "--providers", "nosuch"])
    assert stop.value.code == 2
    assert "torch-eager" in capsys.readouterr().err


def invoke(*arguments):
    return CliRunner().invoke(bench_app, ["linear", *arguments])


def test_cli_times_a_users_shape(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke(
        "--shape",
        "8x64x48",
        "--rank",
        "4",
        "--backend",
        "torch",
        "--rounds",
        "15",
        "--output",
        str(tmp_path),
    )
    assert result.exit_code == 0, result.output
    assert "these are figures of this CPU" in result.output
    assert "8x64x48-r4-float32" in result.output
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    ours = [row["provider"] for row in found["rows"] if row["provider"].startswith("fastlora")]
    assert set(ours) == {"fastlora-torch"}


def test_cli_fails_when_no_backend_of_ours_can_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke("--shape", "8x64x48", "--rank", "4", "--backend", "cuda", "--rounds", "15")
    assert result.exit_code == 1
    assert "fastlora-cuda" in result.output


@pytest.mark.parametrize("shape", ["8x64", "8x64x48x2", "0x64x48", "8xax4", "-8x4x4", ""])
def test_cli_explains_a_bad_shape(shape):
    result = invoke("--shape", shape)
    assert result.exit_code == 2
    assert "MxKxN" in result.output


def test_cli_refuses_fewer_rounds_than_the_rule():
    assert invoke("--rounds", "14").exit_code == 2


@pytest.mark.gpu
def test_kernels_of_fastlora_rows_are_named():
    known = all_providers()
    providers = {"fastlora-triton": known["fastlora-triton"]}
    report = LinearBench(torch.device("cuda"), providers, RULE).run([Case(256, 512, 512, 16)])
    for row in rows_of(report, "fastlora-triton"):
        assert row.status == "ok", row.reason
        assert row.kernels
        assert row.loop_ratio is not None
        assert {name.split("/")[1] for name in row.launches} == {"triton"}
