"""PEFT's public names on our PeftModel: all that a script calls are there, and do what stock peft's do."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import fastlora
from fastlora.models.prompt_model import PromptModel
from tests.every_method import BOTTLENECKS, FOUR_BITS, IN_PEFT, METHODS, VIRTUAL
from tests.tiny_models import logits, some_ids, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore")

# What stock peft's models have in public and ours do not, and why.
LEFT_OUT = {
    # of PeftModel
    "create_or_update_model_card": "fastlora writes no README.md into an adapter's folder",
    "get_prompt": "virtual tokens enter by hooks; prompt_encoder[name]() gives them",
    "special_peft_forward_args": "how PeftModel.forward hands adapter_names on; ours takes it as an argument",
    "supports_lora_conversion": "peft.convert_to_lora works on PEFT's layers",
    # of the tuner inside it: what PEFT's own code asks
    "get_model_config": "the base's config as a dict, for PEFT's injection",
    "inject_adapter": "get_peft_model and add_adapter change the base",
    "subtract_mutated_init": "save_pretrained(path_initial_model_for_weight_conversion=...) does it",
    "target_module_mapping": "PEFT's table of defaults; fastlora's is methods/matching.py",
    "tuner_layer_cls": "the class of PEFT's layers; fastlora's are AdapterLayers",
    "uses_shared_state": "for VeRA and the like, whose layers share tensors",
}  # fmt: skip


def public(thing: Any) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")} - set(dir(nn.Module))


def test_the_public_surface_is_stock_pefts_but_for_the_names_listed() -> None:
    from peft.tuners import LNTuningModel

    base = public(tiny_llama())
    lora = METHODS["lora"].make()
    theirs = METHODS["lora"].make(peft)
    wanted = public(theirs) | public(theirs.base_model) | public(peft.PeftModelForCausalLM)
    wanted |= public(peft.IA3Model) | public(LNTuningModel)
    have = public(fastlora.PeftModel) | public(PromptModel)
    assert wanted - base - have - set(LEFT_OUT) == set()
    assert not have & set(LEFT_OUT)
    assert set(LEFT_OUT) <= wanted  # the list has no name that peft does not have
    for name in set(LEFT_OUT) & set(vars(type(lora))):
        with pytest.raises(NotImplementedError, match=name):  # not silently PEFT's own
            getattr(lora, name)()


# Arguments of PEFT's that ours do not take, and why.
NOT_TAKEN = {
    "ephemeral_gpu_offload": "layers of a DoRA model that is partly on the CPU go to the GPU one by one",
    "key_mapping": "files have PEFT's keys",
    "kwargs": "of the Hub; an adapter is a folder",
    "mixed": "one model takes one method",
    "revision": "of the Hub; the configuration has it",
}


def test_shared_functions_take_stock_pefts_arguments() -> None:
    def missing(ours: Any, theirs: Any) -> set[str]:
        taken = inspect.signature(ours).parameters
        return set(inspect.signature(theirs).parameters) - set(taken)

    pairs = [(fastlora.get_peft_model, peft.get_peft_model)]
    for name in sorted((public(peft.PeftModel) | public(peft.LoraModel)) - set(LEFT_OUT)):
        theirs = getattr(peft.PeftModel, name, None) or getattr(peft.LoraModel, name)
        if callable(theirs) and hasattr(fastlora.PeftModel, name):
            pairs.append((getattr(fastlora.PeftModel, name), theirs))
    assert len(pairs) > 15
    assert set().union(*(missing(*pair) for pair in pairs)) == set(NOT_TAKEN)


def test_loading_takes_pefts_options(tmp_path: Path) -> None:
    half = METHODS["lora"]._replace(base=lambda: tiny_llama(dtype=torch.bfloat16))
    model = half.moved()
    model.save_pretrained(tmp_path)
    options = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": True}
    narrow = fastlora.PeftModel.from_pretrained(half.base(), tmp_path, **options)
    theirs = peft.PeftModel.from_pretrained(half.base(), tmp_path, **options)
    for one in (narrow, theirs):
        assert {p.dtype for n, p in one.named_parameters() if "lora_" in n} == {torch.bfloat16}
    torch.testing.assert_close(
        logits(narrow, some_ids()), logits(theirs, some_ids()), rtol=2e-2, atol=2e-2
    )
    model.load_adapter(tmp_path, "other", torch_device="cpu", **options)
    dtypes = {n.rpartition(".")[2]: p.dtype for n, p in model.named_parameters() if "lora_" in n}
    assert dtypes == {"default": torch.float32, "other": torch.bfloat16}
    # A configuration in place of the folder's.
    config = peft.LoraConfig(r=4, lora_alpha=80, target_modules=["q_proj", "v_proj"])
    for library in (fastlora, peft):
        strong = library.PeftModel.from_pretrained(tiny_llama(), tmp_path, config=config)
        weak = library.PeftModel.from_pretrained(tiny_llama(), tmp_path)
        assert not torch.allclose(logits(strong, some_ids()), logits(weak, some_ids()), atol=1e-2)


def statuses(model: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return [dataclasses.asdict(s) for s in model.get_layer_status()], dataclasses.asdict(model.get_model_status())  # fmt: skip


def test_statuses_have_stock_pefts_fields() -> None:
    from fastlora.models import status

    for name in ("TunerLayerStatus", "TunerModelStatus"):
        fields = [[f.name for f in dataclasses.fields(getattr(at, name))] for at in (status, peft.peft_model)]  # fmt: skip
        assert fields[0] == fields[1]


@pytest.mark.parametrize("name", [name for name in IN_PEFT if name not in VIRTUAL])
def test_statuses_are_stock_pefts(name: str) -> None:
    """Of the same model in the same states; the classes have other names."""
    ours, theirs = METHODS[name].make(), METHODS[name].make(peft)

    def compare(off: bool = False) -> None:
        (mine, model), (other, whole) = statuses(ours), statuses(theirs)
        for one in (*mine, *other, model, whole):
            one.pop("module_type", None)
            if off:  # peft freezes what is switched off
                del one["requires_grad"]
            one.pop("trainable_params" if off else "", None)
        for one in (*mine, *other):
            one["name"] = one["name"].replace(".token_adapter", "").replace(".base_layer", "")
        assert sorted(mine, key=lambda s: s["name"]) == sorted(other, key=lambda s: s["name"])
        for one in (model, whole):
            del one["adapter_model_type"]
        assert model == whole
        assert ours.has_active_enabled_adapter == theirs.has_active_enabled_adapter

    compare()
    with ours.disable_adapter(), theirs.disable_adapter():
        compare(off=True)
    for model in (ours, theirs):
        model.set_adapter("default")
    compare()
    for model in (ours, theirs):
        model.set_requires_grad("default", False)
    compare()
    assert not any(p.requires_grad for layer in ours.adapter_layers() for p in layer.adapter_parameters("default"))  # fmt: skip
    if name not in ("lora, biases", "lora, copies", "ln_tuning"):  # what takes a second adapter
        for library, model in ((fastlora, ours), (peft, theirs)):
            kind = METHODS[name].name or "LoraConfig"
            fields = METHODS[name].config().to_dict()
            del fields["peft_type"]
            fields["init_lora_weights"] = True
            fields = fields if kind == "LoraConfig" else {k: v for k, v in fields.items() if k != "init_lora_weights"}  # fmt: skip
            model.add_adapter("other", getattr(library, kind)(**fields))
            model.set_requires_grad(["default", "other"])
        compare()
        for model in (ours, theirs):
            model.merge_adapter()
        compare()


def test_irregular_states_are_called_that() -> None:
    model = METHODS["lora"].make()
    layers = list(model.adapter_layers())
    layers[0].enable_adapters(False)
    layers[1].lora_A["default"].requires_grad_(False)
    status = model.get_model_status()
    assert status.enabled == "irregular" and status.requires_grad == {"default": "irregular"}
    layers[1].merge()
    assert model.get_model_status().merged_adapters == "irregular"
    bits = METHODS["lora, 4 bits"].make()
    assert bits.get_model_status().quantization_backend == "nf4"
    assert fastlora.get_layer_status(bits)[0].quantization_backend == "nf4"
    with pytest.raises(ValueError, match="no adapter layers"):
        fastlora.get_layer_status(tiny_llama())


def test_set_requires_grad_of_an_unknown_adapter_changes_nothing() -> None:
    model = METHODS["lora"].make()
    with pytest.raises(ValueError, match="nobody"):
        model.set_requires_grad(["default", "nobody"], False)
    assert model.get_model_status().requires_grad == {"default": True}


def test_names_of_what_is_adapted() -> None:
    for name in ("lora", "lora, parameters", "ia3", "lora, copies"):
        ours, theirs = METHODS[name].make(), METHODS[name].make(peft)
        for attribute in ("targeted_module_names", "targeted_parameter_names"):
            mine, other = getattr(ours, attribute), getattr(theirs, attribute)
            assert sorted(mine) == sorted(other), (name, attribute)
    assert ours.base_model_torch_dtype == theirs.base_model_torch_dtype == torch.float32


@pytest.mark.parametrize("name", METHODS)
def test_unload_gives_the_base_back(name: str) -> None:
    ids, method = some_ids(), METHODS[name]
    base = method.base()
    if name in FOUR_BITS:
        base = method.make().disable_adapter_layers() or method.make()
        base.disable_adapter_layers()
    want = logits(base, ids)
    model = method.moved()
    changed = logits(model, ids)
    plain = model.unload()
    got = logits(plain, ids)
    hooks = [h for m in plain.modules() for h in m._forward_pre_hooks.values()]
    assert not hooks
    if name in ("lora, biases", "lora, copies", "bottleneck", "pissa"):
        # What else was trained stays, as in peft; PiSSA's base is the residual.
        if name in IN_PEFT:
            theirs = method.moved(peft).unload()
            torch.testing.assert_close(got, logits(theirs, ids), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(got, want, atol=1e-4)
    else:
        torch.testing.assert_close(got, want)
    assert got.shape != changed.shape or not torch.allclose(got, changed, atol=1e-4)
    if name not in FOUR_BITS:
        fresh = method.base()
        assert [type(m) for m in plain.modules()] == [type(m) for m in fresh.modules()]
        assert plain.state_dict().keys() == fresh.state_dict().keys()
        again = fastlora.get_peft_model(plain, method.config())  # and it takes adapters again
        assert again.has_active_enabled_adapter


def test_unload_refuses_merged_adapters(tmp_path: Path) -> None:
    model, ids = METHODS["lora"].moved(), some_ids()
    model.merge_adapter()
    want = logits(model, ids)
    with pytest.raises(ValueError, match="merged"):
        model.unload()
    assert torch.equal(logits(model, ids), want)
    model.unmerge_adapter()
    model.unload()
    with pytest.raises(ValueError, match="nothing of adapter"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name", ["lora", "lora, copies", "lora, biases", "dora", "ia3", "ln_tuning"]
)
def test_merged_weights_by_the_names_that_trl_sends_to_vllm(name: str) -> None:
    """Its loop: all but what has ``prefix`` in its name, and originals; then the names of the plain model."""
    model = METHODS[name].moved()
    assert model.prefix == METHODS[name].make(peft).prefix
    want = METHODS[name].moved().merge_and_unload().state_dict()
    model.merge_adapter()
    sent = {}
    for key, p in model.named_parameters():
        key = key.removeprefix("base_model.model.").replace(".base_layer", "")
        if model.prefix in key or "original_module" in key:
            continue
        sent[key.replace("modules_to_save.default.", "")] = p
    assert sent.keys() == want.keys()
    assert all(torch.equal(sent[key], value) for key, value in want.items())
    for virtual in ("p-mlp", "houlsby"):
        other = METHODS[virtual].make()
        assert all(other.prefix in n for n, p in other.named_parameters() if p.requires_grad)


def test_prepare_model_for_gradient_checkpointing() -> None:
    model = METHODS["lora"].make()
    model.prepare_model_for_gradient_checkpointing(model.get_base_model())
    embedded = model.get_input_embeddings()(some_ids())
    assert embedded.requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.prepare_model_for_gradient_checkpointing(nn.Linear(2, 2))  # has no such thing
    assert set(BOTTLENECKS).isdisjoint(IN_PEFT)
