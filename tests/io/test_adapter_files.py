"""Adapter files: written here and read by stock peft, the reverse, and the ways a file is bad."""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora
from fastlora import LoraConfig
from fastlora.layers import TrainableCopy
from tests.tiny_models import (
    assert_unchanged,
    logits,
    plain_net,
    randomize_adapters,
    snapshot,
    some_ids,
    tiny_llama,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def llama() -> Any:
    return tiny_llama(attention_bias=True)


CASES = {
    "llama": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "llama all-linear": (llama, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "llama lm_head": (llama, {"target_modules": ["lm_head", "v_proj"], "use_rslora": True}),
    "llama patterns": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {r"layers\.1.*": 3},
        },
    ),
    "llama bias all": (llama, {"target_modules": ["q_proj"], "bias": "all"}),
    "llama bias lora_only": (llama, {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "llama saved": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "llama pissa": (llama, {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}),
    "llama olora": (llama, {"target_modules": ["q_proj"], "init_lora_weights": "olora"}),
    "llama dora": (llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "llama dora pissa": (
        llama,
        {"target_modules": ["q_proj"], "use_dora": True, "init_lora_weights": "pissa"},
    ),
    "llama lora_bias": (llama, {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "llama orthogonal": (
        llama,
        {"target_modules": ["v_proj"], "init_lora_weights": "orthogonal"},
    ),
    "plain": (plain_net, {"target_modules": ["up", "down"]}),
    "plain dora, bias all": (
        plain_net,
        {"target_modules": ["up", "down"], "use_dora": True, "bias": "all", "lora_dropout": 0.1},
    ),
    "plain bias all, saved": (
        plain_net,
        {"target_modules": ["up"], "bias": "all", "modules_to_save": ["head"]},
    ),
    "plain layers": (
        plain_net,
        {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
}


def train_everything_a_little(model: nn.Module) -> None:
    """Every trained parameter moves by name, alike in both libraries."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters(), key=lambda item: canonical(item[0])):
            if p.requires_grad:
                assert "original_module" not in name
                p.add_(torch.randn(p.shape, generator=generator).to(p) * 0.1)


def canonical(name: str) -> str:
    name = name.replace("lora_B.default.bias", "lora_bias.default")
    return name.replace(".base_layer", "").replace("default.weight", "default")


def ours(case: str) -> tuple[fastlora.PeftModel, Any]:
    build, settings = CASES[case]
    model = fastlora.get_peft_model(build(), LoraConfig(r=4, lora_alpha=8, **settings))
    train_everything_a_little(model)
    return model.eval(), build


def theirs(case: str) -> tuple[Any, Any]:
    build, settings = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, lora_alpha=8, **settings)
        model = peft.get_peft_model(build(), config)
    train_everything_a_little(model)
    return model.eval(), build


def test_stock_peft_reads_ours_without_a_warning(tmp_path: Path) -> None:
    """What it reads and computes of every configuration is tests/interop's."""
    model, build = ours("llama")
    fastlora.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)  # peft against newer transformers
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        stock = peft.PeftModel.from_pretrained(build(), tmp_path)
    # "identical": PEFT sums base and update in two roundings, lora_linear in one.
    torch.testing.assert_close(
        logits(stock, some_ids()), logits(model, some_ids()), atol=2e-6, rtol=2e-6
    )
    assert not torch.allclose(logits(model, some_ids()), logits(build(), some_ids()), atol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_exact(case: str, tmp_path: Path) -> None:
    model, build = ours(case)
    fastlora.save_adapter(model, tmp_path)
    again = fastlora.load_adapter(build(), tmp_path, is_trainable=True)
    assert again.trainable_record() == model.trainable_record()
    fastlora.save_adapter(again, tmp_path / "again")
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    first, second = load_file(tmp_path / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(logits(again.eval(), some_ids()), logits(model, some_ids()))


def test_record_of_what_is_trained_is_written(tmp_path: Path) -> None:
    model, _ = ours("llama saved")
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "trainable_parameters.json").read_text())
    assert record["parameters"] == model.trainable_record()
    assert [record["trainable"], record["total"]] == list(model.get_nb_trainable_parameters())
    assert any(
        e["name"].endswith("lm_head.modules_to_save.default.weight") for e in record["parameters"]
    )


def test_other_adapter_names_live_in_a_sub_folder(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"])
    model = fastlora.get_peft_model(llama(), config, "poems")
    randomize_adapters(model)
    fastlora.save_adapter(model, tmp_path, "poems")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["poems"]
    stock = peft.PeftModel.from_pretrained(llama(), tmp_path / "poems", adapter_name="poems")
    torch.testing.assert_close(logits(stock, some_ids()), logits(model, some_ids()))
    for folder in (tmp_path, tmp_path / "poems"):
        again = fastlora.load_adapter(llama(), folder, "poems")
        assert torch.equal(logits(again, some_ids()), logits(model, some_ids()))
    with pytest.raises(ValueError, match=r"'default'.*poems"):
        fastlora.save_adapter(model, tmp_path)


def test_filling_an_existing_adapter(tmp_path: Path) -> None:
    source, build = ours("llama")
    source.save_pretrained(tmp_path)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    model = fastlora.get_peft_model(build(), config).train()
    trained = model.trainable_record()
    assert fastlora.load_adapter(model, tmp_path) is model
    assert model.trainable_record() == trained
    assert model.training
    assert torch.equal(logits(model.eval(), some_ids()), logits(source, some_ids()))
    fastlora.load_adapter(model, tmp_path, is_trainable=False)
    assert model.trainable_record() == []
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert model.trainable_record() == trained
    assert isinstance(type(model).from_pretrained(build(), tmp_path), fastlora.PeftModel)


def test_resized_embeddings_that_peft_saved_are_read(tmp_path: Path) -> None:
    """PEFT stores both embeddings whole when the vocabulary grew."""
    stock, _ = theirs("llama")
    grown = stock.get_base_model()
    torch.manual_seed(1)
    grown.resize_token_embeddings(100)
    stock.save_pretrained(tmp_path, save_embedding_layers=True)
    base = llama()
    base.resize_token_embeddings(100)
    model = fastlora.load_adapter(base, tmp_path)
    ids = torch.tensor([[98, 3, 99, 97]])
    torch.testing.assert_close(logits(model, ids), logits(stock, ids), atol=2e-6, rtol=2e-6)
    small = llama()
    before = snapshot(small)
    with pytest.raises(ValueError, match=r"embed_tokens|lm_head"):
        fastlora.load_adapter(small, tmp_path)
    assert_unchanged(small, before)


def test_dtypes_are_cast_to_the_models(tmp_path: Path) -> None:
    model, build = ours("plain")
    model.save_pretrained(tmp_path)
    tensors = {k: v.to(torch.bfloat16) for k, v in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    again = fastlora.load_adapter(build(), tmp_path)
    key = "base_model.model.layers.0.up.lora_A.default"
    assert torch.equal(again.state_dict()[key], model.state_dict()[key].bfloat16().float())


# Bad files.


def saved(tmp_path: Path) -> Path:
    ours("plain bias all, saved")[0].save_pretrained(tmp_path)
    return tmp_path / WEIGHTS


def rewrite(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def corrupt(file: Path) -> None:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return corrupt


A_KEY = "base_model.model.layers.0.up.lora_A.weight"


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[A_KEY]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.layers.7.up.lora_A.weight"] = torch.zeros(4, 24)


def traverse(tensors: dict[str, torch.Tensor]) -> None:
    tensors["../../etc/passwd"] = torch.zeros(1)


def base_weight(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.layers.0.up.weight"] = torch.zeros(40, 24)


def wrong_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[A_KEY] = tensors[A_KEY][:, :-1].contiguous()


def wrong_rank(tensors: dict[str, torch.Tensor]) -> None:
    tensors[A_KEY] = torch.zeros(5, 24)


def scalar(tensors: dict[str, torch.Tensor]) -> None:
    tensors[A_KEY] = torch.tensor(1.0)


def integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors[A_KEY] = torch.zeros(4, 24, dtype=torch.int64)


def last_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.head.bias"] = torch.zeros(3)


def header(text: bytes, length: int | None = None) -> Callable[[Path], None]:
    def corrupt(file: Path) -> None:
        body = struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * 64
        file.write_bytes(body)

    return corrupt


def truncate(size: int) -> Callable[[Path], None]:
    return lambda file: os.truncate(file, size)


OVERLAP = json.dumps({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]}}).encode()


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (truncate(0), "not a whole safetensors"),
        (truncate(4), "not a whole safetensors"),
        (truncate(200), "not a whole safetensors"),
        (lambda file: os.truncate(file, file.stat().st_size - 8), "not a whole safetensors"),
        (header(b"{}", 2**63), "not a whole safetensors"),
        (header(b"{}", 2**64 - 1), "not a whole safetensors"),
        (header(b'{"a": NaN}'), "not a whole safetensors"),
        (header(b"not json"), "not a whole safetensors"),
        (header(b"[" * 5000), "not a whole safetensors"),
        (header(OVERLAP), "not a whole safetensors"),
        (lambda file: file.write_bytes(os.urandom(4096)), "not a whole safetensors"),
        (rewrite(drop), "lacks 1 .*layers.0.up.lora_A"),
        (rewrite(add), "unknown 1 .*layers.7"),
        (rewrite(traverse), "etc/passwd"),
        (rewrite(base_weight), "unknown 1 .*up.weight"),
        (rewrite(wrong_shape), r"lora_A.*\(4, 23\).*\(4, 24\)"),
        (rewrite(wrong_rank), r"\(5, 24\)"),
        (rewrite(scalar), r"shape \(\)"),
        (rewrite(integers), "int64"),
        (rewrite(last_one), r"head\.bias"),
    ],
)
@pytest.mark.parametrize("wrapped", [True, False])
def test_bad_files_are_refused_and_change_nothing(
    tmp_path: Path, corrupt: Callable[[Path], Any], message: str, wrapped: bool
) -> None:
    corrupt(saved(tmp_path))
    model: nn.Module = ours("plain bias all, saved")[0] if wrapped else plain_net().train()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as caught:
        fastlora.load_adapter(model, tmp_path)
    assert len(str(caught.value)) < 700
    assert_unchanged(model, before)


def test_adapters_of_another_scaling_or_name_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    settings = {"target_modules": ["up"], "bias": "all", "modules_to_save": ["head"]}
    model = fastlora.get_peft_model(plain_net(), LoraConfig(r=4, lora_alpha=16, **settings))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"lora_alpha=8.*16"):
        fastlora.load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="other"):
        fastlora.load_adapter(model, tmp_path, "other")
    with pytest.raises(ValueError, match="adapter_name"):
        fastlora.load_adapter(model, tmp_path, "../default")
    assert_unchanged(model, before)


def test_missing_files_and_pickles_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        fastlora.load_adapter(plain_net(), tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=CONFIG):
        fastlora.load_adapter(plain_net(), tmp_path)
    file = saved(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        fastlora.load_adapter(plain_net(), tmp_path)
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled"):
        fastlora.load_adapter(plain_net(), tmp_path)


def test_a_file_for_another_model_is_refused(tmp_path: Path) -> None:
    ours("llama")[0].save_pretrained(tmp_path)
    model = plain_net()
    before = snapshot(model)
    with pytest.raises(ValueError, match="matches no module"):
        fastlora.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_stock_peft_models_are_sent_to_their_own_method(tmp_path: Path) -> None:
    model, _ = theirs("plain")
    with pytest.raises(TypeError, match=r"save_pretrained"):
        fastlora.save_adapter(fastlora.accelerate(model), tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="accelerate"):
        fastlora.load_adapter(model, tmp_path)
    with pytest.raises(TypeError, match="str"):
        fastlora.load_adapter("model", tmp_path)


# Writing.


def test_a_write_that_fails_leaves_the_old_files(tmp_path: Path) -> None:
    model, _ = ours("plain bias all, saved")
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    randomize_adapters(model, seed=99)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:  # the kernel refuses every byte past 4096, as a full disk would
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(OSError, match="could not write"):
            model.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    model.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() != before[WEIGHTS]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(before)


def test_refused_ways_of_saving(tmp_path: Path) -> None:
    model, _ = ours("plain")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="safetensors"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match="modules_to_save"):
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(ValueError, match="other"):
        model.save_pretrained(tmp_path, selected_adapters=["other"])
    with pytest.raises(ValueError, match="lacks"):
        model.save_pretrained(tmp_path, state_dict={})
    model.save_pretrained(tmp_path / "new", is_main_process=False)
    assert not (tmp_path / "new").exists()


def test_a_gathered_state_dict_is_written_instead(tmp_path: Path) -> None:
    model, _ = ours("plain")
    gathered = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    assert all(not value.any() for value in load_file(tmp_path / WEIGHTS).values())


def test_shared_and_strided_parameters_are_written_whole(tmp_path: Path) -> None:
    model, build = ours("plain")
    layers = model.get_base_model().layers
    shared = layers[0]["up"].lora_A["default"]
    layers[1]["up"].lora_A["default"] = shared
    layers[0]["down"].lora_B["default"] = nn.Parameter(torch.randn(4, 24).t())
    model.save_pretrained(tmp_path)
    again = fastlora.load_adapter(build(), tmp_path)
    assert torch.equal(logits(again, some_ids()), logits(model, some_ids()))


def test_saved_modules_with_buffers(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))

    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    model = fastlora.get_peft_model(build(), config).train()
    model(torch.randn(16, 6) + 3)
    assert isinstance(model.get_base_model()[1], TrainableCopy)
    model.eval().save_pretrained(tmp_path)
    x = torch.randn(4, 6)
    again = fastlora.load_adapter(build(), tmp_path)
    assert torch.equal(again(x), model(x))
    stock = peft.PeftModel.from_pretrained(build(), tmp_path)
    torch.testing.assert_close(stock(x), model(x))


@pytest.mark.parametrize("kind", [["LORA"], {}, None, 5], ids=str)
def test_a_method_that_is_no_name_is_refused_by_that_name(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "r": 2}))
    with pytest.raises(ValueError, match=r"adapter_config.json: peft_type: got .* accepted is"):
        fastlora.load_adapter(tiny_llama(), tmp_path)
