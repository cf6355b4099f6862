"""4-bit weights in a safetensors checkpoint, under the keys that transformers and bitsandbytes write.

    <m>.weight                                  uint8 (or another dtype of the same bytes) [ceil(N K / 2), 1]
    <m>.weight.absmax                           fp32 [blocks], or uint8 codes of scales
    <m>.weight.quant_map                        fp32 [16], the values of the codes
    <m>.weight.nested_absmax, .nested_quant_map fp32 [ceil(blocks / nested_blocksize)] and [256], where scales are codes
    <m>.weight.quant_state.bitsandbytes__nf4    uint8, a JSON text: dtype, shape, blocksize, nested_offset, ...

Nothing of it is trusted: a value that does not fit the others is an error that names its key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import reference
from .nf4_tensor import NF4Tensor

_STATE = ".weight.quant_state.bitsandbytes__"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MOST_STATE_BYTES = 1 << 16


def quantized_names(keys: Iterable[str]) -> dict[str, str]:
    """Module name -> "nf4" or "fp4", for every 4-bit weight of a checkpoint with these keys.

    Raises:
        ValueError: a type that is not read.
    """
    found = {}
    for key in keys:
        name, state, kind = key.partition(_STATE)
        if state:
            if kind not in ("nf4", "fp4"):
                raise ValueError(f"{key}: quantised as {kind!r}; read are 'nf4' and 'fp4'")
            found[name] = kind
    return found


def keys_of(name: str, kind: str) -> Iterator[str]:
    """All keys that may belong to the 4-bit weight of module ``name``."""
    yield f"{name}.weight"
    for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"):
        yield f"{name}.weight.{part}"
    yield f"{name}{_STATE}{kind}"


def read_weight(get: Callable[[str], Tensor | None], name: str, kind: str) -> NF4Tensor:
    """The 4-bit weight of module ``name``; ``get`` gives the tensor under a key, or None.

    Raises:
        ValueError: a tensor is missing, or does not fit the others; the message names its key.
    """

    def want(key: str) -> Tensor:
        tensor = get(key)
        if tensor is None:
            raise ValueError(f"{key}: missing; the checkpoint is incomplete, download it again")
        return tensor

    state_key = f"{name}{_STATE}{kind}"
    state = _parse(state_key, want(state_key))
    block_size, shape, dtype = state["blocksize"], state["shape"], state["dtype"]
    map_key = f"{name}.weight.quant_map"
    values = want(map_key)
    if not torch.equal(values.float().cpu(), reference.code_values(kind == "fp4")):
        raise ValueError(f"{map_key}: holds a code of its own; read is {kind}'s")
    codes = want(f"{name}.weight").contiguous().view(-1).view(torch.uint8)
    scales: tuple[Tensor, ...] = (want(f"{name}.weight.absmax").view(-1),)
    nested = 0
    if "nested_offset" in state:
        nested = state["nested_blocksize"]
        offset = torch.tensor([state["nested_offset"]], dtype=torch.float32, device=codes.device)
        parts = (want(f"{name}.weight.{part}") for part in ("nested_absmax", "nested_quant_map"))
        scales = (*scales, *(t.float().view(-1) for t in parts), offset)
    else:
        scales = (scales[0].float(),)
    used = codes[: -(-math.prod(shape) // 2)]  # wider storage pads the last element
    try:
        return NF4Tensor(used, scales, shape, dtype, block_size, nested, kind)
    except ValueError as error:
        raise ValueError(f"{name}.weight: {error}") from error


def _parse(key: str, tensor: Tensor) -> dict[str, Any]:
    """The state under ``key``, checked: blocksize, shape, dtype; nested_blocksize, nested_offset where scales are codes."""

    def wrong(what: str) -> ValueError:
        return ValueError(f"{key}: {what}; the checkpoint is damaged or of another format")

    if tensor.dtype != torch.uint8 or tensor.ndim != 1 or tensor.numel() > _MOST_STATE_BYTES:
        raise wrong(f"got {tensor.dtype} {tuple(tensor.shape)}, expected bytes of a JSON text")
    try:
        state = json.loads(bytes(tensor.cpu().tolist()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise wrong(f"is no JSON text ({error})") from None
    if not isinstance(state, dict):
        raise wrong(f"is a JSON {type(state).__name__}")
    shape = state.get("shape")
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(type(size) is int and 0 < size < 2**31 for size in shape)
    ):
        raise wrong(f"shape is {shape!r}, expected [N, K]")
    if not isinstance(state.get("dtype"), str) or state["dtype"] not in _DTYPES:
        raise wrong(f"dtype is {state.get('dtype')!r}, expected one of {', '.join(_DTYPES)}")
    checked = {"shape": tuple(shape), "dtype": _DTYPES[state["dtype"]]}
    checked["blocksize"] = state.get("blocksize")
    if type(checked["blocksize"]) is not int:
        raise wrong(f"blocksize is {state.get('blocksize')!r}, expected an integer")
    if "nested_blocksize" in state or "nested_offset" in state:
        offset, nested = state.get("nested_offset"), state.get("nested_blocksize")
        if type(nested) is not int or not isinstance(offset, (int, float)) or isinstance(offset, bool):  # fmt: skip
            raise wrong(f"nested_blocksize and nested_offset are {nested!r} and {offset!r}")
        if not abs(offset) <= 3.4e38:
            raise wrong(f"nested_offset is {offset!r}, beyond float32")
        checked |= {"nested_blocksize": nested, "nested_offset": float(offset)}
    return checked


def write_weight(name: str, weight: NF4Tensor) -> dict[str, Tensor]:
    """The tensors of module ``name``'s 4-bit weight under their keys, on the CPU: what ``read_weight`` reads."""
    scales = [t.detach().cpu().view(-1) for t in weight.scales]
    floats = [t.view(torch.float32) if t.dtype == torch.int32 else t for t in scales]
    kind = weight.quant_type
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": weight.block_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    tensors = {
        f"{name}.weight": weight.codes.detach().cpu().view(-1, 1),
        f"{name}.weight.absmax": floats[0],
        f"{name}.weight.quant_map": reference.code_values(kind == "fp4"),
    }
    if weight.nested_block_size:
        state |= {
            "nested_blocksize": weight.nested_block_size,
            "nested_dtype": "float32",
            "nested_offset": float(floats[3]),
        }
        tensors[f"{name}.weight.nested_absmax"] = floats[1]
        tensors[f"{name}.weight.nested_quant_map"] = floats[2]
    text = json.dumps(state).encode()
    tensors[f"{name}{_STATE}{kind}"] = torch.tensor(list(text), dtype=torch.uint8, device="cpu")
    return tensors


def open_checkpoint(folder: Path, stack: ExitStack, device: torch.device | str) -> dict[str, Callable[[str], Tensor]]:  # fmt: skip
    """Key -> what reads the tensor under it, while ``stack`` is open, of a folder in transformers' layout.

    Raises:
        FileNotFoundError: a file that the index names is missing, or lies elsewhere.
        ValueError: the index or a file is damaged.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"{index}: is no index of safetensors ({error})") from None
    where: dict[str, Callable[[str], Tensor]] = {}
    for name in names:
        path = folder / str(name)
        if path.parent != folder or not path.is_file():
            raise FileNotFoundError(f"{path}: not found; the checkpoint is incomplete")
        try:
            file = stack.enter_context(safe_open(path, "pt", device=str(device)))
        except SafetensorError as error:
            raise ValueError(f"{path}: is no whole safetensors file ({error})") from None
        where |= dict.fromkeys(file.keys(), file.get_tensor)
    return where
