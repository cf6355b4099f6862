"""Runs nvcc for the Hopper kernels and fails where ptxas says that their main loops cannot be fast.

    python ptxas_check.py nvcc ... -Xptxas -v ...

CMake puts it in front of the compiler (CUDA_COMPILER_LAUNCHER). Two things end the build, both invisible in tests and
ruinous in time: wgmma that ptxas serialises (messages C7510 to C7519), and registers spilled to memory.
``FASTLORA_ALLOW_SLOW_KERNELS=1`` reports them and goes on, for a toolkit that these kernels were not tuned with.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

SERIALISED = re.compile(r"\(C75\d\d\)")
FUNCTION = re.compile(r"Compiling entry function '(\w+)'|in the function '(\w+)'")
SPILL = re.compile(r"([1-9]\d*) bytes spill stores")


def faults(output: str) -> list[str]:
    """What is wrong with the kernels, a line each, from the output of ``ptxas -v``."""
    found = []
    kernel = "?"
    for line in output.splitlines():
        named = FUNCTION.search(line)
        if named:
            kernel = named[1] or named[2]
        if SERIALISED.search(line):
            found.append(f"ptxas serialises wgmma in {kernel}")
        elif spill := SPILL.search(line):
            found.append(f"{spill[1]} bytes of registers are spilled in {kernel}")
    return found


def main(command: list[str]) -> int:
    """Run ``command``; its exit code, or 1 for kernels that ptxas complains of."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    found = faults(done.stdout)
    told = [line for line in done.stdout.splitlines() if "ptxas info" not in line]
    told = [line for line in told if not re.match(r"\s+\d+ bytes (stack frame|cumulative)", line)]
    for line in [*told, *(f"fastlora: {fault}" for fault in found)]:
        print(line, file=sys.stderr)
    if found and os.environ.get("FASTLORA_ALLOW_SLOW_KERNELS", "0") in ("", "0"):
        print("fastlora: FASTLORA_ALLOW_SLOW_KERNELS=1 builds them anyway", file=sys.stderr)
        return done.returncode or 1
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
