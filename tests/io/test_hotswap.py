"""Hot-swapping: another adapter in the same memory, under torch.compile without compiling again, in a captured graph."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastlora
from fastlora import LoraConfig, hotswap_adapter, prepare_hotswap
from tests.every_method import FOUR_BITS, IN_PEFT, METHODS, Method
from tests.tiny_models import (
    assert_unchanged,
    logits,
    plain_net,
    randomize_adapters,
    snapshot,
    some_ids,
    tiny_llama,
)

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
@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"modules_to_save": ["head"]}], ids=str)
def test_a_compiled_model_is_not_compiled_again(more: dict[str, Any], tmp_path: Path) -> None:
    from torch._dynamo.testing import CompileCounter

    files = {"large": {**LARGE, **more}, "small": {**SMALL, **more}}
    files["less"] = {**files["small"], "target_modules": ["down"]}
    for name, config in files.items():
        made(3, **config).save_pretrained(tmp_path / name)
    model, ids, counter = made(0, **SMALL, **more), some_ids(), CompileCounter()
    prepare_hotswap(model, 8)
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        compiled(ids)
        frames = counter.frame_count
        for name in ("large", "small", "less"):
            hotswap_adapter(model, tmp_path / name)
            want = logits(fresh(tmp_path / name), ids)
            torch.testing.assert_close(compiled(ids), want, rtol=1e-5, atol=1e-5)
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


# Every method.

KINDS = [name for name in METHODS if name not in ("pissa", *FOUR_BITS)]


def with_rank(name: str, r: int) -> Method:
    def config() -> Any:
        made = METHODS[name].config()
        if isinstance(made, LoraConfig):
            made.r, made.lora_alpha = r, 3 * r - 1
        return made

    return METHODS[name]._replace(config=config)


def places(model: Any) -> dict[str, Any]:
    return {n: (p, p.data_ptr(), p.shape, p.requires_grad) for n, p in model.named_parameters()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_every_method_is_swapped_in_place(name: str, tmp_path: Path) -> None:
    """A slot that has another adapter then computes what stock peft does with the new one, in the same memory."""
    library: Any = peft if name in IN_PEFT else fastlora
    collapsed = name in (
        "p-mlp",
        "p-lstm",
        "prefix-mlp",
    )  # of whose networks a file has no more than the output
    for seed, r in ((5, 6), (6, 2)):
        with_rank(name, r).moved(library, seed).save_pretrained(tmp_path / str(seed))
    with_rank(name, 4).moved(library, 9).save_pretrained(tmp_path / "first")
    model, ids = with_rank(name, 4).moved(seed=9), some_ids()
    if collapsed:
        model = fastlora.load_adapter(METHODS[name].base(), tmp_path / "first")
    if model.peft_type == "LORA":
        prepare_hotswap(model, 8)
    before, first = places(model), logits(model, ids)
    for seed in ("5", "6", "5"):
        hotswap_adapter(model, tmp_path / seed)
        theirs = library.PeftModel.from_pretrained(METHODS[name].base(), tmp_path / seed).eval()
        got, want = logits(model, ids), logits(theirs, ids)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert places(model) == before
        assert (got - first).abs().max() > 1e-3
    # What is in a slot is saved as it came, for all to read.
    model.save_pretrained(tmp_path / "again")
    again, came = (tensors(tmp_path / folder) for folder in ("again", "5"))
    assert {
        k: v for k, v in came.items() if "embed_tokens.base_layer" not in k
    }.keys() == again.keys()
    assert all(torch.equal(again[key], came[key]) for key in again)
    read = library.PeftModel.from_pretrained(METHODS[name].base(), tmp_path / "again").eval()
    torch.testing.assert_close(logits(read, ids), logits(model, ids), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "state", state_dict=model.state_dict())
    assert all(torch.equal(value, again[key]) for key, value in tensors(tmp_path / "state").items())
    hotswap_adapter(model, tmp_path / "first")
    torch.testing.assert_close(logits(model, ids), first, rtol=1e-4, atol=1e-5)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    file = next(f for f in folder.glob("adapter*.safetensors") if "training" not in f.name)
    return load_file(file)


LESS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora, copies": ("LoraConfig", {"r": 2, "target_modules": ["q_proj"]}),
    "lora, rows": ("LoraConfig", {"r": 2, "target_modules": ["v_proj"], "trainable_token_indices": [15, 23, 45]}),
    "lora, embeddings": ("LoraConfig", {"r": 2, "target_modules": ["q_proj"]}),
    "dora": ("LoraConfig", {"r": 2, "target_modules": ["q_proj"], "use_dora": True}),
    "lora_bias": ("LoraConfig", {"r": 2, "target_modules": ["q_proj"], "lora_bias": True}),
    "ia3": ("IA3Config", {"target_modules": ["down_proj"], "feedforward_modules": ["down_proj"]}),
    "ln_tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LESS)
def test_modules_that_an_adapter_leaves_alone_are_the_bases(name: str, tmp_path: Path) -> None:
    kind, settings = LESS[name]
    less = METHODS[name]._replace(config=lambda: getattr(fastlora, kind)(**settings))
    less.moved(peft, seed=5).save_pretrained(tmp_path)
    model, ids = METHODS[name].moved(), some_ids()
    before = places(model)
    hotswap_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(METHODS[name].base(), tmp_path).eval()
    torch.testing.assert_close(logits(model, ids), logits(theirs, ids), rtol=1e-4, atol=1e-5)
    assert places(model) == before
    assert (logits(METHODS[name].base(), ids) - logits(model, ids)).abs().max() > 1e-3


REFUSED: dict[str, tuple[str, Any, str]] = {
    "another method": ("lora", lambda: fastlora.IA3Config(), "peft_type"),
    "dora into lora": ("lora", lambda: METHODS["dora"].config(), "use_dora"),
    "lora into dora": ("dora", lambda: METHODS["lora"].config(), "use_dora"),
    "a bias": ("lora", lambda: LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True), "lora_bias"),
    "rank": ("lora, parameters", lambda: _changed("lora, parameters", r=5), "prepare_hotswap"),
    "rank of rows": ("lora, embeddings", lambda: _changed("lora, embeddings", r=5), "prepare_hotswap"),
    "other rows": ("lora, rows", lambda: _changed("lora, rows", trainable_token_indices=[1, 2, 3]), "trainable_token_indices"),
    "rows in another order": ("lora, rows", lambda: _changed("lora, rows", trainable_token_indices=[45, 23, 15]), "trainable_token_indices"),
    "other parameters": ("lora, parameters", lambda: _changed("lora, parameters", target_parameters=["experts.down_proj"]), "target_parameters"),
    "other modules": ("ia3", lambda: fastlora.IA3Config(target_modules=["o_proj"], feedforward_modules=[]), "no place"),
    "another side": ("ia3", lambda: fastlora.IA3Config(target_modules=["k_proj"], feedforward_modules=["k_proj"]), r"accepted is \[16, 1\]"),
    "other norms": ("ln_tuning", lambda: fastlora.LNTuningConfig(target_modules=["lm_head"]), "no place"),
    "more tokens": ("prompt", lambda: fastlora.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5), "shape"),
    "another task": ("prompt", lambda: fastlora.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=4), "task_type"),
    "a network": ("p-mlp", lambda: METHODS["p-mlp"].config(), "network"),
    "another activation": ("houlsby", lambda: fastlora.HoulsbyConfig(reduction_factor=4, non_linearity="relu"), "non_linearity"),
    "another width": ("houlsby", lambda: fastlora.HoulsbyConfig(reduction_factor=8), "accepted is"),
    "other places": ("houlsby", lambda: fastlora.PfeifferConfig(reduction_factor=4, original_ln_before=False, non_linearity="swish"), "is missing"),
    "biases": ("lora", lambda: LoraConfig(r=2, target_modules=["q_proj"], bias="all"), "bias"),
}  # fmt: skip


def _changed(name: str, **changes: Any) -> Any:
    config = METHODS[name].config()
    for field, value in changes.items():
        setattr(config, field, value)
    return config


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_swap_changes_nothing(case: str, tmp_path: Path) -> None:
    name, config, match = REFUSED[case]
    METHODS[name]._replace(config=config).moved(seed=5).save_pretrained(tmp_path)
    model = METHODS[name].moved()
    before, told, where = snapshot(model), model.peft_config["default"], places(model)
    with pytest.raises(ValueError, match=match):
        hotswap_adapter(model, tmp_path)
    assert_unchanged(model, before)
    assert model.peft_config["default"] is told and places(model) == where


@pytest.mark.parametrize("name", ["lora", "ia3", "houlsby", "prompt"])
def test_a_file_without_tensors_changes_nothing(name: str, tmp_path: Path) -> None:
    model = METHODS[name].moved()
    model.save_pretrained(tmp_path)
    save_file({}, tmp_path / model.peft_config["default"].weights_name)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"has no tensors|lacks 1"):
        hotswap_adapter(model, tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "name", ["dora", "lora, parameters", "lora, copies", "ia3", "ln_tuning", "prompt"]
)
def test_a_file_that_lacks_a_tensor_changes_nothing(name: str, tmp_path: Path) -> None:
    METHODS[name].moved(seed=5).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    values = sorted(load_file(file).items())
    cut = next(i for i, (k, _) in enumerate(values) if not k.endswith(("ia3_l", "layernorm.weight", "norm.ln_tuning_layers.weight")) or name in ("ia3", "ln_tuning"))  # fmt: skip
    lost = [*values[:cut], *values[cut + 1 :]]
    if name in (
        "ia3",
        "ln_tuning",
    ):  # what an adapter without it would lack as well; of another shape, then
        lost = [(values[0][0], values[0][1].flatten()[:-1].clone()), *values[1:]]
    if name == "lora, copies":
        lost = [(k, v.long() if "lm_head" in k else v) for k, v in values]
    save_file(dict(lost), file)
    model = METHODS[name].moved()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"missing|lacks|accepted (is|are)"):
        hotswap_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_a_slot_of_experts_is_no_place_to_load_into(tmp_path: Path) -> None:
    model = METHODS["lora, parameters"].moved()
    model.save_pretrained(tmp_path)
    prepare_hotswap(model, 8)
    model.save_pretrained(tmp_path / "checkpoint-1")  # as Trainer does
    came, went = tensors(tmp_path), tensors(tmp_path / "checkpoint-1")
    assert came.keys() == went.keys() and all(torch.equal(came[key], went[key]) for key in came)
    lost = model.state_dict()
    del lost["base_model.model.model.layers.0.mlp.experts.lora_A.default"]
    with pytest.raises(ValueError, match="lacks 1"):
        model.save_pretrained(tmp_path / "lost", state_dict=lost)
    before = snapshot(model)
    with pytest.raises(ValueError, match="slot for hot-swapping"):
        model.load_adapter(tmp_path, "default")
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="LoRA adapters alone"):
        prepare_hotswap(METHODS["ia3"].make(), 8)


def test_a_base_in_four_bits_is_still_told_so(tmp_path: Path) -> None:
    model = METHODS["dora, 4 bits"].moved()
    METHODS["dora, 4 bits"].moved(seed=5).save_pretrained(tmp_path)
    before = places(model)
    hotswap_adapter(model, tmp_path)
    assert model.peft_config["default"].quantize == "nf4" and places(model) == before
    torch.testing.assert_close(logits(model, some_ids()), logits(METHODS["dora, 4 bits"].moved(seed=5), some_ids()))  # fmt: skip


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
