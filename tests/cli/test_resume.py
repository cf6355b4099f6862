"""A run that was killed, stopped or torn continues to the losses it would have had, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fastlora.io.checkpoint import list_checkpoints

STEPS = 120


def exact_log(output: Path) -> list[dict[str, Any]]:
    """The log without what the clock says."""
    entries = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    for entry in entries:
        entry.pop("seconds", None)
        entry.pop("tokens_per_second", None)
    return entries


def options(model_dir: Path, data: Path, output: Path) -> list[str]:
    arguments = [
        "finetune", "--model", model_dir, "--data", data, "--output", output, "--seq-length", 32, "--batch-size", 2,
        "--grad-accumulation", 2, "--r", 4, "--lr", 0.01, "--dropout", 0.1, "--weight-decay", 0.1, "--epochs", 1000,
        "--max-steps", STEPS, "--save-every", 7, "--eval-every", 25, "--device", "cpu", "--seed", 3,
    ]  # fmt: skip
    return [str(argument) for argument in arguments]


def start(*arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-m", "fastlora", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait_for_lines(log: Path, lines: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and log.read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.002)
    raise AssertionError(
        f"the run ended, or hung, before {lines} lines: {process.communicate()[0].decode()}"
    )


def test_kill_9_twice_and_resume_is_bitwise_the_uninterrupted_run(
    model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    uninterrupted = start(*options(model_dir, text_file, whole))
    killed = start(*options(model_dir, text_file, broken))
    wait_for_lines(broken / "log.jsonl", 20, killed)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (broken / "summary.json").exists()

    killed = start("finetune", "--resume", "--output", str(broken))
    wait_for_lines(broken / "log.jsonl", 70, killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()

    resumed = start("finetune", "--resume", "--output", str(broken))
    printed = resumed.communicate(timeout=120)[0].decode()
    assert resumed.returncode == 0, printed
    assert "resuming from step " in printed
    assert uninterrupted.communicate(timeout=120)[0]
    assert uninterrupted.returncode == 0

    expected = exact_log(whole)
    assert len([entry for entry in expected if "loss" in entry]) == STEPS
    assert exact_log(broken) == expected
    for name in (
        "adapter/adapter_model.safetensors",
        f"checkpoints/step-{STEPS:08d}/optimizer.safetensors",
    ):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


def run_and_signal(
    finetune_cli: Any, output: Path, number: int, after_lines: int, *arguments: object
) -> Any:
    """Run in this process, and send it a signal once the log has so many lines."""

    def watch() -> None:
        log = output / "log.jsonl"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if log.exists() and log.read_bytes().count(b"\n") >= after_lines:
                os.kill(os.getpid(), number)
                return
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        return finetune_cli(*arguments, output=output)
    finally:
        watcher.join()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_resume_continues_exactly(
    number: signal.Signals, finetune_cli: Any, tmp_path: Path
) -> None:
    arguments = ("--epochs", 1000, "--max-steps", 80, "--save-every", 0, "--dropout", 0.1)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert finetune_cli(*arguments, output=whole).exit_code == 0
    before = signal.getsignal(number)
    result = run_and_signal(finetune_cli, stopped, number, 10, *arguments)
    assert signal.getsignal(number) is before
    assert result.exit_code == 128 + number, result.output
    assert "stopping after this step" in result.output
    assert "everything is saved, --resume continues" in result.stderr
    (checkpoint,) = list_checkpoints(stopped / "checkpoints")
    assert f"stopped at step {int(checkpoint.name.removeprefix('step-'))};" in result.stderr
    assert (stopped / "adapter/adapter_model.safetensors").exists()
    result = finetune_cli("--resume", output=stopped)
    assert result.exit_code == 0, result.output
    assert exact_log(stopped) == exact_log(whole)


def test_a_torn_newest_checkpoint_falls_back_to_the_one_before(
    finetune_cli: Any, tmp_path: Path
) -> None:
    arguments = ("--max-steps", 9, "--save-every", 4, "--dropout", 0.1)
    output = tmp_path / "run"
    assert finetune_cli(*arguments).exit_code == 0
    expected = exact_log(output)
    newest = list_checkpoints(output / "checkpoints")[-1]
    assert newest.name == "step-00000009"
    os.truncate(newest / "optimizer.safetensors", 100)
    result = finetune_cli("--resume")
    assert result.exit_code == 0, result.output
    assert "optimizer.safetensors is torn" in result.output
    assert "resuming from step 8" in result.output
    assert exact_log(output) == expected


def test_killed_before_the_first_checkpoint_starts_again(finetune_cli: Any, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert finetune_cli("--max-steps", 3).exit_code == 0
    expected = exact_log(output)
    for path in list_checkpoints(output / "checkpoints"):
        path.rename(output / "checkpoints" / f".{path.name}.building")
    result = finetune_cli("--resume")
    assert result.exit_code == 0, result.output
    assert "no usable checkpoint: starting again from step 0" in result.output
    assert exact_log(output) == expected


def test_resume_of_a_finished_run_reports_again_and_changes_nothing(
    finetune_cli: Any, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    first = finetune_cli("--max-steps", 3)
    expected = exact_log(output)
    again = finetune_cli("--resume")
    assert again.exit_code == 0, again.output
    assert exact_log(output) == expected
    line = next(line for line in first.stdout.splitlines() if "perplexity after" in line)
    assert line in again.stdout


def test_resume_may_go_further_but_not_elsewhere(
    fastlora_cli: Any, finetune_cli: Any, text_file: Path, model_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    assert finetune_cli("--max-steps", 3, "--epochs", 9).exit_code == 0
    result = fastlora_cli("finetune", "--resume", "--output", output, "--max-steps", 5)
    assert result.exit_code == 0, result.output
    assert [entry["step"] for entry in exact_log(output) if "loss" in entry] == [1, 2, 3, 4, 5]

    result = fastlora_cli("finetune", "--resume", "--output", output, "--lr", 0.5, "--seed", 9)
    assert result.exit_code == 2
    assert "--learning-rate was 0.01, is 0.5; --seed was 0, is 9" in result.stderr
    text_file.write_text(text_file.read_text() + "more")
    result = fastlora_cli("finetune", "--resume", "--output", output)
    assert result.exit_code == 2
    assert "the content of --data changed" in result.stderr
    (output / "run.json").write_text("{")
    assert fastlora_cli("finetune", "--resume", "--output", output).exit_code == 2
