"""Many adapters on one base: added, stacked, switched, scaled, renamed, deleted, loaded, swapped; stock peft is the oracle."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastlora
from fastlora import LoraConfig
from fastlora.layers import LoRALinear, TrainableCopy
from tests.tiny_models import logits, plain_net, randomize_adapters, some_ids, tiny_llama

A = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
B = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"], "use_rslora": True}


def own(**first: Any) -> fastlora.PeftModel:
    model = fastlora.get_peft_model(tiny_llama(), LoraConfig(**{**A, **first}), adapter_name="a")
    model.add_adapter("b", LoraConfig(**B))
    randomize_adapters(model)
    return model


def stock(**first: Any) -> Any:
    config = peft.LoraConfig(**{**A, **first})
    model = peft.get_peft_model(tiny_llama(), config, adapter_name="a")
    model.add_adapter("b", peft.LoraConfig(**B))
    copy_values(own(**first), model)
    return model.eval()


def copy_values(source: nn.Module, target: nn.Module) -> None:
    values = {
        name.replace(".weight", ""): p for name, p in source.named_parameters() if ".lora_" in name
    }
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if ".lora_" in name:
                parameter.copy_(values.pop(name.replace(".weight", "")))
    assert not values


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def trained(model: nn.Module) -> list[str]:
    return sorted(
        name.replace(".weight", "") for name, p in model.named_parameters() if p.requires_grad
    )


@pytest.mark.parametrize("active", ["a", "b", ["a", "b"]], ids=str)
def test_what_is_active_computes_and_trains_as_in_peft(active: str | list[str]) -> None:
    model, theirs, ids = own(), stock(), some_ids()
    model.set_adapter(active)
    theirs.base_model.set_adapter(active)
    close(logits(model, ids), logits(theirs, ids))
    assert trained(model) == trained(theirs)
    assert model.active_adapters == theirs.active_adapters
    logits(model, ids).square().mean().backward()
    logits(theirs, ids).square().mean().backward()
    grads = {n.replace(".weight", ""): p.grad for n, p in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, grads[name.replace(".weight", "")])


def test_a_new_adapter_waits_until_it_is_set() -> None:
    model, ids = fastlora.get_peft_model(tiny_llama(), LoraConfig(**A)), some_ids()
    randomize_adapters(model)
    before, trains = logits(model, ids), trained(model)
    model.add_adapter("b", LoraConfig(**{**B, "init_lora_weights": False}))
    assert torch.equal(logits(model, ids), before)
    assert trained(model) == trains
    assert model.active_adapters == ["default"]
    model.set_adapter("b")
    assert not torch.equal(logits(model, ids), before)


def test_one_base_in_memory() -> None:
    base = tiny_llama()
    weights = {id(p) for p in base.parameters()}
    model = fastlora.get_peft_model(base, LoraConfig(**A))
    for i in range(5):
        model.add_adapter(f"x{i}", LoraConfig(**B))
    assert weights <= {id(p) for p in model.parameters()}
    rest = [p for p in model.parameters() if id(p) not in weights]
    assert sum(p.numel() for p in rest) == sum(
        p.numel() for n, p in model.named_parameters() if ".lora_" in n
    )


def test_disabling_gives_the_base_and_comes_back() -> None:
    ids = some_ids()
    plain, model = logits(tiny_llama(), ids), own()
    model.set_adapter(["a", "b"])
    both = logits(model, ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), plain)
    assert torch.equal(logits(model, ids), both)


def test_deleting_the_active_one_makes_the_first_of_the_rest_active() -> None:
    model, theirs, ids = own(), stock(), some_ids()
    with pytest.warns(UserWarning, match="'a' was active"):
        model.delete_adapter("a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.delete_adapter("a")
    assert model.active_adapters == theirs.active_adapters == ["b"]
    close(logits(model, ids), logits(theirs, ids))
    assert sorted(model.peft_config) == ["b"]
    assert not [n for n, _ in model.named_parameters() if n.endswith(".a")]
    model.delete_adapter("b")
    assert torch.equal(logits(model, ids), logits(tiny_llama(), ids))
    assert (model.active_adapters, model.peft_type) == ([], None)
    model.add_adapter("c", LoraConfig(**A))
    model.set_adapter("c")
    assert (
        type(model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")) is LoRALinear
    )
    logits(model, ids).sum().backward()


def test_deleting_one_of_several_active_keeps_the_others() -> None:
    model, ids = own(), some_ids()
    model.set_adapter("b")
    alone = logits(model, ids)
    model.set_adapter(["a", "b"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.delete_adapter("a")
    assert torch.equal(logits(model, ids), alone)


def test_deleting_one_that_waits_changes_nothing_else() -> None:
    model, ids = own(), some_ids()
    before, trains = logits(model, ids), trained(model)
    model.delete_adapter("b")
    assert torch.equal(logits(model, ids), before)
    assert trained(model) == trains
    model.add_adapter("b", LoraConfig(**B))
    model.set_adapter("a", inference_mode=True)
    model.delete_adapter("b")
    assert trained(model) == []


def test_renaming_changes_names_alone(tmp_path: Path) -> None:
    model, ids = own(), some_ids()
    before, trains = logits(model, ids), trained(model)
    order = [p for p in model.parameters() if p.requires_grad]
    model.rename_adapter("a", "task")
    assert torch.equal(logits(model, ids), before)
    assert trained(model) == sorted(n.replace(".a", ".task") for n in trains)
    assert all(x is y for x, y in zip([p for p in model.parameters() if p.requires_grad], order, strict=True))  # fmt: skip
    assert list(model.peft_config) == ["task", "b"]
    for old, new, match in (("task", "b", "exists"), ("nobody", "x", "nobody"), ("b", "a.b", "adapter_name")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            model.rename_adapter(old, new)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"task", "b"}


@pytest.mark.parametrize("scale", [0.0, 2.5, -1.0])
def test_scale_as_in_peft(scale: float) -> None:
    model, theirs, ids = own(), stock(), some_ids()
    model.set_adapter("b")
    theirs.set_adapter("b")
    model.set_scale("b", scale)
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("b", scale)
    close(logits(model, ids), logits(theirs, ids))
    with pytest.raises(ValueError, match="finite"):
        model.set_scale("b", float("nan"))
    other = fastlora.get_peft_model(tiny_llama(), fastlora.IA3Config())
    with pytest.raises(ValueError, match="IA3"):
        other.set_scale("default", scale)


def test_what_cannot_be_added_leaves_the_model_as_it_was() -> None:
    model = own()
    names, ids = sorted(model.state_dict()), some_ids()
    before = logits(model, ids)
    bad: list[tuple[str, Any, str]] = [
        ("a", LoraConfig(**A), "exists already"),
        ("c", LoraConfig(**{**A, "target_modules": ["nothing"]}), "matches no module"),
        ("c", LoraConfig(**A, bias="all"), "bias"),
        ("c", LoraConfig(**{**A, "init_lora_weights": "pissa"}), "change the base weight under"),
        ("c", LoraConfig(**A, quantize="nf4"), "quantize"),
        ("c.d", LoraConfig(**A), "adapter_name"),
        (
            "c",
            peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
            "method|peft_type",
        ),
    ]
    for name, config, match in bad:
        with pytest.raises(ValueError, match=match):
            model.add_adapter(name, config)
        assert sorted(model.state_dict()) == names
        assert sorted(model.peft_config) == ["a", "b"]
    model.merge_adapter()
    for change in (lambda: model.add_adapter("c", LoraConfig(**A)), lambda: model.delete_adapter("b"),
                   lambda: model.rename_adapter("b", "c"), lambda: model.set_scale("b", 1.0)):  # fmt: skip
        with pytest.raises(ValueError, match="merged"):
            change()
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), before)
    with pytest.raises(ValueError, match="nobody"):
        model.set_adapter(["a", "nobody"])
    with pytest.raises(ValueError, match="none"):
        model.set_adapter([])
    assert model.active_adapters == ["a"]


def test_copies_of_modules_belong_to_their_adapter() -> None:
    net = plain_net()
    model = fastlora.get_peft_model(
        net, LoraConfig(target_modules=["up"], modules_to_save=["head"]), adapter_name="a"
    )
    model.add_adapter("b", LoraConfig(target_modules=["down"], modules_to_save=["head"]))
    model.add_adapter("c", LoraConfig(target_modules=["down"]))
    ids, head = some_ids(), net.head
    assert isinstance(head, TrainableCopy)
    assert head.adapters == ["a", "b"]
    with torch.no_grad():
        head.modules_to_save["b"].weight.zero_()
        head.modules_to_save["b"].bias.fill_(3.0)
    assert not bool((logits(model, ids) == 3).any())
    model.set_adapter("b")
    assert bool((logits(model, ids) == 3).all())
    assert [n for n in trained(model) if "head" in n] == [
        "base_model.model.head.modules_to_save.b",
        "base_model.model.head.modules_to_save.b.bias",
    ]
    model.set_adapter("c")
    assert torch.equal(logits(model, ids), logits(plain_net(), ids))
    with pytest.raises(ValueError, match="own copy"):
        model.set_adapter(["a", "b"])
    assert model.active_adapters == ["c"]


def test_files_of_many_adapters_both_ways(tmp_path: Path) -> None:
    model, ids = own(), some_ids()
    model.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours" / "a", adapter_name="a")
    theirs.load_adapter(tmp_path / "ours" / "b", adapter_name="b")
    for name in ("a", "b"):
        model.set_adapter(name)
        theirs.set_adapter(name)
        close(logits(model, ids), logits(theirs, ids))
    theirs.save_pretrained(tmp_path / "theirs")
    again = fastlora.load_adapter(tiny_llama(), tmp_path / "theirs" / "b", adapter_name="b")
    assert again.active_adapters == ["b"]
    again.load_adapter(tmp_path / "theirs" / "a", adapter_name="a")
    assert again.active_adapters == ["b"]
    assert trained(again) == []
    close(logits(again, ids), logits(theirs, ids))
    again.set_adapter("a")
    theirs.set_adapter("a")
    close(logits(again, ids), logits(theirs, ids))
    assert "a" in trained(again)[0].split(".")


def test_a_torn_file_adds_nothing(tmp_path: Path) -> None:
    model = own()
    model.save_pretrained(tmp_path)
    file = tmp_path / "b" / "adapter_model.safetensors"
    tensors = {k: v for k, v in sorted(fastlora.io.files.read_tensors(file).items())[:-1]}
    save_file(tensors, file)
    names = sorted(model.state_dict())
    with pytest.raises(ValueError, match="lacks 1"):
        model.load_adapter(tmp_path / "b", adapter_name="c")
    assert sorted(model.state_dict()) == names
    assert sorted(model.peft_config) == ["a", "b"]


def test_over_four_bits_and_wrapped_linears() -> None:
    model = fastlora.get_peft_model(
        plain_net(), LoraConfig(target_modules=["up", "head"], quantize="nf4")
    )
    model.add_adapter("b", LoraConfig(r=2, target_modules=["up", "down"]))
    randomize_adapters(model)
    ids = some_ids()
    model.set_adapter(["default", "b"])
    both = logits(model, ids)
    twin = copy.deepcopy(model)
    model.set_adapter("b")
    assert not torch.equal(logits(model, ids), both)
    assert torch.equal(logits(twin, ids), both)
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="default"):
        model.set_adapter("default")


def test_a_classifier_that_stock_peft_saved(tmp_path: Path) -> None:
    """Its file names every head there could be."""
    from transformers import LlamaForSequenceClassification

    config = tiny_llama().config
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(config).eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(task_type="SEQ_CLS"))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    theirs.save_pretrained(tmp_path)
    ours = fastlora.load_adapter(base, tmp_path)
    ids = some_ids()
    close(logits(ours, ids), logits(theirs.eval(), ids))


def test_a_copy_of_what_holds_other_adapters_is_refused() -> None:
    model = fastlora.get_peft_model(tiny_llama(), LoraConfig(target_modules=["up_proj"]), "a")
    with pytest.raises(ValueError, match="has other adapters in it"):
        model.add_adapter("b", LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"]))
    assert sorted(model.peft_config) == ["a"]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inits_that_change_the_base_are_for_a_base(init: str) -> None:
    model, ids = own(), some_ids()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("a")
        model.delete_adapter("b")
    before = logits(model, ids)
    with pytest.raises(ValueError, match="init_lora_weights"):
        model.add_adapter("p", LoraConfig(**{**A, "init_lora_weights": init}))
    assert torch.equal(logits(model, ids), before)


def test_factors_of_a_weight_are_not_read_over_another_base(tmp_path: Path) -> None:
    split = fastlora.get_peft_model(tiny_llama(), LoraConfig(**A, init_lora_weights="pissa"))
    fastlora.save_adapter(split, tmp_path)
    model = fastlora.get_peft_model(tiny_llama(), LoraConfig(**A))
    ids = some_ids()
    before = logits(model, ids)
    for read in (fastlora.load_adapter, fastlora.hotswap_adapter):
        with pytest.raises(ValueError, match="init_lora_weights"):
            read(model, tmp_path)
        assert torch.equal(logits(model, ids), before)
    again = fastlora.load_adapter(tiny_llama(), tmp_path)
    close(logits(again, ids), logits(tiny_llama(), ids))


@pytest.mark.parametrize(
    "name", ["training", "_keys", "forward", "keys", "weight", "a.b", "", "__base__"]
)
def test_names_that_cannot_be_attributes(name: str) -> None:
    with pytest.raises(ValueError, match="adapter_name"):
        fastlora.get_peft_model(plain_net(), LoraConfig(target_modules=["up"]), name)


def test_without_adapters_there_is_no_active_one() -> None:
    model = fastlora.get_peft_model(plain_net(), LoraConfig(target_modules=["up"]))
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="deleted"):
        _ = model.active_adapter


def test_parameters_of_fsdp_are_neither_replaced_nor_written(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    model = fastlora.get_peft_model(plain_net(), LoraConfig(r=2, target_modules=["up"]))
    randomize_adapters(model)
    fastlora.save_adapter(model, tmp_path)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
        before = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
        for change in (
            lambda: fastlora.prepare_hotswap(model, 4),
            lambda: fastlora.hotswap_adapter(model, tmp_path),
            lambda: model.rename_adapter("default", "z"),
            lambda: model.delete_adapter("default"),
            lambda: model.add_adapter("b", LoraConfig(r=2, target_modules=["up"])),
        ):
            with pytest.raises(ValueError, match="fully_shard"):
                change()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.full_tensor(), before[name])
        logits(model, some_ids()).sum().backward()
    finally:
        dist.destroy_process_group()
