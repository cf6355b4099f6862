"""The command line as a whole: quick, and usable where half of the installation is missing."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["finetune", "--help"], ["generate", "--help"], ["--version"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    done = python(
        f"import sys; sys.argv = ['fastlora', *{arguments!r}]\n"
        "from fastlora.cli import main\n"
        "try: main()\n"
        "except SystemExit as exit: assert not exit.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'triton', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_every_command_is_there(fastlora_cli: Any) -> None:
    listed = fastlora_cli("--help").stdout
    for command in ("finetune", "generate", "doctor", "bench"):
        assert command in listed
    assert "linear" in fastlora_cli("bench", "--help").stdout


@pytest.mark.parametrize("missing", [["transformers", "peft"], ["typer", "transformers"]])
def test_doctor_works_without(missing: list[str]) -> None:
    done = python(
        f"import sys; sys.modules.update(dict.fromkeys({missing!r})); sys.argv = ['fastlora', 'doctor']\n"
        "from fastlora.cli import main\n"
        "main()"
    )
    assert "torch" in done.stdout, done.stderr
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_typer_the_extra_is_named() -> None:
    done = python(
        "import sys; sys.modules['typer'] = None; sys.argv = ['fastlora', 'finetune']\n"
        "from fastlora.cli import main\n"
        "main()"
    )
    assert done.returncode == 2
    assert "pip install 'fastlora[cli]'" in done.stderr


def test_module_and_script_are_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastlora", "--version"], capture_output=True, text=True
    )
    assert done.stdout.startswith("fastlora ")


def test_unexpected_errors_are_one_line_unless_debugged(
    finetune_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastlora.training import run

    def broken(*_: Any) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(run, "prepare_data", broken)
    result = finetune_cli()
    assert result.exit_code == 1
    assert result.stderr == "error: KeyError: 'surprise' (--debug shows where)\n"
    assert isinstance(finetune_cli("--debug").exception, KeyError)
