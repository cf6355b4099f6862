"""Resumable training checkpoints: safetensors and JSON, written whole or not at all.

    <root>/step-00000100/<group>.safetensors     one file per group of tensors
    <root>/step-00000100/state.json              everything else; size and SHA-256 of each file

A checkpoint is built in a hidden directory, flushed to disk and renamed, so a name ``step-*``
appears only when all of it is there. A reader still trusts the digests alone: a disk may tear what
it acknowledged. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

FORMAT = "fastlora-checkpoint"
VERSION = 1
STATE_FILE = "state.json"
_NAME = re.compile(r"step-(\d{8,})")
_GROUP = re.compile(r"[a-z_]+")

Tensors = Mapping[str, torch.Tensor]


class CheckpointError(ValueError):
    """A checkpoint that is torn, foreign or otherwise not to be trusted. Nothing was changed."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: ``tensors[group][name]`` on the CPU, ``state`` of JSON values."""

    path: Path
    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    root: str | Path,
    step: int,
    tensors: Mapping[str, Tensors],
    state: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write ``<root>/step-<step>`` atomically, then delete all but it and the ``keep - 1`` before
    it.

    Checkpoints of later steps go too: this run did not come from them (it resumed before them, or
    they are torn). Tensors may be on any device and of any strides. On any failure (a full disk:
    ``OSError`` ENOSPC) what was being written is removed, every older checkpoint is still there,
    and the error is raised.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"step-{step:08d}"
    with replacing_directory(final) as building:
        files = {}
        for group, values in tensors.items():
            if not _GROUP.fullmatch(group):
                raise ValueError(
                    f"group {group!r} must be lower-case letters and _: it names a file"
                )
            name = f"{group}.safetensors"
            data = save(
                {key: value.detach().cpu().contiguous() for key, value in values.items()},
                {"format": "pt"},
            )
            write_file(building / name, data)
            files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        header = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "files": files,
            "state": dict(state),
        }
        write_file(building / STATE_FILE, json.dumps(header).encode())
    every = list_checkpoints(root)
    kept = every[: every.index(final) + 1][-keep:]
    for other in every:
        if other not in kept:
            _remove(other)
    return final


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read and verify one. Raises ``CheckpointError`` naming the file that is wrong and how."""
    path = Path(path)
    try:
        header = json.loads((path / STATE_FILE).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / STATE_FILE} cannot be read: {error}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(f"{path / STATE_FILE} is not a {FORMAT}")
    if header.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {header.get('version')}; this fastlora reads {VERSION}"
        )
    files, state, step = header.get("files"), header.get("state"), header.get("step")
    if not (isinstance(files, dict) and isinstance(state, dict) and isinstance(step, int)):
        raise CheckpointError(f"{path / STATE_FILE} lacks its files, state or step")
    tensors = {}
    for name, expected in files.items():
        group = name.removesuffix(".safetensors")
        if not (_GROUP.fullmatch(group) and isinstance(expected, dict)):
            raise CheckpointError(
                f"{path / STATE_FILE} names a file {name!r} that no checkpoint has"
            )
        tensors[group] = _load_group(path / f"{group}.safetensors", expected)
    return Checkpoint(path, step, tensors, state)


def _load_group(path: Path, expected: dict[str, Any]) -> dict[str, torch.Tensor]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) != expected.get("bytes") or hashlib.sha256(data).hexdigest() != expected.get(
        "sha256"
    ):
        raise CheckpointError(
            f"{path} is torn: {len(data)} bytes that are not the {expected.get('bytes')} written"
        )
    try:
        return load(data)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from None


def latest_checkpoint(root: str | Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and a message for each newer one that did not.

    A checkpoint that a crash caught between the two renames of its replacement gets its name back.
    """
    for aside in Path(root).glob(".step-*.replaced"):
        final = aside.with_name(aside.name.removeprefix(".").removesuffix(".replaced"))
        _put_back(final)
    skipped: list[str] = []
    for path in reversed(list_checkpoints(root)):
        try:
            return load_checkpoint(path), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    return None, skipped


def list_checkpoints(root: str | Path) -> list[Path]:
    """Directories named as checkpoints, by step. Unfinished ones have other names."""
    root = Path(root)
    found = [
        (int(match[1]), path)
        for path in root.glob("step-*")
        if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


# -- atomic files ----------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing_directory(final: Path) -> Iterator[Path]:
    """Yield an empty hidden directory beside ``final``; on success it takes that name, on failure
    it vanishes.

    An older ``final`` is moved aside just before and removed after, so it is lost only once the new
    one stands.
    """
    building = final.with_name(f".{final.name}.building")
    _remove(building)
    building.mkdir()
    try:
        yield building
        for path in building.rglob("*"):
            _flush(path)
        _flush(building)
        # A directory cannot be renamed onto a full one. Between the two renames a crash leaves
        # `aside`: see _put_back.
        aside = _aside(final)
        _remove(aside)
        if final.exists():
            final.rename(aside)
        building.rename(final)
        _flush(final.parent)
        _remove(aside)
    except BaseException:
        _put_back(final)
        _remove(building)
        raise


def _put_back(final: Path) -> None:
    aside = _aside(final)
    if aside.exists() and not final.exists():
        aside.rename(final)


def write_file(path: Path, data: bytes) -> None:
    """Write and flush; ``OSError`` says what the disk said."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Give ``path`` new content; a reader, or a crash, sees the old or the new, never a mixture."""
    building = path.with_name(f".{path.name}.building")
    try:
        write_file(building, data)
        building.replace(path)
    except BaseException:
        building.unlink(missing_ok=True)
        raise


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.replaced")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.exists():
        # Renamed first: a deletion that is cut short must not leave a half-empty directory under a
        # valid name.
        doomed = path.with_name(f".{path.name.lstrip('.')}.removing")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


# -- what a step's randomness hangs on -------------------------------------------------------------


def rng_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The global generators of torch (CPU and every CUDA device), numpy and Python."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    name, keys, *rest = np.random.get_state(legacy=True)
    version, words, gauss = random.getstate()
    return tensors, {
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "python": [version, list(words), gauss],
    }


def set_rng_state(tensors: Tensors, state: Mapping[str, Any]) -> None:
    """Put back what ``rng_state`` returned; CUDA states where those devices exist."""
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda.{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


# -- optimizer -------------------------------------------------------------------------------------


def optimizer_tensors(
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors ``<parameter number>.<key>`` and JSON values."""
    packed = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for number, values in packed["state"].items():
        for key, value in values.items():
            target: dict[str, Any] = tensors if isinstance(value, torch.Tensor) else scalars
            target[f"{number}.{key}"] = value
    return tensors, {"scalars": scalars, "param_groups": packed["param_groups"]}


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Tensors, state: Mapping[str, Any]
) -> None:
    """The inverse of ``optimizer_tensors``, for the same parameters in the same order."""
    packed: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **state["scalars"]}.items():
        number, key = name.split(".", 1)
        packed.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": packed, "param_groups": state["param_groups"]})
