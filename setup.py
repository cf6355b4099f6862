"""Builds the binaries with CMake and ninja; everything else about the package is in pyproject.toml.

What is built depends on the tools found, never on a GPU: nvcc and a C++ compiler give CUDA and CPU ops,
a C++ compiler alone gives CPU ops, none gives a package of Python and Triton. The environment decides:

  FASTLORA_SKIP_BUILD=1     build nothing
  FASTLORA_CUDA_ARCHS=...   architectures ("8.0 9.0a+PTX", "90a-real"), or default, all, none; next
                            TORCH_CUDA_ARCH_LIST and CMAKE_CUDA_ARCHITECTURES are looked at
  FASTLORA_NO_CORE=1        leave fastlora._core out; the wheel then fits every Python
  FASTLORA_DEBUG=1          no optimisation, debug symbols
  MAX_JOBS=n                compilers at a time (default: the CPUs this process may use)
  CXX, CUDACXX, CUDA_HOME   which compilers
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:  # --no-build-isolation leaves this check to us
    raise SystemExit(
        f"fastlora: setuptools {setuptools.__version__} is too old: pip install 'setuptools>=77' wheel"
    )

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import archs  # noqa: E402

# pip does not activate a virtual environment: cmake and ninja installed in it are beside its Python.
SEARCH_PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
BINARIES = ("libfastlora.so", "libfastlora.json", "_core.*.so")


@dataclass(frozen=True)
class BuildPlan:
    """What this build makes: `summary` is the one line it prints; `cxx` None means no binary."""

    summary: str
    cxx: str | None = None
    nvcc: str | None = None
    archs: str = "none"
    core: bool = True


def flag(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "0").strip().lower() not in ("", "0", "off", "no", "false")


def find_tool(*names: str | None, path: str = SEARCH_PATH) -> str | None:
    return next(
        (found for name in names if name and (found := shutil.which(name, path=path))), None
    )


def plan_build(env: Mapping[str, str], path: str = SEARCH_PATH) -> BuildPlan:
    """Decide from the environment and the tools on `path`. SystemExit, with a remedy, for a bad request."""
    if flag(env, "FASTLORA_SKIP_BUILD"):
        return BuildPlan("FASTLORA_SKIP_BUILD is set: no binary is built, Python and Triton only")
    cxx = find_tool(env.get("CXX"), "c++", "g++", "clang++", path=path)
    if cxx is None:
        return BuildPlan(
            "no C++ compiler found (c++, g++, clang++ or $CXX): Python and Triton only"
        )

    core = not flag(env, "FASTLORA_NO_CORE")
    names = ("FASTLORA_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CMAKE_CUDA_ARCHITECTURES")
    source = next((name for name in names if env.get(name)), None)
    request = env[source] if source else "default"
    cuda_homes = [
        f"{home}/bin/nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if (home := env.get(name))
    ]
    nvcc = find_tool(env.get("CUDACXX"), "nvcc", *cuda_homes, path=path)
    if request == "none":
        return BuildPlan(f"{source}=none: CPU ops only", cxx, core=core)
    if nvcc is None:
        if source == "FASTLORA_CUDA_ARCHS":
            raise SystemExit(
                f"fastlora: FASTLORA_CUDA_ARCHS={request!r} asks for CUDA kernels, but nvcc was not found: "
                "put it on PATH, set CUDA_HOME or CUDACXX, or unset FASTLORA_CUDA_ARCHS"
            )
        return BuildPlan("nvcc not found: CPU ops only, GPUs are served by Triton", cxx, core=core)
    try:
        chosen = archs.parse(request, cuda_version(nvcc))
    except ValueError as error:
        raise SystemExit(f"fastlora: {source or 'FASTLORA_CUDA_ARCHS'}: {error}") from None
    return BuildPlan(f"CPU and CUDA ops for {' '.join(chosen)}", cxx, nvcc, request, core)


def cuda_version(nvcc: str) -> tuple[int, int]:
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    match = re.search(r"release (\d+)\.(\d+)", text)
    if match is None:
        raise SystemExit(f"fastlora: cannot read the version of {nvcc} from:\n{text}")
    return int(match[1]), int(match[2])


def cmake(*arguments: str) -> None:
    executable = find_tool("cmake")
    if executable is None or find_tool("ninja") is None:
        raise SystemExit("fastlora: cmake and ninja are needed: pip install cmake ninja pybind11")
    command = [executable, *arguments]
    if subprocess.run(command, env={**os.environ, "PATH": SEARCH_PATH}).returncode:
        raise SystemExit(f"fastlora: this failed, its output is above: {' '.join(command)}")


class Build(build):
    # build_ext runs even without an extension: it is what says why there is none.
    sub_commands: ClassVar = [("build_py", None), ("build_ext", None)]

    def run(self) -> None:
        # A module deleted since the last build must not come along in the wheel.
        shutil.rmtree(Path(self.build_lib) / "fastlora", ignore_errors=True)
        super().run()


class BuildExt(build_ext):
    def run(self) -> None:
        print(f"fastlora: {PLAN.summary}", flush=True)
        build_dir = self.run_cmake(PLAN.cxx) if PLAN.cxx else None
        for stale in map(Path, self.get_outputs()):  # of an earlier build with other choices
            stale.unlink()
        self.package_dir.mkdir(parents=True, exist_ok=True)
        if build_dir:
            cmake("--install", str(build_dir), "--prefix", str(self.package_dir))
        else:
            record = {"version": self.distribution.get_version(), "skipped": PLAN.summary}
            (self.package_dir / "libfastlora.json").write_text(json.dumps(record, indent=2) + "\n")

    @property
    def package_dir(self) -> Path:
        in_tree = self.inplace or self.editable_mode
        return (ROOT if in_tree else Path(self.build_lib).absolute()) / "fastlora"

    def run_cmake(self, cxx: str) -> Path:
        """Configure and compile; returns the build directory."""
        try:
            import torch  # noqa: F401
        except ImportError:
            raise SystemExit(
                "fastlora: torch is needed to build the ops. Install torch first, then fastlora with "
                "`pip install --no-build-isolation`; or set FASTLORA_SKIP_BUILD=1 for Python and Triton only"
            ) from None
        # Kept between builds, so that a changed file is the only one compiled again. CMake cannot change
        # compilers in a directory, so each pair of them has its own.
        compilers = hashlib.sha256(f"{cxx} {PLAN.nvcc}".encode()).hexdigest()[:8]
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{compilers}"
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if flag(os.environ, "FASTLORA_DEBUG") else "Release",
            "CMAKE_CXX_COMPILER": cxx,
            "Python_EXECUTABLE": sys.executable,
            "FASTLORA_CUDA": "ON" if PLAN.nvcc else "OFF",
            "FASTLORA_CUDA_ARCHS": PLAN.archs,
            "FASTLORA_CORE": "ON" if PLAN.core else "OFF",
        }
        if PLAN.nvcc:
            options["CMAKE_CUDA_COMPILER"] = PLAN.nvcc
        if ccache := find_tool("ccache", "sccache"):
            options["CMAKE_CXX_COMPILER_LAUNCHER"] = options["CMAKE_CUDA_COMPILER_LAUNCHER"] = (
                ccache
            )
        define = [f"-D{name}={value}" for name, value in options.items()]
        cmake("-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja", *define)
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        cmake("--build", str(build_dir), "--parallel", jobs)
        return build_dir

    def get_outputs(self) -> list[str]:
        return [str(file) for pattern in BINARIES for file in self.package_dir.glob(pattern)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BdistWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        if PLAN.cxx and not PLAN.core:
            return "py3", "none", platform
        return python, abi, platform


if __name__ == "__main__":  # also where pip runs this file; a test imports it
    PLAN = plan_build(os.environ)
    setup(
        # Without sources, CMake knows them: it marks the wheel as a binary one.
        ext_modules=[Extension("fastlora._core", sources=[])] if PLAN.cxx else [],
        cmdclass={"build": Build, "build_ext": BuildExt, "bdist_wheel": BdistWheel},
    )
