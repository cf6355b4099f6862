"""``fastlora generate``: base and adapter from one seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora.training.errors import InputError
from fastlora.training.sample import Sampling, encode_prompt, generate


@pytest.fixture
def adapter(finetune_cli: Any, tmp_path: Path) -> Path:
    result = finetune_cli("--epochs", 3)
    assert result.exit_code == 0, result.output
    return tmp_path / "run" / "adapter"


@pytest.fixture
def generate_json(fastlora_cli: Any, model_dir: Path, adapter: Path) -> Any:
    def run(*arguments: object) -> dict[str, str]:
        result = fastlora_cli(
            "generate", "--model", model_dir, "--adapter", adapter, "--device", "cpu", "--json", "-n", 12, *arguments
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return run


def test_greedy_is_the_argmax_of_each_model(
    generate_json: Any, model_dir: Path, adapter: Path
) -> None:
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    got = generate_json("--prompt", "When", "--greedy")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    base = AutoModelForCausalLM.from_pretrained(model_dir)

    def argmax(model: Any) -> str:
        ids = tokenizer("When", return_tensors="pt").input_ids
        with torch.no_grad():
            for _ in range(12):
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
                if ids[0, -1] == tokenizer.eos_token_id:
                    break
        return tokenizer.decode(ids[0, 4:], skip_special_tokens=True)

    assert got["base"] == argmax(base)
    assert got["adapter"] == argmax(peft.PeftModel.from_pretrained(base, adapter))
    assert got["adapter"] != got["base"]


def test_seed_and_sampling_options(generate_json: Any) -> None:
    first = generate_json("--prompt", "When", "--seed", 5)
    assert generate_json("--prompt", "When", "--seed", 5) == first
    assert generate_json("--prompt", "When", "--seed", 6) != first
    # So small a nucleus holds one token: greedy.
    assert generate_json("--prompt", "When", "--top-p", 1e-6) == generate_json(
        "--prompt", "When", "--greedy"
    )
    cold = generate_json("--prompt", "When", "--temperature", 1e-4)
    assert cold == generate_json("--prompt", "When", "--greedy")


def test_chat_prompts_go_through_the_template(tokenizer: Any) -> None:
    ids = encode_prompt("Hi", tokenizer, chat=True)
    assert tokenizer.decode(ids[0]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_plain_output_shows_both(fastlora_cli: Any, model_dir: Path, adapter: Path) -> None:
    result = fastlora_cli(
        "generate", "--model", model_dir, "--adapter", adapter, "--prompt", "Dig", "--chat", "--greedy", "-n", 3
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (
        result.stdout.index("prompt: Dig")
        < result.stdout.index("=== base ===")
        < result.stdout.index("=== adapter")
    )


def test_sampling_leaves_the_global_generator_and_the_mode_alone(
    model_dir: Path, tokenizer: Any
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir).train()
    ids = encode_prompt("When", tokenizer, chat=False)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    generate(model, tokenizer, ids, Sampling(max_new_tokens=3))
    assert torch.equal(torch.rand(2), expected)
    assert model.training


def test_bad_input(fastlora_cli: Any, model_dir: Path, adapter: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    (torn / "adapter_model.safetensors").write_bytes(
        (adapter / "adapter_model.safetensors").read_bytes()[:-9]
    )
    for arguments, message in (
        (("--adapter", tmp_path / "nowhere"), "holds no adapter_config.json"),
        (("--adapter", torn), "does not fit --model"),
        (("--model", tmp_path / "nowhere"), "does not exist"),
        (
            ("--temperature", 0),
            "--temperature 0.0 must be above 0; for the likeliest token use --greedy",
        ),
        (("--top-p", 1.5), "--top-p 1.5 must be in (0, 1]"),
        (("--max-new-tokens", 0), "--max-new-tokens 0 must be at least 1"),
        (("--prompt", ""), "--prompt is empty"),
        (("--dtype", "int8"), "--dtype 'int8' is not one of"),
    ):
        given = {"--model": model_dir, "--adapter": adapter, "--prompt": "When", "--device": "cpu"}
        given.update([arguments])
        result = fastlora_cli("generate", *[part for pair in given.items() for part in pair])
        assert (result.exit_code, message in result.stderr) == (2, True), (arguments, result.output)
        assert "Traceback" not in result.output


def test_chat_without_a_template() -> None:
    from tests.tiny_tokenizer import make_tokenizer

    with pytest.raises(InputError, match="--chat needs a chat template"):
        encode_prompt("Hi", make_tokenizer(chat_template=None), chat=True)
