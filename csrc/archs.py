"""The GPU architectures of a build: what may be asked for, and what each kernel file is compiled for.

Run by CMakeLists.txt as `python csrc/archs.py REQUEST CUDA_VERSION KIND...` (one line per KIND, for
CUDA_ARCHITECTURES) and imported by setup.py, so that a wrong list is refused before anything compiles.

REQUEST is "default" (one of every generation, and PTX for those to come), "all" (whatever this nvcc knows,
without the family forms), "none", or a list separated by spaces, commas or semicolons. An entry is a
compute capability in torch's spelling (8.0, 9.0a, 12.0+PTX) or CMake's (80, 90a-real, 120-virtual).
Without +PTX or -virtual it gets machine code only.
"""

from __future__ import annotations

import re
import sys

# Capability -> first CUDA release whose nvcc compiles for it. A suffix `a` is code for exactly that
# chip, `f` for its family; plain code also runs on later minor versions of the same major one.
KNOWN = {
    "7.5": (10, 0),
    "8.0": (11, 0), "8.6": (11, 1), "8.7": (11, 4), "8.8": (13, 0), "8.9": (11, 8),
    "9.0": (11, 8), "9.0a": (12, 0),
    "10.0": (12, 8), "10.0a": (12, 8), "10.0f": (12, 9), "10.3": (12, 9), "10.3a": (12, 9), "10.3f": (12, 9),
    "11.0": (13, 0), "11.0a": (13, 0), "11.0f": (13, 0),
    "12.0": (12, 8), "12.0a": (12, 8), "12.0f": (12, 9), "12.1": (12, 9), "12.1a": (12, 9), "12.1f": (12, 9),
}  # fmt: skip

# One of every generation; the last one also as PTX, which the driver compiles for chips to come.
DEFAULT = ("7.5", "8.0", "8.6", "8.9", "9.0a", "10.0", "12.0+PTX")

# Kind of kernel file (its name without .cu) -> the capabilities that it can be compiled for.
KINDS = {
    "simt": frozenset(KNOWN),
    "sm80": frozenset(KNOWN) - {"7.5"},
    "sm90": frozenset({"9.0a"}),
}

_ENTRY = re.compile(
    r"(?P<dotted>\d+\.\d[af]?)(?P<ptx>\+PTX)?|(?P<plain>\d{2,3}[af]?)(?P<mode>-real|-virtual)?"
)


def parse(request: str, cuda: tuple[int, int]) -> list[str]:
    """CMake architectures ("90a-real", "120-virtual") for a request, in ascending order, each once.

    Raises ValueError for an entry that is not KNOWN, or that this CUDA release cannot compile.
    """
    if request == "none":
        return []
    able = [capability for capability, since in KNOWN.items() if since <= cuda]
    if request == "all":  # nvcc refuses family code beside plain code of the same chip
        entries = [entry for entry in able if not entry.endswith("f")]
    elif request == "default":
        entries = [entry for entry in DEFAULT if entry.removesuffix("+PTX") in able]
    else:
        entries = [entry for entry in re.split(r"[\s,;]+", request) if entry]
    if not entries:
        raise ValueError(f"no CUDA architecture in {request!r}; known are {' '.join(KNOWN)}")

    found = set()
    for entry in entries:
        match = _ENTRY.fullmatch(entry)
        capability = match and (match["dotted"] or _dotted(match["plain"]))
        if not match or capability not in KNOWN:
            raise ValueError(
                f"unknown CUDA architecture {entry!r} in {request!r}; known are {' '.join(KNOWN)}, "
                "each with +PTX if wanted, or one of the words default, all, none"
            )
        if capability not in able:
            need, have = (".".join(map(str, version)) for version in (KNOWN[capability], cuda))
            raise ValueError(
                f"CUDA architecture {entry!r} needs CUDA {need} or newer; this nvcc is {have}"
            )
        if match["mode"] != "-virtual":
            found.add((capability, "real"))
        if match["mode"] == "-virtual" or match["ptx"]:
            found.add((capability, "virtual"))
    order = list(KNOWN)
    return [
        f"{capability.replace('.', '')}-{mode}"
        for capability, mode in sorted(found, key=lambda one: (order.index(one[0]), one[1]))
    ]


def for_kind(kind: str, archs: list[str]) -> list[str]:
    """Those of `archs` that kernel files of this kind are compiled for."""
    return [arch for arch in archs if _dotted(arch.split("-")[0]) in KINDS[kind]]


def _dotted(plain: str) -> str:
    """ "90a" -> "9.0a"."""
    digits, suffix = re.fullmatch(r"(\d+)([af]?)", plain).groups()  # type: ignore[union-attr]
    return f"{digits[:-1]}.{digits[-1]}{suffix}"


def main(request: str, cuda_version: str, *kinds: str) -> int:
    major, minor = map(int, cuda_version.split(".")[:2])
    try:
        archs = parse(request, (major, minor))
    except ValueError as error:
        print(f"fastlora: {error}", file=sys.stderr)
        return 1
    for kind in kinds:
        print(";".join(for_kind(kind, archs)))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
