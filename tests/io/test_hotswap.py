"""Hot-swapping: another adapter in the same memory, under torch.compile without compiling again, in a captured graph."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import fastlora
from fastlora import LoraConfig, hotswap_adapter, prepare_hotswap
from tests.tiny_models import logits, plain_net, randomize_adapters, some_ids, tiny_llama

SMALL: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["up", "down"]}
LARGE: dict[str, Any] = {
    "r": 7,
    "lora_alpha": 2,
    "use_rslora": True,
    "target_modules": ["up", "down"],
}


def made(seed: int, **config: Any) -> fastlora.PeftModel:
    model = fastlora.get_peft_model(plain_net(), LoraConfig(**config))
    randomize_adapters(model, seed)
    return model


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {"small": made(1, **SMALL), "large": made(2, **LARGE)}
    found["less"] = made(3, **{**SMALL, "r": 2, "target_modules": ["down"]})
    for name, model in found.items():
        model.save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in found}


def fresh(path: Path) -> fastlora.PeftModel:
    return fastlora.load_adapter(plain_net(), path)


def test_values_memory_and_scaling(files: dict[str, Path]) -> None:
    model, ids = made(0, **SMALL), some_ids()
    before = logits(model, ids)
    prepare_hotswap(model, 8)
    torch.testing.assert_close(logits(model, ids), before)
    places = {n: (p, p.data_ptr()) for n, p in model.named_parameters()}
    for name in ("large", "small", "less", "large"):
        hotswap_adapter(model, files[name])
        torch.testing.assert_close(logits(model, ids), logits(fresh(files[name]), ids))
        assert {n: (p, p.data_ptr()) for n, p in model.named_parameters()} == places
        assert model.peft_config["default"].r == {"large": 7, "small": 3, "less": 2}[name]


def test_saved_at_its_own_rank_and_read_by_stock_peft(
    files: dict[str, Path], tmp_path: Path
) -> None:
    model, ids = made(0, **SMALL), some_ids()
    prepare_hotswap(model, 16)
    for name in ("large", "less"):
        hotswap_adapter(model, files[name])
        model.save_pretrained(tmp_path / "again", state_dict=model.state_dict())
        theirs = peft.PeftModel.from_pretrained(plain_net(), tmp_path / "again")
        torch.testing.assert_close(logits(theirs, ids), logits(model, ids), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits(fresh(tmp_path / "again"), ids), logits(model, ids))


def test_training_leaves_the_padding_zero(files: dict[str, Path]) -> None:
    model, twin, ids = made(1, **SMALL), made(1, **SMALL), some_ids()
    prepare_hotswap(model, 8)
    for one in (model, twin):
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            logits(one, ids).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(logits(model, ids), logits(twin, ids))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            assert not parameter[3:].any()
        if "lora_B" in name:
            assert not parameter[:, 3:].any()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_again(files: dict[str, Path]) -> None:
    from torch._dynamo.testing import CompileCounter

    model, ids, counter = made(0, **SMALL), some_ids(), CompileCounter()
    prepare_hotswap(model, 8)
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        compiled(ids)
        frames = counter.frame_count
        for name in ("large", "small", "less"):
            hotswap_adapter(model, files[name])
            torch.testing.assert_close(compiled(ids), logits(fresh(files[name]), ids))
    assert counter.frame_count == frames > 0


def test_moves_and_casts_keep_the_scaling(files: dict[str, Path]) -> None:
    model = made(0, **SMALL)
    prepare_hotswap(model, 8)
    layer: Any = model.get_base_model().layers[0]["up"]  # type: ignore[index, union-attr]
    model.half()
    assert layer.scaling["default"].dtype == torch.float32
    model.float().to("meta")
    assert layer.scaling["default"].device.type == "meta"


def test_other_adapters_stay(files: dict[str, Path]) -> None:
    model, ids = made(0, **SMALL), some_ids()
    model.add_adapter("b", LoraConfig(**LARGE))
    randomize_adapters(model)
    model.set_adapter("b")
    before = logits(model, ids)
    hotswap_adapter(model, files["small"])
    assert torch.equal(logits(model, ids), before)
    assert model.active_adapters == ["b"]


def test_what_does_not_fit_changes_nothing(files: dict[str, Path], tmp_path: Path) -> None:
    model, ids = made(0, **SMALL), some_ids()
    before, config = logits(model, ids), model.peft_config["default"]
    more = made(4, **{**SMALL, "target_modules": ["up", "down", "head"]})
    more.save_pretrained(tmp_path / "more")
    made(4, **SMALL, lora_dropout=0.1).save_pretrained(tmp_path / "drops")
    made(4, **SMALL, modules_to_save=["head"]).save_pretrained(tmp_path / "copies")
    (tmp_path / "torn").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        data = (files["small"] / name).read_bytes()
        (tmp_path / "torn" / name).write_bytes(data if name.endswith("json") else data[:-9])
    bad = [
        (files["large"], "prepare_hotswap"),
        (tmp_path / "more", "no place"),
        (tmp_path / "drops", "lora_dropout"),
        (tmp_path / "copies", "no place"),
        (tmp_path / "torn", "not a whole"),
    ]
    for path, match in bad:
        with pytest.raises(ValueError, match=match):
            hotswap_adapter(model, path)
        assert torch.equal(logits(model, ids), before)
        assert model.peft_config["default"] is config
    with pytest.raises(ValueError, match="target_rank"):
        prepare_hotswap(model, 2)
    with pytest.raises(ValueError, match="target_rank"):
        prepare_hotswap(model, 0)
    with pytest.raises(ValueError, match="nobody"):
        hotswap_adapter(model, files["small"], "nobody")
    with pytest.raises(TypeError, match="PeftModel"):
        hotswap_adapter(plain_net(), files["small"])  # type: ignore[arg-type]
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        hotswap_adapter(model, files["small"])


def test_over_four_bits() -> None:
    model = fastlora.get_peft_model(
        tiny_llama(), LoraConfig(target_modules=["q_proj"], r=2, quantize="nf4")
    )
    randomize_adapters(model)
    ids = some_ids()
    before = logits(model, ids)
    prepare_hotswap(model, 5)
    torch.testing.assert_close(logits(model, ids), before)


@pytest.mark.gpu
def test_a_captured_graph_sees_the_new_adapter(files: dict[str, Path]) -> None:
    model, ids = made(0, **SMALL).cuda(), some_ids().cuda()
    prepare_hotswap(model, 8)
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(2):
            logits(model, ids)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = logits(model, ids)
    for name in ("large", "less"):
        hotswap_adapter(model, files[name])
        graph.replay()
        torch.testing.assert_close(
            out, logits(fresh(files[name]).cuda(), ids), rtol=1e-4, atol=1e-4
        )
