"""Triton's kernels under compute-sanitizer: no access out of bounds, no race in shared memory, no barrier that some miss."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("sanitized_kernels.py")
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("tool", ["memcheck", "synccheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer here")
    path = os.pathsep.join(filter(None, (str(PROGRAM.parents[2]), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # Compiled into Triton's cache first: under the sanitizer that takes several times as long.
    subprocess.run([sys.executable, str(PROGRAM)], check=True, env=environment, timeout=300)
    result = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, str(PROGRAM)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    told = [line for line in result.stdout.splitlines() if "Host Frame" not in line]
    assert result.returncode == 0, "\n".join(told)[:3000] + result.stderr[-1000:]
    for op in ("segment_linear", "segment_gemm", "segment_up", "scaled_gemm", "bottleneck_up"):
        assert f"'{op}'" in result.stdout
