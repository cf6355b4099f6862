"""quantize_checkpoint and `fastlora quantize`: what they write is transformers' and bitsandbytes' own form."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fastlora
from fastlora import NF4Tensor, QLoRALinear
from fastlora.cli.app import app
from fastlora.io.quantize import quantize_checkpoint
from tests.tiny_models import tiny_llama


@pytest.fixture
def source(tmp_path):
    model = tiny_llama(dtype=torch.bfloat16, hidden_size=64, intermediate_size=128)
    folder = tmp_path / "source"
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder, model


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shard_bytes", [4 << 30, 20_000])
def test_every_bit_comes_back(source, tmp_path, double_quant, shard_bytes):
    folder, model = source
    target = tmp_path / "out" / "quantised"
    names = quantize_checkpoint(folder, target, double_quant=double_quant, shard_bytes=shard_bytes)
    assert len(names) == 14 and "lm_head" not in names
    assert (target / "model.safetensors.index.json").is_file() == (shard_bytes < 1 << 30)
    assert (target / "tokenizer.json").is_file()
    read = fastlora.load_quantized(target)
    weights = dict(model.named_parameters())
    for name, module in read.named_modules():
        if isinstance(module, QLoRALinear):
            exact = NF4Tensor.quantize(weights[f"{name}.weight"], double_quant=double_quant)
            for key, value in exact.state_dict().items():
                assert torch.equal(module.weight.state_dict()[key], value), (name, key)
    for name, value in read.named_parameters():
        if name in weights:
            assert torch.equal(value, weights[name]) and value.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("block_size", "double_quant"),
    [(64, True), (64, False), (128, True), (256, False), (4096, True)],
)
def test_transformers_and_bitsandbytes_load_it(source, tmp_path, block_size, double_quant):
    """Every bit of every layer, as they hold it."""
    pytest.importorskip("bitsandbytes")
    import transformers

    folder, model = source
    quantize_checkpoint(folder, tmp_path / "q", block_size, double_quant)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q", device_map="cpu")
    ours = fastlora.load_quantized(tmp_path / "q")
    layers = {n: m for n, m in ours.named_modules() if isinstance(m, QLoRALinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        linear = theirs.get_submodule(name)
        assert type(linear).__name__ == "Linear4bit" and linear.compute_dtype == torch.bfloat16
        held = NF4Tensor.from_bitsandbytes(linear.weight)
        exact = NF4Tensor.quantize(model.get_submodule(name).weight, block_size, double_quant)
        for read in (held, layer.weight):
            assert read.form == exact.form and read.dtype == exact.dtype
            assert read.state_dict().keys() == exact.state_dict().keys()
            for key, value in exact.state_dict().items():
                assert torch.equal(read.state_dict()[key], value), (name, key)
    for name, value in ours.state_dict().items():
        if not any(name.startswith(f"{layer}.") for layer in layers):
            assert torch.equal(theirs.state_dict()[name], value), name


class Trap:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.sprung,)


def test_a_planted_pickle_is_never_read(source, tmp_path):
    """Beside the safetensors, and in their place."""
    folder, _ = source
    sprung = tmp_path / "sprung"
    pickled = pickle.dumps(Trap(sprung))
    pickle.loads(pickled)
    assert sprung.exists()  # so it would show
    sprung.unlink()
    names = ("pytorch_model.bin", "model.pt", "pytorch_model.bin.index.json")
    for name in names:
        (folder / name).write_bytes(pickled)
    quantize_checkpoint(folder, tmp_path / "q")
    assert not any((tmp_path / "q" / name).exists() for name in names)
    for name in names:
        (tmp_path / "q" / name).write_bytes(pickled)
    fastlora.load_quantized(tmp_path / "q")
    (folder / "model.safetensors").unlink()
    (tmp_path / "q" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="incomplete"):
        quantize_checkpoint(folder, tmp_path / "r")
    with pytest.raises(FileNotFoundError, match="incomplete"):
        fastlora.load_quantized(tmp_path / "q")
    (folder / "model.safetensors").write_bytes(pickled)
    (tmp_path / "q" / "model.safetensors").write_bytes(pickled)
    with pytest.raises(ValueError, match="no whole safetensors"):
        quantize_checkpoint(folder, tmp_path / "r")
    with pytest.raises(ValueError, match="no whole safetensors"):
        fastlora.load_quantized(tmp_path / "q")
    assert not sprung.exists()


def test_the_command_line(source, tmp_path):
    folder, _ = source
    run = CliRunner().invoke
    done = run(app, ["quantize", str(folder), "-o", str(tmp_path / "q"), "--device", "cpu"])
    assert done.exit_code == 0 and "14 linears in NF4" in done.output
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert config["load_in_4bit"] and config["bnb_4bit_compute_dtype"] == "bfloat16"
    for arguments, message in (
        ([str(folder), "-o", str(tmp_path / "q")], "exists already"),
        ([str(tmp_path / "q"), "-o", str(tmp_path / "r")], "quantised already"),
        ([str(tmp_path / "no"), "-o", str(tmp_path / "r")], "does not exist"),
        ([str(folder), "-o", str(tmp_path / "r"), "--block-size", "7"], "block_size: got 7"),
    ):
        failed = run(app, ["quantize", *arguments, "--device", "cpu"])
        assert failed.exit_code != 0 and message in failed.stderr.replace("\n", " ")
    assert not (tmp_path / "r").exists()


def test_a_truncated_source_leaves_nothing(source, tmp_path):
    folder, _ = source
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="no whole safetensors"):
        quantize_checkpoint(folder, tmp_path / "q")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        quantize_checkpoint(folder, tmp_path / "q")
    assert not (tmp_path / "q").exists()
