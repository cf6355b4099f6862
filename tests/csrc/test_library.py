"""Loading the op library, and saying why it was not; what its file needs from the system."""

import os
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fastlora import _library

ROOT = Path(__file__).resolve().parents[2]
BUILT = _library.load()
needs_library = pytest.mark.skipif(not BUILT, reason=f"no op library: {_library.status().reason}")
needs_gxx = pytest.mark.skipif(not shutil.which("g++"), reason="no g++ here")


def run_python(program: str, **env: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def reason_for(monkeypatch, path: Path) -> str:
    """Why this file would not load, from a fresh start; a file that is there must also warn."""
    monkeypatch.setattr(_library, "_status", None)
    monkeypatch.setenv("FASTLORA_LIBRARY", str(path))
    with pytest.warns(UserWarning, match="compiled ops are not used"):
        assert not _library.load()
    status = _library.status()
    assert not status.loaded
    return status.reason


# ---- importing --------------------------------------------------------------------------------------------


def test_import_starts_no_cuda_and_brings_nothing_heavy():
    program = (
        "import sys, fastlora, torch\n"
        "heavy = {'triton', 'transformers', 'peft', 'matplotlib', 'datasets', 'rich', 'typer', 'fastlora._core'}\n"
        "before = set(sys.modules)\n"
        "print(sorted(heavy & before), torch.cuda.is_initialized(), fastlora._library._status)\n"
    )
    torch_alone = run_python("import sys, torch; print('triton' in sys.modules)").strip()
    assert torch_alone == "False"  # or the line below would blame us for torch's own import
    assert run_python(program).strip() == "[] False None"


def test_import_and_reference_work_without_the_library(tmp_path):
    program = (
        "import torch, fastlora, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "x, w, a, b = (torch.randn(s) for s in ((3, 8), (5, 8), (2, 8), (5, 2)))\n"
        "y = fastlora.lora_linear(x, w, a, b, scaling=2.0)\n"
        "print(torch.allclose(y, x @ w.T + 2 * x @ a.T @ b.T, atol=1e-5), fastlora.build_info()['library'])\n"
    )
    assert run_python(program, FASTLORA_LIBRARY=str(tmp_path / "none.so")).strip() == "True None"


@needs_library
def test_a_fork_after_loading_can_use_the_ops():
    program = (
        "import os, torch\n"
        "from fastlora import _library\n"
        "assert _library.load()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    ok = torch.ops.fastlora._dropout_mask(torch.tensor([1, 2]), 4, 9, 65536).all()\n"
        "    os._exit(0 if ok else 3)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    assert run_python(program).strip() == "0"


@needs_library
def test_threads_load_it_once():
    program = (
        "import threading, torch\n"
        "from fastlora import _library\n"
        "real, calls = torch.ops.load_library, []\n"
        "torch.ops.load_library = lambda path: (calls.append(path), real(path))\n"
        "start = threading.Barrier(8)\n"
        "work = lambda: (start.wait(), results.append(_library.load()))\n"
        "results = []\n"
        "threads = [threading.Thread(target=work) for _ in range(8)]\n"
        "[t.start() for t in threads], [t.join() for t in threads]\n"
        "print(len(calls), all(results), len(results))\n"
    )
    assert run_python(program).strip() == "1 True 8"


# ---- why not ------------------------------------------------------------------------------------------------


def test_a_missing_file(monkeypatch, tmp_path):
    assert "there is no such file" in reason_for(monkeypatch, tmp_path / "libfastlora.so")


def test_a_file_that_is_no_library(monkeypatch, tmp_path):
    path = tmp_path / "libfastlora.so"
    path.write_bytes(b"not a library" * 100)
    assert "invalid ELF header" in reason_for(monkeypatch, path)


@needs_library
def test_a_library_for_another_processor(monkeypatch, tmp_path):
    path = tmp_path / "libfastlora.so"
    binary = bytearray(_library._default_path().read_bytes())
    binary[18:20] = (0x15 if binary[18] != 0x15 else 0x3E).to_bytes(2, "little")  # e_machine
    path.write_bytes(binary)
    assert f"it is not a library for {platform.system()} {platform.machine()}" in reason_for(
        monkeypatch, path
    )


@needs_gxx
def test_a_missing_symbol_is_named(monkeypatch, tmp_path):
    path = tmp_path / "libfastlora.so"
    source = tmp_path / "a.cpp"
    source.write_text(
        'extern "C" int torch_function_of_the_future(); int x = torch_function_of_the_future();'
    )
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    reason = reason_for(monkeypatch, path)
    assert "undefined symbol: torch_function_of_the_future" in reason
    assert "upgrade torch" in reason


def test_a_torch_that_is_too_old(monkeypatch, tmp_path):
    path = tmp_path / "libfastlora.so"
    path.write_bytes(b"")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu130")
    assert "needs torch 2.10 or newer, this is 2.9.1+cu130" in reason_for(monkeypatch, path)


@pytest.mark.parametrize("record", ['{"archs": []}', '{"archs": [], "abi": 1}'])
def test_a_library_of_other_sources_is_refused(monkeypatch, tmp_path, record):
    """An op may mean something else there under the same name."""
    (tmp_path / "libfastlora.so").write_bytes(b"")
    (tmp_path / "libfastlora.json").write_text(record)
    assert "other sources than these: rebuild" in reason_for(
        monkeypatch, tmp_path / "libfastlora.so"
    )


def test_the_build_and_the_loader_agree_on_the_abi():
    cmake = (ROOT / "CMakeLists.txt").read_text()
    assert f'"abi": {_library.ABI},' in cmake


def test_an_install_without_binaries_tells_what_the_build_said(monkeypatch, tmp_path):
    (tmp_path / "libfastlora.json").write_text('{"skipped": "no C++ compiler found"}')
    monkeypatch.setattr(_library, "_status", None)
    monkeypatch.setattr(_library, "_default_path", lambda: tmp_path / "libfastlora.so")
    monkeypatch.delenv("FASTLORA_LIBRARY", raising=False)
    assert not _library.load()
    assert "no C++ compiler found" in _library.status().reason


# ---- which GPUs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "runs_on", "not_on"),
    [
        ("80-real", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("86-real", [(8, 6), (8, 9)], [(8, 0)]),
        ("90a-real", [(9, 0)], [(8, 9), (10, 0), (12, 0)]),
        ("100f-real", [(10, 0), (10, 3)], [(11, 0), (12, 0)]),
        ("100-real", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("90-virtual", [(9, 0), (10, 0), (12, 1)], [(8, 9)]),
        ("90a-virtual", [(9, 0)], [(10, 0)]),
    ],
)
def test_covers(arch, runs_on, not_on):
    assert all(_library.covers([arch], capability) for capability in runs_on)
    assert not any(_library.covers([arch], capability) for capability in not_on)
    assert not _library.covers([], runs_on[0])


@needs_library
def test_load_for_a_device(monkeypatch):
    assert _library.load(torch.device("cpu"))
    assert not _library.load(torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, runs in [((6, 1), False), ((9, 0), bool(_library.build_info()["archs"]))]:
        _library._runs_on.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert _library.load(torch.device("cuda", 0)) == runs
    _library._runs_on.cache_clear()


# ---- the file itself ------------------------------------------------------------------------------------------


def tool(*command: str) -> str:
    if not shutil.which(command[0]):
        pytest.skip(f"no {command[0]} here")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@needs_library
def test_links_libtorch_and_the_systems_libraries_alone():
    dynamic = tool("readelf", "-d", str(_library.status().path))
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "NEEDED" in line}
    assert "libtorch.so" in needed
    system = ("libstdc++", "libgcc_s", "libc.", "libm.", "libpthread", "libdl", "librt", "ld-linux")
    assert not [name for name in needed - {"libtorch.so"} if not name.startswith(system)]
    assert "RUNPATH" not in dynamic
    assert "RPATH" not in dynamic


@needs_library
def test_cuda_shims_are_weak_and_no_symbol_is_pythons():
    symbols = tool("nm", "-D", "--undefined-only", str(_library.status().path))
    kinds = {line.split()[-1]: line.split()[-2] for line in symbols.splitlines()}
    assert not [name for name in kinds if name.startswith(("Py", "_Py", "cuda", "cu"))]
    cuda_only = [name for name in kinds if "cuda" in name and name.startswith(("aoti_", "torch_"))]
    cuda_only.remove("aoti_torch_device_type_cuda")  # a number, known to every torch
    assert all(kinds[name] == "w" for name in cuda_only)
    assert bool(cuda_only) == bool(_library.build_info()["archs"])


@needs_library
def test_carries_no_path_of_the_building_machine():
    assert str(ROOT).encode() not in _library.status().path.read_bytes()


def test_build_info():
    info = _library.build_info()
    assert (info["library"] is None) == bool(info["reason"])
    if BUILT:
        assert info["torch_target"] == "2.10"
        assert isinstance(info["archs"], list)
    if info["core"] is not None:
        assert info["core"]["python"].split(".")[:2] == list(platform.python_version_tuple()[:2])


@needs_library
def test_python_and_cpp_can_both_define_ops_in_the_namespace():
    program = (
        "import torch\n"
        "from fastlora import _library\n"
        "lib = torch.library.Library('fastlora', 'FRAGMENT')\n"
        "lib.define('_from_python(Tensor x) -> Tensor')\n"
        "print(_library.load(), hasattr(torch.ops.fastlora, '_from_python'))\n"
    )
    assert run_python(program).strip() == "True True"


def test_status_is_kept_between_threads():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(_library.status()))
    thread.start()
    thread.join()
    assert seen == [_library.status()]
