"""Where an adapter's two files are."""

from __future__ import annotations

from pathlib import Path

from ..methods import PeftConfig
from ..methods.adapters_layout import PICKLE_NAME
from ..methods.base import CONFIG_NAME

WEIGHTS_NAME = "adapter_model.safetensors"


def find_folder(path: Path, adapter_name: str) -> Path:
    """The folder of an adapter's two files: ``path``, or in it the one of the adapter's name. FileNotFoundError otherwise."""
    if not path.is_dir():
        raise FileNotFoundError(
            f"path: {path} is no folder; accepted is one with {CONFIG_NAME} and {WEIGHTS_NAME}"
        )
    inside = path / adapter_name
    folder = (
        inside if not (path / CONFIG_NAME).is_file() and (inside / CONFIG_NAME).is_file() else path
    )
    if not (folder / WEIGHTS_NAME).is_file() and (folder / "adapter_model.bin").is_file():
        raise FileNotFoundError(
            f"{folder}: has adapter_model.bin and no {WEIGHTS_NAME}; pickled files can run code "
            "and are not read. Convert it where you trust it: "
            "peft.PeftModel.from_pretrained(base, path).save_pretrained(new_path)"
        )
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(
            f"{folder / CONFIG_NAME}: not found; an adapter is {CONFIG_NAME} and {WEIGHTS_NAME}"
        )
    return folder


def weights_file(folder: Path, config: PeftConfig) -> Path:
    """The file of an adapter's tensors in its folder; FileNotFoundError if it is not there."""
    file = folder / config.weights_name
    if not file.is_file():
        pickle = (folder / PICKLE_NAME).is_file() and config.weights_name != WEIGHTS_NAME
        why = f"; {PICKLE_NAME}, which could run code, is not read" if pickle else ""
        raise FileNotFoundError(
            f"{file}: not found; an adapter is {CONFIG_NAME} and {config.weights_name}{why}"
        )
    return file
