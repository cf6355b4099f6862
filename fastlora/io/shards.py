"""A checkpoint's files as transformers names them: written tensor by tensor, each no larger than asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 4 << 30
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


def copy_rest(source: Path, target: Path) -> None:
    """Copy what belongs to a model beside its weights and config.json: tokenizer, generation settings, ..."""
    for path in source.iterdir():
        weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        other = path.name in (
            "config.json",
            "adapter_config.json",
        )  # written anew; an adapter's own
        if path.is_file() and not weights and not other:
            shutil.copyfile(path, target / path.name)


class Shards:
    """Files of at most about ``most`` bytes, and their index if they are several."""

    def __init__(self, folder: Path, most: int) -> None:
        self._folder, self._most = folder, most
        self._now: dict[str, Tensor] = {}
        self._files: list[list[str]] = []
        self._bytes = self._total = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        if not tensors:
            return
        size = sum(t.nbytes for t in tensors.values())
        if self._now and self._bytes + size > self._most:
            self._write()
        self._now |= tensors
        self._bytes += size
        self._total += size

    def _write(self) -> None:
        contiguous = {key: t.contiguous() for key, t in self._now.items()}
        save_file(contiguous, self._folder / f"{len(self._files)}.part", {"format": "pt"})
        self._files.append(list(self._now))
        self._now, self._bytes = {}, 0

    def finish(self) -> None:
        self._write()
        count = len(self._files)
        weight_map: dict[str, str] = {}
        for i, keys in enumerate(self._files):
            name = (
                f"model-{i + 1:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"
            )
            (self._folder / f"{i}.part").rename(self._folder / name)
            weight_map |= dict.fromkeys(keys, name)
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            text = json.dumps(index, indent=2) + "\n"
            (self._folder / "model.safetensors.index.json").write_text(text)
