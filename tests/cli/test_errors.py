"""What a user is told when something is wrong, and that nothing is lost."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora.io.checkpoint import latest_checkpoint


def test_bad_input_is_one_message_and_exit_code_2(
    fastlora_cli: Any, finetune_cli: Any, model_dir: Path, jsonl: Any, tmp_path: Path
) -> None:
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("")
    short.write_text("Ten words do not make a book, nor these.")
    bare = tmp_path / "bare"
    bare.mkdir()
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    untemplated = tmp_path / "untemplated"
    shutil.copytree(model_dir, untemplated)
    (untemplated / "chat_template.jinja").unlink()
    broken = tmp_path / "broken"
    shutil.copytree(model_dir, broken)
    (broken / "model.safetensors").write_bytes(b"torn")
    cases: list[tuple[list[object], dict[str, Any], str]] = [
        (
            ["--model", tmp_path / "nowhere"],
            {},
            "does not exist: give a local transformers directory or a .gguf",
        ),
        (["--model", bare], {}, "has no config.json and no .gguf file"),
        (["--model", broken], {}, "cannot be loaded as a causal language model"),
        ([], {"data": tmp_path / "nowhere.txt"}, "cannot be read: No such file"),
        ([], {"data": empty}, "is empty: there is nothing to train on"),
        ([], {"data": short}, "do not fill one block of --seq-length 32"),
        (["--seq-length", 100], {"data": short}, "too little data"),
        ([], {"data": jsonl({"text": "a"}, "{oops")}, "line 2: not valid JSON"),
        (
            ["--model", untemplated],
            {"data": jsonl({"messages": chat}, name="c.jsonl")},
            "need a chat template",
        ),
        (
            ["--target-modules", "q_proj,qproj"],
            {},
            "no module qproj; its linear layers are down_proj, gate_proj",
        ),
        (["--target-modules", "regex:nothing"], {}, "the adapter cannot be added"),
        (["--seq-length", 200], {}, "LlamaForCausalLM takes at most 128 tokens"),
        (["--lr", -1], {}, "--learning-rate -1.0 must be a positive number"),
        (["--lr", "nan"], {}, "--learning-rate nan must be a positive number"),
        (["--dropout", 1.5], {}, "--dropout 1.5 is not in 0..0.999"),
        (["--r", 0], {}, "--r 0 is not in 1..512"),
        (["--method", "magic"], {}, "--method 'magic' is not one of lora, rslora, qlora"),
        (["--device", "cuda:99"], {}, "--device 'cuda:99' cannot be used here"),
        (["--eval-fraction", 0], {}, "--eval-fraction 0 leaves nothing held out"),
        (["--eval-data", tmp_path / "gone.txt"], {}, "--eval-data"),
        (["--resume"], {}, "holds no run"),
        (["--resume", "--overwrite"], {}, "exclude each other"),
    ]
    for arguments, files, message in cases:
        result = finetune_cli(*arguments, **files)
        assert result.exit_code == 2, (arguments, result.output)
        assert message in result.stderr, (arguments, result.stderr)
        assert len(re.findall("^error:", result.stderr, re.MULTILINE)) == 1
        assert "Traceback" not in result.output
        assert not (tmp_path / "run").exists(), arguments
    for missing in ("--model", "--data"):
        rest = [
            argument
            for name in ("--model", "--data")
            if name != missing
            for argument in (name, model_dir)
        ]
        result = fastlora_cli("finetune", *rest)
        assert (result.exit_code, f"{missing} is missing" in result.stderr) == (2, True)


def test_debug_shows_the_traceback(finetune_cli: Any, tmp_path: Path) -> None:
    from fastlora.training import InputError

    result = finetune_cli("--model", tmp_path / "nowhere", "--debug")
    assert isinstance(result.exception, InputError)


def test_a_tokenizer_of_another_model(finetune_cli: Any, model_dir: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
        )
    ).save_pretrained(other)
    result = finetune_cli("--model", other)
    assert result.exit_code == 2
    assert "but the model knows 50 tokens: they do not belong together" in result.stderr


def test_output_directories_are_not_overwritten_by_accident(
    finetune_cli: Any, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    for flags, message in (
        ((), "is not empty: --resume continues"),
        (("--overwrite",), "was not written by fastlora"),
    ):
        result = finetune_cli("--max-steps", 1, *flags, output=foreign)
        assert result.exit_code == 2
        assert message in result.stderr
    assert finetune_cli("--max-steps", 1, output=foreign / "thesis.txt").exit_code == 2
    assert (foreign / "thesis.txt").read_text() == "years of work"

    assert finetune_cli("--max-steps", 2).exit_code == 0
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert finetune_cli("--max-steps", 1).exit_code == 2
    assert finetune_cli("--max-steps", 1, "--overwrite").exit_code == 0
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"  # only a run's own files go
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000001"]


def break_loss_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastlora.training import loop

    real, calls = loop.summed_loss, 0

    def summed_loss(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        loss = real(*arguments)
        if not torch.is_grad_enabled():
            return loss
        calls += 1
        return loss * float("nan") if calls == step else loss

    monkeypatch.setattr(loop, "summed_loss", summed_loss)


def test_nan_loss_stops_and_keeps_the_last_good_state(
    finetune_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        break_loss_at(6, patch)
        result = finetune_cli("--max-steps", 9, "--save-every", 2)
    assert result.exit_code == 1
    assert "the loss became nan at step 6" in result.stderr
    assert "The checkpoint and the adapter of step 4 are kept" in result.stderr
    assert "lower --learning-rate" in result.stderr
    checkpoint, skipped = latest_checkpoint(output / "checkpoints")
    assert checkpoint is not None
    assert (checkpoint.step, skipped) == (4, [])
    from safetensors.torch import load_file

    saved = load_file(output / "adapter/adapter_model.safetensors")
    assert all(value.isfinite().all() for value in saved.values())
    assert (
        len((output / "log.jsonl").read_text().splitlines()) == 6
    )  # the first evaluation and five good steps
    assert (output / "loss_curve.png").stat().st_size > 0
    result = finetune_cli("--resume", "--max-steps", 9)
    assert result.exit_code == 0, result.output


def test_divergence_is_noticed_by_itself(finetune_cli: Any) -> None:
    result = finetune_cli("--max-steps", 9, "--lr", 1e30, "--grad-clip", 0, "--save-every", 0)
    assert result.exit_code == 1
    assert "No checkpoint had been written yet" in result.stderr


def test_nan_weights_are_noticed_before_training(
    finetune_cli: Any, model_dir: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    damaged = tmp_path / "damaged"
    shutil.copytree(model_dir, damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    result = finetune_cli("--model", damaged)
    assert result.exit_code == 1
    assert "the held-out loss is NaN at step 0" in result.stderr


def test_a_full_disk_for_a_while_does_not_stop_training(
    finetune_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastlora.training import loop

    real, calls = loop.save_checkpoint, 0

    def save_checkpoint(*arguments: Any, **keywords: Any) -> Path:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **keywords)

    monkeypatch.setattr(loop, "save_checkpoint", save_checkpoint)
    result = finetune_cli("--max-steps", 7, "--save-every", 2)
    assert result.exit_code == 0, result.output
    assert "step 4 could not be saved" in result.stdout
    assert "the disk is full. The checkpoint of step 2 is intact. Training goes on" in result.stdout
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["step-00000006", "step-00000007"]


def test_a_disk_that_stays_full_loses_nothing_that_was_saved(
    finetune_cli: Any, tmp_path: Path
) -> None:
    """On a real small file system: it fills up with checkpoints, then grows, and the run is
    resumed.
    """
    mount = tmp_path / "small"
    mount.mkdir()

    def tmpfs(options: str) -> int:
        return subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(mount)], capture_output=True
        ).returncode

    if shutil.which("mount") is None or tmpfs("size=700k"):
        pytest.skip("cannot mount a tmpfs here")
    try:
        arguments = ("--epochs", 9, "--max-steps", 40, "--save-every", 1, "--keep-last", 1000)
        result = finetune_cli(*arguments, output=mount / "run")
        assert result.exit_code == 1, result.output
        assert "the disk is full. The checkpoint of step" in result.stderr
        assert "Free some space; --resume" in result.stderr
        checkpoint, skipped = latest_checkpoint(mount / "run/checkpoints")
        assert checkpoint is not None
        assert skipped == []
        assert 1 <= checkpoint.step < 40
        assert tmpfs("remount,size=64m") == 0
        result = finetune_cli("--resume", output=mount / "run")
        assert result.exit_code == 0, result.output
        assert f"resuming from step {checkpoint.step}" in result.stdout
        log = [json.loads(line) for line in (mount / "run/log.jsonl").read_text().splitlines()]
        assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 41))
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_the_log_survives_a_disk_that_is_full_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastlora.training.report import RunLog

    log = RunLog(tmp_path / "log.jsonl")
    log.add({"step": 1})
    real = Path.open

    class HalfFull:
        """A file that takes half of what it is given, then reports a full disk."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> HalfFull:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def truncate(self, size: int) -> None:
            self.file.truncate(size)

        def write(self, data: bytes) -> None:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, *a, **k: HalfFull(real(self, *a, **k)))
        log.add({"step": 2})
    assert b'"step": 2}' not in log.path.read_bytes()
    log.add({"step": 3})
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2, 3]


def test_running_out_of_memory_is_explained(
    finetune_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastlora.training import session

    def mean_loss(*_: Any) -> float:
        torch.empty(1 << 60)
        raise AssertionError("that was not allocated")

    monkeypatch.setattr(session, "mean_loss", mean_loss)
    result = finetune_cli()
    assert result.exit_code == 1
    assert "out of memory on cpu. Try a lower --batch-size" in result.stderr
