"""A program under compute-sanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def output_under(tool: str, program: Path) -> str:
    """What a Python program prints under a tool that finds nothing. Skips where there is no compute-sanitizer."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer here")
    result = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, str(program)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
    )
    told = [line for line in result.stdout.splitlines() if "Host Frame" not in line]
    assert result.returncode == 0, "\n".join(told)[:3000] + result.stderr[-1000:]
    assert "ran all" in result.stdout
    return result.stdout
