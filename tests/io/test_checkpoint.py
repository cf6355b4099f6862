"""Checkpoints: whole or absent, verified when read, exact for what a resume needs."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastlora.io import checkpoint as module
from fastlora.io.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_optimizer,
    optimizer_tensors,
    replace_file,
    rng_state,
    save_checkpoint,
    set_rng_state,
)

TENSORS = {
    "parameters": {
        "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3).t(),  # not contiguous
        "b": torch.tensor([1.5, -0.0, float("inf")], dtype=torch.bfloat16),
    },
    "rng": {"torch": torch.arange(5, dtype=torch.uint8)},
    "empty": {},
}


def save(root: Path, step: int, keep: int = 9, **state: Any) -> Path:
    return save_checkpoint(root, step, TENSORS, state, keep)


def everything_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    state = {"seconds": 0.1 + 0.2, "words": [1, 2**40], "none": None, "text": "é"}
    loaded = load_checkpoint(save(tmp_path, 7, **state))
    assert loaded.step == 7
    assert loaded.state == state
    assert loaded.tensors.keys() == TENSORS.keys()
    for group, values in TENSORS.items():
        assert loaded.tensors[group].keys() == values.keys()
        for name, value in values.items():
            got = loaded.tensors[group][name]
            assert got.dtype == value.dtype
            assert torch.equal(got, value)
    assert everything_in(tmp_path) == ["step-00000007"]


def test_only_safetensors_and_json_are_written(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    json.loads((path / "state.json").read_text())


def test_keeps_the_newest_and_drops_what_a_resume_left_behind(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, keep=2)
    assert everything_in(tmp_path) == ["step-00000020", "step-00000030"]
    # Resumed at 20 (say 30 was torn): 30 is of another past, and must not win over 25.
    save(tmp_path, 25, keep=2)
    assert everything_in(tmp_path) == ["step-00000020", "step-00000025"]
    save(tmp_path, 30, keep=1)
    assert everything_in(tmp_path) == ["step-00000030"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 3, run=1)
    assert load_checkpoint(save(tmp_path, 3, run=2)).state == {"run": 2}
    assert everything_in(tmp_path) == ["step-00000003"]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["parameters.safetensors", "rng.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_torn_checkpoint_is_passed_over(name: str, damage: Any, tmp_path: Path) -> None:
    save(tmp_path, 1, mark="old")
    newest = save(tmp_path, 2)
    damage(newest / name)
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(newest)
    found, skipped = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.state == {"mark": "old"}
    assert len(skipped) == 1
    assert name in skipped[0]


def test_nothing_usable(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") == (None, [])
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-2").mkdir()  # not a name of ours
    found, skipped = latest_checkpoint(tmp_path)
    assert found is None
    assert len(skipped) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is not a fastlora-checkpoint"),
        ({"version": 99}, "format version 99"),
        ({"files": {"../../etc/passwd": {}}}, "no checkpoint has"),
        ({"step": "7"}, "lacks its files, state or step"),
    ],
)
def test_foreign_headers(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = save(tmp_path, 7) / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(file.parent)


@pytest.mark.parametrize("writes_before", range(6))
def test_a_full_disk_at_any_write_leaves_the_old_one(
    writes_before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every flush is a point where the kernel may report that the data did not fit."""
    save(tmp_path, 1, mark="old")
    real, left = os.fsync, writes_before

    def fsync(handle: int) -> None:
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left -= 1
        real(handle)

    monkeypatch.setattr(module.os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 1, mark="new")  # the hardest case: it would replace the old one
    monkeypatch.undo()
    found, skipped = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.state["mark"] == "old"
    assert skipped == []
    assert everything_in(tmp_path) == ["step-00000001"]


def test_a_kill_at_any_point_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    """kill -9 runs no handler: the process ends at the n-th rename, and what is there must do."""
    import multiprocessing

    def replace_and_die(root: Path, renames_before: int) -> None:
        real, left = Path.rename, renames_before

        def rename(self: Path, target: Path) -> Path:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return real(self, target)

        Path.rename = rename  # type: ignore[method-assign]
        save(root, 1, mark="new")

    for renames_before in range(4):
        root = tmp_path / str(renames_before)
        save(root, 1, mark="old")
        child = multiprocessing.get_context("fork").Process(
            target=replace_and_die, args=(root, renames_before)
        )
        child.start()
        child.join()
        found, skipped = latest_checkpoint(root)
        assert found is not None
        assert skipped == []
        assert found.state["mark"] == ("old" if renames_before < 2 else "new")
        save(root, 1, mark="newest")  # and the next save cleans up
        assert everything_in(root) == ["step-00000001"]


def test_real_full_disk(tmp_path: Path) -> None:
    """On a real small file system, where this process may mount one."""
    import subprocess

    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        save(mount, 1, mark="old")
        big = {"parameters": {"w": torch.zeros(1 << 20)}}
        with pytest.raises(OSError, match="No space left") as caught:
            save_checkpoint(mount, 2, big, {})
        assert caught.value.errno == errno.ENOSPC
        assert everything_in(mount) == ["step-00000001"]
        found = latest_checkpoint(mount)[0]
        assert found is not None
        assert found.state == {"mark": "old"}
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_replace_file_keeps_the_old_content_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    replace_file(path, b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert everything_in(tmp_path) == ["a.json"]


def test_rng_round_trip_continues_every_generator(tmp_path: Path) -> None:
    def draw() -> list[Any]:
        return [
            random.random(),
            random.gauss(0, 1),
            np.random.rand(),
            np.random.randn(),
            torch.rand(3).tolist(),
        ]

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    draw()  # leaves half a pair of normals inside Python's and numpy's generators
    tensors, words = rng_state()
    path = save_checkpoint(tmp_path, 1, {"rng": tensors}, {"rng": words})
    expected = [draw(), draw()]
    loaded = load_checkpoint(path)
    set_rng_state(loaded.tensors["rng"], loaded.state["rng"])
    assert [draw(), draw()] == expected


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.AdamW(
            [{"params": p[:1], "weight_decay": 0.1}, {"params": p[1:]}], lr=0.01, amsgrad=True
        ),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    ],
)
def test_optimizer_round_trip_takes_the_same_next_steps(build: Any, tmp_path: Path) -> None:
    def grow(parameters: list[torch.Tensor], optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            for parameter in parameters:
                parameter.grad = parameter.detach().sin()
            optimizer.step()

    torch.manual_seed(0)
    ours = [torch.randn(3, 2, requires_grad=True), torch.randn(4, requires_grad=True)]
    optimizer = build(ours)
    grow(ours, optimizer, 3)
    tensors, state = optimizer_tensors(optimizer)
    path = save_checkpoint(tmp_path, 3, {"optimizer": tensors}, {"optimizer": state})
    theirs = [parameter.detach().clone().requires_grad_() for parameter in ours]
    grow(ours, optimizer, 2)

    other = build(theirs)
    loaded = load_checkpoint(path)
    load_optimizer(other, loaded.tensors["optimizer"], loaded.state["optimizer"])
    grow(theirs, other, 2)
    for ours_now, theirs_now in zip(ours, theirs, strict=True):
        assert torch.equal(ours_now, theirs_now)


def test_listing_is_by_step_not_by_name(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 5):
        save(tmp_path, step, keep=9) if step != 5 else None
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-99999999", "step-100000000"]
