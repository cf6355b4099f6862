"""The base model and tokenizer of a run: local files only, in the run's dtype, on its device."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str) -> torch.device:
    """``"auto"`` is CUDA where there is a GPU, else the CPU; or a torch device that exists here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--device {device!r} cannot be used here ({reason}); try auto, cpu or cuda:0"
        ) from None
    return picked


def share_cpu() -> None:
    """Use no more threads than this process may run at once.

    torch counts the machine's cores; in a container with a CPU quota the surplus threads only wait
    for each other.
    """
    allowed = (
        len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else torch.get_num_threads()
    )
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            allowed = min(allowed, max(1, int(quota) // int(period)))
    if torch.get_num_threads() > allowed:
        torch.set_num_threads(allowed)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``"auto"`` is fp32 on a CPU and bf16 on a GPU, fp16 on GPUs from before bf16."""
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def locate(model: str) -> tuple[Path, str | None]:
    """``(directory, name of the .gguf file in it or None)`` of a ``--model`` path."""
    path = Path(model)
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, path.name
    if not path.is_dir():
        kind = "is not a .gguf file or a directory" if path.exists() else "does not exist"
        raise InputError(
            f"--model {model} {kind}: give a local transformers directory or a .gguf file"
        )
    if (path / "config.json").is_file():
        return path, None
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return path, ggufs[0].name
    raise InputError(
        f"--model {model} has no config.json"
        + (f" and {len(ggufs)} .gguf files: name one of them" if ggufs else " and no .gguf file")
    )


def fingerprint(model: str) -> dict[str, int]:
    """Names and sizes of the weight files, for a resumed run to compare; hashes would take long."""
    directory, gguf = locate(model)
    files = [directory / gguf] if gguf else sorted(directory.glob("*.safetensors"))
    return {file.name: file.stat().st_size for file in files}


def quantization(model: str) -> str | None:
    """How the weights in a ``--model`` directory are quantised, by its config.json; None: they are floats.

    A .gguf file's are made floats when it is loaded.
    """
    directory, gguf = locate(model)
    if gguf is not None:
        return None
    how = read_config(directory).get("quantization_config")
    return str(how.get("quant_method", "in some way")) if isinstance(how, dict) else None


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a model."""
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"--model {directory}: its config.json cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise InputError(f"--model {directory}: its config.json holds no JSON object")
    return config


def load_tokenizer(model: str) -> Any:
    """The tokenizer beside (or inside) the model."""
    from transformers import AutoTokenizer

    directory, gguf = locate(model)
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(directory, gguf_file=gguf, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for an unusable directory
        raise InputError(f"no usable tokenizer in --model {model}: {_brief(error)}") from error


def pad_id(tokenizer: Any) -> int:
    """What rows are filled up with; any token will do, for nothing looks at it."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def load_model(model: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A causal language model, frozen, in ``dtype`` on ``device``. A .gguf file is dequantized."""
    from transformers import AutoModelForCausalLM

    directory, gguf = locate(model)
    try:
        with quiet_transformers():
            with contextlib.suppress(ImportError):
                import peft  # noqa: F401  (needed later; its optional parts talk while they load)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory, gguf_file=gguf, dtype=dtype, local_files_only=True
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise InputError(
            f"--model {model} cannot be loaded as a causal language model: {_brief(error)}"
        ) from error
    loaded.requires_grad_(False)
    return loaded.to(device)


def _brief(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers; errors still come through."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging_level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging_level)
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


class CausalLM:
    """A causal language model as the loop calls it: ids and positions in, logits out.

    Whether ``forward`` takes ``position_ids`` and ``use_cache`` differs; this looks once.
    """

    def __init__(self, model: Any, base: Any, cast_to: torch.dtype | None = None) -> None:
        """``model`` is called, under autocast to ``cast_to`` if given; ``base``, the model it wraps, tells the signature."""
        self.model, self.cast_to = model, cast_to
        self.vocabulary = int(base.get_input_embeddings().weight.shape[0])
        accepted = inspect.signature(base.forward).parameters
        self.takes_positions = "position_ids" in accepted
        # A cache would hide from transformers that several documents share a row.
        self.fixed = {"use_cache": False} if "use_cache" in accepted else {}

    def logits(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """int64 [B, S] twice -> [B, S, V] in the dtype that the model computes in. Virtual tokens in front get none."""
        positions = {"position_ids": position_ids} if self.takes_positions else {}
        with self._casting(input_ids.device):
            logits: torch.Tensor = self.model(input_ids=input_ids, **positions, **self.fixed).logits
        return logits[:, -input_ids.shape[1] :]

    def _casting(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        if self.cast_to is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, self.cast_to)


@torch.no_grad()
def keeps_documents_apart(lm: CausalLM, device: torch.device) -> bool:
    """Whether a document packed behind another gets the logits it gets alone; asks the model.

    Models differ (attention kernels, state-space layers, models without ``position_ids``), so the
    second of two short documents is compared with itself alone; what it gets as the first one's
    continuation tells a leak from rounding.
    """
    ids = torch.arange(1, 13, device=device)[None] % lm.vocabulary
    positions = torch.arange(12, device=device)[None]
    was_training = lm.model.training
    lm.model.eval()
    alone = lm.logits(ids[:, 6:], positions[:, :6])
    packed = lm.logits(ids, positions % 6)[:, 6:]
    leaking = lm.logits(ids, positions)[:, 6:]
    lm.model.train(was_training)

    def distance(logits: torch.Tensor) -> float:
        return float((logits.float() - alone.float()).abs().mean())

    return distance(packed) <= 0.25 * distance(leaking)
