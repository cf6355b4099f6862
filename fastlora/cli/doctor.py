"""``fastlora doctor``: what is installed, what was compiled, what this machine can run, and whether it is right.

Runs without ``rich`` (plain tables then), and reports a torch that does not import instead of failing with it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_PACKAGES = (
    "fastlora",
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
)


def doctor_command() -> None:
    """Print versions, compiled architectures, what the devices can run, and a short self-test of every op."""
    raise SystemExit(doctor())


def doctor() -> int:
    """Print the report. Returns the exit code: 0, or 1 when torch is unusable or a self-test failed."""
    _print_pairs("Versions", versions())
    try:
        import torch
    except Exception as error:  # a broken installation raises anything
        print(
            f"torch does not import, nothing else can be looked at: {type(error).__name__}: {error}"
        )
        return 1
    from ..ops import selftest, support

    _print_pairs("Compiled ops", compiled())
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    devices = devices or [torch.device("cpu")]
    columns = ("device", "what", "memory", "compiled kernels")
    _print_table("Devices", columns, [describe(device) for device in devices])
    failures = 0
    for device in devices:
        rows = [
            (str(row["op"]), str(row["backend"]), "ok" if row["ok"] else "--", str(row["reason"]))
            for row in support.table(device)
        ]
        _print_table(f"What {device} can run", ("op", "backend", "", "why not"), rows)
        results = [*selftest.run(device), *check_dropout_mask(device)]
        failures += sum(not result["ok"] for result in results)
        _print_table(
            f"Self-test on {device}, relative error against fp64",
            ("op", "backend", "", "error", "seconds"),
            [_result_row(result) for result in results],
        )
    print("A self-test FAILED: see above." if failures else "Every self-test passed.")
    return 1 if failures else 0


def versions() -> dict[str, str]:
    """Versions of what fastlora runs on; packages are looked up, not imported."""
    found = {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "nvidia driver": driver_version(),
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def driver_version() -> str:
    """The NVIDIA driver's version as nvidia-smi tells it."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return "none found (no nvidia-smi)"
    command = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({error})"
    lines = answer.stdout.split("\n")
    return lines[0] if answer.returncode == 0 else f"unknown ({answer.stderr or lines[0]})"


def compiled() -> dict[str, str]:
    """The op library's record, and why it is not loaded where it is not."""
    import torch

    from .. import _library

    info = _library.build_info()
    facts = {"CUDA of torch": torch.version.cuda or "none (CPU build)"}
    facts["library"] = info["library"] or f"not loaded: {info['reason']}"
    if "archs" in info:
        facts["architectures"] = " ".join(info["archs"]) or "none (CPU ops only)"
        facts["built with"] = (
            f"torch {info['torch']} for torch >= {info['torch_target']}, {info['compiler']}"
        )
        facts["built with"] += f", CUDA {info['cuda']}" if info["cuda"] else ""
    facts["fastlora._core"] = (
        f"for Python {info['core']['python']}" if info["core"] else "not built"
    )
    return facts


def describe(device: torch.device) -> tuple[str, str, str, str]:
    """(device, what it is, its memory, whether the library's kernels run on it)."""
    import torch

    from .. import _library

    kernels = "yes" if _library.load(device) else "no: not built for it"
    if not _library.status().loaded:
        kernels = "no library"
    if device.type == "cpu":
        return (
            str(device),
            f"{platform.processor() or 'CPU'}, {torch.get_num_threads()} threads",
            "",
            kernels,
        )
    properties = torch.cuda.get_device_properties(device)
    what = (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.multi_processor_count} SMs"
    )
    return str(device), what, f"{properties.total_memory / 2**30:.1f} GiB", kernels


def check_dropout_mask(device: torch.device) -> list[dict[str, object]]:
    """The compiled mask op against the reference, bit for bit; nothing to check where it does not run."""
    import torch

    from .. import _library, reference

    if not _library.load(device):
        return []
    start = time.perf_counter()
    result: dict[str, object] = {"op": "mask", "backend": "compiled"}
    try:
        state = torch.tensor([0x0123456789ABCDEF, -2], dtype=torch.int64, device=device)
        keep, rows, cols = 29491, 67, 1003
        got = torch.ops.fastlora._dropout_mask(state, rows, cols, keep)
        wrong = int((got != reference.mask(state, rows, cols, keep)).sum())
        result |= {"ok": wrong == 0, "error": wrong / got.numel()}
    except Exception as failure:  # a self-test reports whatever went wrong
        result |= {"ok": False, "error": f"{type(failure).__name__}: {failure}"}
    return [result | {"seconds": time.perf_counter() - start}]


def _result_row(result: Mapping[str, object]) -> tuple[str, ...]:
    error = result["error"]
    shown = f"{error:.2e}" if isinstance(error, float) else str(error)
    return (
        str(result["op"]),
        str(result["backend"]),
        "ok" if result["ok"] else "FAILED",
        shown,
        f"{result['seconds']:.2f}",
    )


def _print_pairs(title: str, pairs: Mapping[str, str]) -> None:
    _print_table(title, ("", ""), list(pairs.items()))


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_justify="left", show_header=any(columns))
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*row)
        Console(markup=False, highlight=False).print(table)
        return
    print(f"\n{title}")
    shown = [columns, *rows] if any(columns) else rows
    widths = [max(len(line[i]) for line in shown) for i in range(len(columns))]
    for line in shown:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
