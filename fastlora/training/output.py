"""The output directory of a run: whose it is, what it holds, what a resume may continue."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from . import base
from .config import CHANGEABLE_ON_RESUME, FinetuneConfig, option
from .errors import InputError, RunError
from .report import write_json


class OutputDirectory:
    """Paths of everything a run writes. Nothing is created or deleted before ``claim``."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.run = self.path / "run.json"
        self.log = self.path / "log.jsonl"
        self.curve = self.path / "loss_curve.png"
        self.summary = self.path / "summary.json"
        self.adapter = self.path / "adapter"
        self.model = self.path / "model"
        self.checkpoints = self.path / "checkpoints"

    def check_free(self, overwrite: bool) -> None:
        """Raise ``InputError`` unless a new run may start here."""
        check_free(self.path, self.run, overwrite, "run", "finetune")

    def check_resumable(self, facts: dict[str, Any]) -> None:
        """Raise ``InputError`` unless the run in here is the one that ``facts`` describe."""
        saved = read_run(self.path)
        was, now = saved["config"], facts["config"]
        changed = [
            f"{option(name)} was {was.get(name)!r}, is {now[name]!r}"
            for name in now
            if name not in CHANGEABLE_ON_RESUME and was.get(name) != now[name]
        ]
        changed += [
            f"the content of {option(name)} changed"
            for name, digest in facts["sha256"].items()
            if saved["sha256"].get(name) != digest
        ]
        if saved["model_files"] != facts["model_files"]:
            changed.append("the model's files changed")
        if changed:
            raise InputError("--resume must continue the same run, but " + "; ".join(changed))

    def claim(self, facts: dict[str, Any], resume: bool) -> None:
        """Make the directory this run's: clear an earlier run (not on a resume), note this one."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not resume:
                for path in vars(self).values():
                    if path != self.path and path.is_dir():
                        shutil.rmtree(path)
                    elif path != self.path:
                        path.unlink(missing_ok=True)
            write_json(self.run, facts)
        except OSError as error:
            raise RunError(f"cannot write to --output {self.path}: {error.strerror}") from error


def check_free(path: Path, record: Path, overwrite: bool, what: str, command: str) -> None:
    """Raise ``InputError`` unless ``command`` may begin a new ``what`` in ``path``; ``record`` is the file by which it knows
    its own."""
    if path.exists() and not path.is_dir():
        raise InputError(f"--output {path} is a file; give a directory")
    if not path.exists() or not any(path.iterdir()):
        return
    if not overwrite:
        raise InputError(
            f"--output {path} is not empty: --resume continues the {what} in it, --overwrite replaces it, or give another "
            "directory"
        )
    if not record.is_file():
        raise InputError(
            f"--overwrite: {path} was not written by fastlora {command}; give another directory"
        )


def read_record(file: Path, keys: set[str], what: str, command: str) -> dict[str, Any]:
    """The JSON object that ``command`` left in ``file``, with ``keys`` in it; ``InputError`` where there is none."""
    try:
        saved = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"--resume: {file.parent} holds no {what} ({file.name} is missing); check --output"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"--resume: {file} cannot be read ({error})") from None
    if not (isinstance(saved, dict) and keys <= saved.keys()):
        raise InputError(f"--resume: {file} was not written by fastlora {command}")
    return saved


def read_run(path: Path) -> dict[str, Any]:
    """The ``run.json`` of an output directory."""
    return read_record(path / "run.json", {"config", "sha256", "model_files"}, "run", "finetune")


def run_facts(config: FinetuneConfig) -> dict[str, Any]:
    """What a run is, for ``run.json``: options, the data's digests, model files, versions."""
    files = {"data": config.data, "eval_data": config.eval_data, "watch": config.watch}
    return {
        "config": config.to_json(),
        "sha256": {
            name: _sha256(option(name), path) for name, path in files.items() if path is not None
        },
        "model_files": base.fingerprint(config.model),
        "versions": {
            "fastlora": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _sha256(name: str, path: str) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise InputError(f"{name} {path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()
