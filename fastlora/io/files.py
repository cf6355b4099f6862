"""Safetensors files: read whole or not at all, what of theirs is taken, written together, and how large they will be."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..layers.merging import is_sharded
from ..layers.plain import FLOATS

# What safetensors calls a dtype, in a file's header.
_SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


def read_tensors(file: Path) -> dict[str, Tensor]:
    """A safetensors file's tensors on the CPU; ValueError if it is torn."""
    try:
        with safe_open(file, framework="pt", device="cpu") as stored:
            keys = stored.keys()  # not a dict: it cannot be iterated itself
            return {key: stored.get_tensor(key) for key in keys}
    except (SafetensorError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        raise ValueError(
            f"{file}: not a whole safetensors file ({error}); copy or write it again"
        ) from None


def check_value(key: str, value: Tensor) -> None:
    """ValueError unless ``value`` is of a float dtype."""
    if value.dtype not in FLOATS:
        raise ValueError(
            f"{key}: is {value.dtype} in the file; accepted are {', '.join(map(str, FLOATS))}"
        )


def is_shadow(key: str, adapter_name: str) -> bool:
    """With bias="all", PEFT also stores the biases of a modules_to_save module a second time, and
    the frozen original's."""
    return key.endswith(
        (".original_module.bias", ".modules_to_save.bias", f".modules_to_save.{adapter_name}.bias")
    )


def tensor_writer(tensors: Mapping[str, Tensor]) -> Callable[[Path], Any]:
    own = _own_storage(tensors)
    return lambda file: save_file(own, file, metadata={"format": "pt"})


def text_writer(text: str) -> Callable[[Path], Any]:
    return lambda file: file.write_text(text, encoding="utf-8")


def _own_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as safetensors wants them."""
    seen: set[int] = set()
    result = {}
    for key, value in tensors.items():
        if is_sharded(value):
            raise ValueError(
                f"{key}: is sharded; gather it on all ranks and pass state_dict=..., with keys as "
                "in model.state_dict()"
            )
        value = value.detach().cpu().contiguous()
        pointer = value.untyped_storage().data_ptr()
        result[key] = value.clone() if pointer in seen else value
        seen.add(pointer)
    return result


def write_together(writers: Mapping[Path, Callable[[Path], Any]]) -> None:
    """Write every file beside its place, then move them all in."""
    suffix = f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
    drafts = {place: place.with_name(f".{place.name}{suffix}") for place in writers}
    try:
        for place, write in writers.items():
            write(drafts[place])
            with open(drafts[place], "rb+") as file:
                os.fsync(file.fileno())
        for place, draft in drafts.items():
            os.replace(draft, place)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"could not write {place}: {error}. Free some space or choose another folder"
        ) from error
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)


def safetensors_size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a safetensors file: the header's length, the header in whole words, the values."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        kind = _SAFETENSORS.get(tensor.dtype) or str(tensor.dtype).removeprefix("torch.").upper()
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + end
