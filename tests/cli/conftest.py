"""A model and a tokenizer small enough to train in a second, and the command line run in this
process.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.tiny_tokenizer import make_tokenizer

VERSES = [
    "When forty winters shall besiege thy brow,",
    "And dig deep trenches in thy beauty's field,",
    "Thy youth's proud livery, so gazed on now,",
    "Will be a tattered weed of small worth held.",
]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with its tokenizer, as transformers saves them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    tokenizer = make_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=3,
            initializer_range=0.3,  # a frozen output layer of tiny weights could say nothing with confidence
        )
    )
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "verses.txt"
    path.write_text("\n".join(VERSES * 12))
    return path


@pytest.fixture
def general(tmp_path: Path) -> Path:
    """Text unlike the verses: what a model may forget over them."""
    path = tmp_path / "general.txt"
    path.write_text(
        "The ship sailed from the harbour at dawn with its cargo of salt and iron. " * 6
    )
    return path


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write records (or raw lines) to a .jsonl file."""

    def write(*records: Any, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def fastlora_cli() -> Callable[..., Any]:
    """``fastlora ARGUMENTS`` in this process; ``.exit_code``, ``.stdout`` and ``.stderr`` of the
    result.
    """
    from fastlora.cli.app import app

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def finetune_cli(
    fastlora_cli: Callable[..., Any], model_dir: Path, text_file: Path, tmp_path: Path
) -> Any:
    """``fastlora finetune`` on the tiny model with small settings; later arguments win over
    these.
    """

    def run(*arguments: object, data: Path = text_file, output: Path = tmp_path / "run") -> Any:
        return fastlora_cli(
            "finetune",
            "--model",
            model_dir,
            "--data",
            data,
            "--output",
            output,
            "--seq-length",
            32,
            "--batch-size",
            4,
            "--r",
            4,
            "--lr",
            0.01,
            "--device",
            "cpu",
            *arguments,
        )

    return run
