"""Several methods on the same data: what the table says is what the runs left, and a comparison stops and goes on."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from fastlora.training import FinetuneConfig, InputError, Interrupted, RunError
from fastlora.training.compare import Row, compare, markdown
from fastlora.training.energy import energy_counter


@pytest.fixture
def config(model_dir: Path, text_file: Path, general: Path, tmp_path: Path) -> FinetuneConfig:
    return FinetuneConfig(
        model=str(model_dir),
        data=str(text_file),
        output=str(tmp_path / "compared"),
        watch=str(general),
        seq_length=32,
        batch_size=4,
        r=4,
        learning_rate=0.01,
        max_steps=4,
        save_every=2,
        keep_last=9,
        device="cpu",
    )


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def entries(run: Path) -> list[Any]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_the_table_is_what_the_runs_left(
    fastlora_cli: Any, config: FinetuneConfig, tmp_path: Path
) -> None:
    out = tmp_path / "compared"
    options = ("compare", "--model", config.model, "--data", config.data, "--output", out)
    options += ("--seq-length", 32, "--r", 4, "--lr", 0.01, "--max-steps", 4, "--device", "cpu")
    options += ("--save-every", 2, "--keep-last", 9, "--watch", config.watch)
    result = fastlora_cli(*options, "--methods", "lora,full")
    assert result.exit_code == 0, result.output
    record, table = read(out / "compare.json"), (out / "compare.md").read_text()
    assert [row["method"] for row in record["rows"]] == ["lora", "full"]
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    for row, rate, saved in zip(
        record["rows"],
        (0.01, 0.001),
        ("lora/adapter/adapter_model.safetensors", "full/model/model.safetensors"),
        strict=True,
    ):
        run = out / row["method"]
        summary = read(run / "summary.json")
        for name in row.keys() & summary.keys():
            assert row[name] == summary[name], name
        assert row["learning_rate"] == rate
        assert max(e["learning_rate"] for e in entries(run) if "loss" in e) <= rate
        assert row["steps"] == 4
        assert row["saved_bytes"] == (out / saved).stat().st_size
        assert row["energy"] is None
        assert "cpu" in row["no_energy"]
        after, general = row["perplexity_after"], row["watched_perplexity_after"]
        for text in (f"-> {after:.2f}", f"-> {general:.2f}", "100.00%"):
            assert text in table
            assert text in result.stdout
        assert math.exp(entries(run)[-1]["watch_loss"]) == pytest.approx(general)
    # One base, one set of blocks: all methods start from the same loss.
    losses = [next(e["loss"] for e in entries(out / m) if "loss" in e) for m in ("lora", "full")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    lora, full = record["rows"]
    assert lora["peak_memory_bytes"] != full["peak_memory_bytes"]  # each process its own
    assert "No energy: NVML" in result.stdout

    # Nothing is left to do; then the second run lost its end.
    before = (out / "full/log.jsonl").read_text()
    assert fastlora_cli("compare", "--output", out, "--resume").exit_code == 0
    assert (out / "full/log.jsonl").read_text() == before
    (out / "compare.json").write_text(json.dumps(record | {"rows": [lora]}))
    shutil.rmtree(out / "full/checkpoints/step-00000004")
    resumed = fastlora_cli("compare", "--output", out, "--resume")
    assert resumed.exit_code == 0, resumed.output
    again = read(out / "compare.json")["rows"]
    assert again[0] == lora
    assert again[1]["perplexity_after"] == full["perplexity_after"]
    assert again[1]["steps"] == 4


def test_a_run_that_fails_leaves_what_was_finished(config: FinetuneConfig, tmp_path: Path) -> None:
    out = tmp_path / "compared"
    out.mkdir()
    done = Row("rslora", 0.01, 1, 9, 5, 4, 0.1, 9.0, 8, 7.0, 6.0, 5.0, 4.0, None, "no GPU")
    facts = {
        "config": {**config.to_json(), "method": None},
        "methods": ["rslora", "full"],
        "learning_rates": {"full": 1e12},
        "rows": [dataclasses.asdict(done)],
    }
    (out / "compare.json").write_text(json.dumps(facts))
    with pytest.raises(RunError, match=r"full: the .* became") as caught:
        compare(config, ["rslora", "full"], {"full": 1e12}, Console(quiet=True), resume=True)
    assert caught.value.exit_code == 1
    assert read(out / "compare.json") == facts
    assert "rslora" in (out / "compare.md").read_text()


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals reach the main one"
)
def test_a_signal_stops_the_run_which_saves(
    config: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "compared/qlora"

    def stop() -> None:
        for _ in range(1200):
            if (run / "log.jsonl").exists() and len(entries(run)) > 2:
                break
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    endless = dataclasses.replace(config, max_steps=None, epochs=1e6, save_every=0)
    watcher = threading.Thread(target=stop)
    watcher.start()
    with pytest.raises(Interrupted, match="everything is saved") as caught:
        compare(endless, ["qlora", "lora"], console=Console(quiet=True))
    watcher.join()
    assert caught.value.exit_code == 128 + signal.SIGTERM
    assert list((run / "checkpoints").iterdir())
    assert not (tmp_path / "compared/lora").exists()


def test_what_cannot_be_compared(
    fastlora_cli: Any, config: FinetuneConfig, model_dir: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    quantised = tmp_path / "quantised"
    shutil.copytree(model_dir, quantised)
    settings = json.loads((quantised / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes"}
    (quantised / "config.json").write_text(json.dumps(settings))
    common = ("compare", "--model", model_dir, "--data", config.data, "--seq-length", 32)
    common += ("--output", tmp_path / "compared")
    for arguments, message in (
        (("--methods", "lora,magic"), "--methods 'magic' is not one of lora"),
        (("--methods", "lora,lora"), "--methods names lora twice"),
        (("--methods", ","), "--methods is empty"),
        (("--methods", "lora,full", "--model", quantised), "is quantised (bitsandbytes)"),
        (("--methods", "full,lora", "--target-modules", "x_proj"), "no module x_proj"),
        (("--seq-length", 4096), "takes at most 128 tokens"),
        (("--learning-rates", "full=-1"), "--learning-rate -1.0 must be a positive"),
        (("--learning-rates", "full"), "'full' is not METHOD=RATE"),
        (("--learning-rates", "ia3=1"), "'ia3' is not one of --methods"),
        (("--virtual-tokens", 4), "--virtual-tokens: none of --methods has it"),
        (("--output", foreign), "is not empty"),
        (("--output", foreign, "--overwrite"), "was not written by fastlora compare"),
        (("--resume",), "holds no comparison"),
        (("--resume", "--overwrite"), "exclude each other"),
    ):
        result = fastlora_cli(*common, *arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert message in result.stderr, (arguments, result.stderr)
        assert not (tmp_path / "compared").exists()
    with pytest.raises(InputError, match="max-minutes"):
        compare(FinetuneConfig(model="m", data="d", max_minutes=1.0))
    missing = fastlora_cli("compare", "--model", model_dir)
    assert (missing.exit_code, "--data is missing" in missing.stderr) == (2, True)


def test_energy_is_the_counters_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    readings = iter([0, 5_000, 12_500])  # the first asks whether there is a counter
    asked = []
    fake = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or "handle",
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(readings),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12345678-90ab")
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    counter = energy_counter(torch.device("cuda"))
    assert callable(counter)
    before = counter()
    assert counter() - before == pytest.approx(7.5)  # millijoules to joules
    assert asked == ["GPU-12345678-90ab"]

    def refuse(handle: object) -> int:
        raise NVMLError("Not Supported")

    monkeypatch.setattr(fake, "nvmlDeviceGetTotalEnergyConsumption", refuse)
    assert energy_counter(torch.device("cuda")) == "NVML tells no energy of a card: Not Supported"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install nvidia-ml-py" in str(energy_counter(torch.device("cuda")))
    assert "cpu" in str(energy_counter(torch.device("cpu")))


def test_the_tables_words() -> None:
    row = Row(
        "lora", 1e-3, 1, 200, 2**21, 7, 0.25, 100.0, 2**29, 9.0, 3.0, None, None, 1234.0, None
    )
    cells = row.cells()
    assert cells["trained"] == "0.50%"
    assert cells["saved MiB"] == "2.0"
    assert cells["peak GiB"] == "0.50"
    assert cells["task perplexity"] == "9.00 -> 3.00"
    assert cells["general perplexity"] == "-"
    assert cells["energy kJ"] == "1.23"
    text = markdown([row], FinetuneConfig(model="a/base", data="b/task.txt").to_json())
    assert "base on task.txt: 7 steps of 4 x 1 blocks of 1024 tokens" in text
    assert "--watch FILE gives it" in text


def test_a_peak_is_a_process_own() -> None:
    """Not inherited from a large one that started it."""
    import subprocess
    import sys

    held = torch.ones(100_000_000)  # 400 MB beside what torch takes
    script = (
        "import torch\nfrom fastlora.training.display import peak_memory\n"
        "print(peak_memory(torch.device('cpu')))"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    from fastlora.training.display import peak_memory

    assert int(found.stdout) < peak_memory(torch.device("cpu")) - 200_000_000
    assert held.numel()
