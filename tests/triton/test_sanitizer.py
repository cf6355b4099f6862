"""Triton's kernels under compute-sanitizer: no access out of bounds, no race in shared memory, no barrier that some miss."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlora.ops import support
from tests.compute_sanitizer import environment, output_under

PROGRAM = Path(__file__).with_name("sanitized_kernels.py")
OPS = ("segment_linear", "segment_gemm", "segment_up", "segment_wgrad", "scaled_gemm", "row_norms")
OPS += ("nf4_row_norms", "scale_columns", "scale_columns_backward", "bottleneck_down_backward")
OPS += ("bottleneck_up",)


def test_the_program_launches_what_it_is_for():
    """In Triton's interpreter where there is no GPU; on one it fills Triton's cache, for compiling under the tools takes long."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    missing = support.miss("segment_down", "triton", device, torch.float16, 16)
    if missing is not None:
        pytest.skip(missing)
    command = [sys.executable, str(PROGRAM)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(f"'{op}'" in done.stdout for op in OPS), done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "synccheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    told = output_under(tool, PROGRAM)
    assert all(f"'{op}'" in told for op in OPS), told
