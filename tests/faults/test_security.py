"""Nothing is unpickled, evaluated, run through a shell or downloaded."""

from __future__ import annotations

import ast
import re

import pytest

from tests.faults.common import ROOT

SOURCES = sorted(
    path
    for folder in ("fastlora", "benchmarks", "examples", "csrc")
    for path in (ROOT / folder).rglob("*.py")
)
SOURCES.append(ROOT / "setup.py")
BUILD = [
    path
    for path in (ROOT / "setup.py", ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*"))
    if path.suffix in (".py", ".txt", ".cmake")
]

UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
REFUSED_CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "extractall"}
REFUSED_ARGUMENTS = {"shell": True, "allow_pickle": True, "trust_remote_code": True}


def problems(source: str) -> list[str]:
    """What in ``source`` runs other people's data as code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names = names if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"imports {name}" for name in names if name.split(".")[0] in UNPICKLERS]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        arguments = {
            k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)
        }
        if name in REFUSED_CALLS or name.split(".")[-1] == "extractall":
            found.append(f"calls {name}")
        if name == "torch.load" and arguments.get("weights_only") is not True:
            found.append("calls torch.load without weights_only=True")
        found += [
            f"passes {key}={value}"
            for key, value in REFUSED_ARGUMENTS.items()
            if arguments.get(key) is value
        ]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_data_as_code(path):
    assert problems(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "eval(text)",
        "os.system(command)",
        "subprocess.run(command, shell=True)",
        "np.load(file, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "tarfile.open(name).extractall(folder)",
    ],
)
def test_and_the_search_finds_what_it_looks_for(line):
    assert len(problems(line)) == 1
    assert problems("torch.load(file, weights_only=True); subprocess.run([a, b])") == []


DOWNLOADS = re.compile(
    r"FetchContent|ExternalProject|file\s*\(\s*DOWNLOAD|urllib|urlopen|requests\.|https?://|git\s+clone"
)


@pytest.mark.parametrize("path", BUILD, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_build_downloads_nothing(path):
    code = "\n".join(
        line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")
    )
    assert not DOWNLOADS.search(code)


def test_there_is_something_to_read():
    assert len(SOURCES) > 40 and len(BUILD) >= 3
