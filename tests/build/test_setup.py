"""What setup.py builds for which tools and environment, then real builds through pip."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "setup.py",
    "CMakeLists.txt",
    "pyproject.toml",
    "MANIFEST.in",
    "LICENSE",
    "csrc",
    "fastlora",
)
TOOLS = (
    "g++",
    "as",
    "ld",
    "uname",
)  # what a build without nvcc needs outside the virtual environment


def _load_setup():
    spec = importlib.util.spec_from_file_location("fastlora_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


setup_py = _load_setup()


@pytest.fixture
def tools(tmp_path):
    """A PATH of our own: call it with the names of fake tools to put there."""
    folder = tmp_path / "tools"
    folder.mkdir()

    def add(*names, cuda="13.0"):
        for name in names:
            script = folder / name
            script.write_text(
                f'#!/bin/sh\necho "Cuda compilation tools, release {cuda}, V{cuda}.88"\n'
            )
            script.chmod(0o755)
        return str(folder)

    return add


def test_nvcc_and_gxx_build_everything(tools):
    path = tools("g++", "nvcc")
    plan = setup_py.plan_build({}, path)
    assert plan.cxx == f"{path}/g++"
    assert plan.nvcc == f"{path}/nvcc"
    assert plan.archs == "default"
    assert "90a-real" in plan.summary


def test_gxx_alone_builds_the_cpu_ops(tools):
    plan = setup_py.plan_build({}, tools("g++"))
    assert plan.nvcc is None
    assert plan.archs == "none"
    assert "nvcc not found" in plan.summary


def test_no_compiler_builds_nothing_even_with_nvcc(tools):
    plan = setup_py.plan_build({}, tools("nvcc"))
    assert plan.cxx is None
    assert "no C++ compiler" in plan.summary


def test_skip_build(tools):
    assert setup_py.plan_build({"FASTLORA_SKIP_BUILD": "1"}, tools("g++", "nvcc")).cxx is None
    assert setup_py.plan_build({"FASTLORA_SKIP_BUILD": "0"}, tools("g++", "nvcc")).cxx is not None


def test_architectures_in_order_of_precedence(tools):
    path = tools("g++", "nvcc")
    env = {"CMAKE_CUDA_ARCHITECTURES": "80-real"}
    assert setup_py.plan_build(env, path).archs == "80-real"
    env["TORCH_CUDA_ARCH_LIST"] = "8.6"
    assert setup_py.plan_build(env, path).archs == "8.6"
    env["FASTLORA_CUDA_ARCHS"] = "9.0a"
    assert setup_py.plan_build(env, path).archs == "9.0a"


def test_archs_none_turns_cuda_off(tools):
    assert setup_py.plan_build({"FASTLORA_CUDA_ARCHS": "none"}, tools("g++", "nvcc")).nvcc is None


@pytest.mark.parametrize(
    "name", ["FASTLORA_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CMAKE_CUDA_ARCHITECTURES"]
)
def test_unknown_architecture_is_refused_with_its_source(tools, name):
    with pytest.raises(
        SystemExit, match=rf"{name}: unknown CUDA architecture '9\.7'.*known are 7\.5 8\.0"
    ):
        setup_py.plan_build({name: "9.7"}, tools("g++", "nvcc"))


def test_architecture_newer_than_nvcc_is_refused(tools):
    with pytest.raises(SystemExit, match=r"needs CUDA 12\.8"):
        setup_py.plan_build({"FASTLORA_CUDA_ARCHS": "10.0"}, tools("g++", "nvcc", cuda="12.4"))


def test_asking_for_cuda_without_nvcc_is_refused_but_an_ambient_list_is_not(tools):
    path = tools("g++")
    with pytest.raises(SystemExit, match="nvcc was not found"):
        setup_py.plan_build({"FASTLORA_CUDA_ARCHS": "9.0a"}, path)
    assert setup_py.plan_build({"TORCH_CUDA_ARCH_LIST": "9.0a"}, path).nvcc is None


def test_nvcc_is_found_in_cuda_home(tools, tmp_path):
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    path = tools("g++", "nvcc")
    shutil.move(f"{path}/nvcc", home / "bin" / "nvcc")
    assert setup_py.plan_build({"CUDA_HOME": str(home)}, path).nvcc == f"{home}/bin/nvcc"


def test_one_version():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[
        1
    ]
    assert f'__version__ = "{version}"' in (ROOT / "fastlora" / "__init__.py").read_text()


# ---- real builds ----------------------------------------------------------------------------------------


class Tree:
    """A copy of the sources and the wheels that pip builds from it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()
        for name in SOURCES:
            source = ROOT / name
            if source.is_dir():
                ignore = shutil.ignore_patterns("*.so", "libfastlora.json", "__pycache__")
                shutil.copytree(source, root / name, ignore=ignore)
            else:
                shutil.copy(source, root / name)

    def wheel(self, path: str | None = None, **env: str) -> tuple[int, str, Path | None]:
        """(exit code, output, wheel) of `pip wheel`, with PATH replaced where one is given."""
        dist = self.root / "dist"
        shutil.rmtree(dist, ignore_errors=True)
        drop = ("CUDA", "FASTLORA", "TORCH_CUDA", "CXX", "CMAKE")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
        environment |= env | ({"PATH": path} if path else {})
        command = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-v",
            "--no-build-isolation",
            "--no-deps",
            "--no-index",
        ]
        done = subprocess.run(
            [*command, "-w", str(dist), str(self.root)],
            env=environment,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr, next(dist.glob("*.whl"), None)


def said(output: str) -> list[str]:
    """The lines in which the build says what it makes."""
    return [line.strip() for line in output.splitlines() if line.strip().startswith("fastlora: ")]


def compiled(output: str) -> list[str]:
    return re.findall(r"Building \w+ object \S*?(\w+/\w+\.(?:cpp|cu))\.o", output)


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path / "tree")


@pytest.fixture
def without_nvcc(tmp_path):
    """A PATH with a C++ compiler and nothing else."""
    if not shutil.which("g++"):
        pytest.skip("no g++ here")
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).symlink_to(shutil.which(tool))
    return str(folder)


def test_without_a_compiler_the_wheel_is_python_and_says_so_once(tree, tmp_path):
    code, output, wheel = tree.wheel(path=str(tmp_path))
    assert code == 0, output
    assert len(said(output)) == 1
    assert "no C++ compiler" in said(output)[0]
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.endswith(".so")]
    assert "no C++ compiler" in zipfile.ZipFile(wheel).read("fastlora/libfastlora.json").decode()


def test_unknown_architecture_stops_before_anything_is_compiled(tree, tools, without_nvcc):
    path = os.pathsep.join([tools("nvcc"), without_nvcc])
    code, output, wheel = tree.wheel(path=path, FASTLORA_CUDA_ARCHS="8.0 9.7")
    assert code != 0
    assert wheel is None
    assert "unknown CUDA architecture '9.7'" in output
    assert not compiled(output)


def test_a_build_that_cannot_import_torch_says_what_to_do(tree, without_nvcc, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('as in an isolated build')")
    code, output, wheel = tree.wheel(path=without_nvcc, PYTHONPATH=str(tmp_path))
    assert code != 0
    assert wheel is None
    assert "--no-build-isolation" in output
    assert not compiled(output)


@pytest.mark.slow
def test_with_gxx_alone_both_binaries_are_built_and_work(tree, without_nvcc, tmp_path):
    code, output, wheel = tree.wheel(path=without_nvcc)
    assert code == 0, output
    assert len(said(output)) == 1
    assert "nvcc not found" in said(output)[0]
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{tag}-{tag}-" in wheel.name

    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    program = (
        "import torch, fastlora\n"
        "from fastlora import _core, _library\n"
        "assert _library.load(), _library.status()\n"
        "print(torch.ops.fastlora._dropout_mask(torch.tensor([1, 2]), 2, 8, 65536).all().item())\n"
        "print(fastlora.build_info()['archs'], _core.plan(_core.Problem(1, 8, 8)).block_m > 0)\n"
        "print(_library.load(torch.device('cuda')))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split("\n")[:3] == ["True", "[] True", "False"], done.stderr

    # Without _core the same tree gives a wheel for every Python, and nothing is compiled again.
    code, output, wheel = tree.wheel(path=without_nvcc, FASTLORA_NO_CORE="1")
    assert code == 0, output
    assert "-py3-none-linux_" in wheel.name
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "_core" in name]
    assert not compiled(output)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("nvcc") and shutil.which("g++")), reason="needs nvcc and g++")
def test_with_nvcc_a_touched_kernel_is_the_only_file_compiled_again(tree):
    code, output, wheel = tree.wheel(FASTLORA_CUDA_ARCHS="8.0")
    assert code == 0, output
    assert said(output) == ["fastlora: CPU and CUDA ops for 80-real"]
    assert "dropout/simt.cu" in compiled(output)
    assert '"80-real"' in zipfile.ZipFile(wheel).read("fastlora/libfastlora.json").decode()

    os.utime(tree.root / "csrc" / "dropout" / "simt.cu")
    code, output, _ = tree.wheel(FASTLORA_CUDA_ARCHS="8.0")
    assert code == 0, output
    assert compiled(output) == ["dropout/simt.cu"]
