"""merge_adapter, unmerge_adapter, merge_and_unload: reported, reversible, all layers or none."""

import warnings

import peft
import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoraConfig, LoRALinear, NF4Tensor, QLoRALinear
from tests.tiny_models import logits, plain_net, randomize_adapters, some_ids, tiny_llama

BF16 = torch.bfloat16
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "merging rounds away")
        yield


def own(model=None, **settings):
    made = fastlora.get_peft_model(
        model or tiny_llama(), LoraConfig(**{"r": 4, "target_modules": TARGETS, **settings})
    )
    randomize_adapters(made, scale=0.007)  # an update of about 1 % of the weight
    return made.eval()


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model, before):
    now = model.state_dict()
    assert now.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(now[name], value), name


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_the_report_says_what_the_outputs_show(quantize):
    model, ids = own(tiny_llama(dtype=BF16), quantize=quantize), some_ids()
    before, apart = values(model), logits(model, ids)
    foretold = model.merge_report()
    assert_same(model, before)
    with pytest.warns(UserWarning, match=r"merging rounds away .* in \d of 4 layers") as caught:
        reports = model.merge_adapter()
    assert reports == foretold and len(reports) == 4 and len(caught) == 1
    assert str(caught[0].message).count("merge_and_unload(dequantize=True)") == 1
    assert caught[0].filename == __file__
    base = model.get_base_model()
    for name, error, update in reports:
        layer = base.get_submodule(name)
        original, merged = layer._shelf[0].weight, layer.weight
        if quantize:
            original, merged = (w.dequantize(torch.float32) for w in (original, merged))
        update_of = layer.lora_B["default"] @ layer.lora_A["default"] * layer.scaling["default"]
        exact = original.double() + update_of.double()
        assert error == pytest.approx(((merged - exact).norm() / exact.norm()).item(), rel=1e-2)
        assert update == pytest.approx((update_of.norm() / exact.norm()).item(), rel=1e-3)
    merged = logits(model, ids)
    assert 0 < (merged - apart).norm() < 0.3 * apart.norm()
    with model.disable_adapter():
        without = logits(model, ids)
    assert torch.equal(logits(model, ids), merged)
    model.unmerge_adapter()
    assert_same(model, before)
    assert torch.equal(logits(model, ids), apart)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), without)


def test_a_merge_that_costs_little_does_not_warn():
    model = own()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(report.error == 0 for report in model.merge_adapter())


@pytest.mark.parametrize("kind", ["plain", "llama"])
def test_unloaded_floats_are_plain_linears_as_pefts(kind, tmp_path):
    build, targets = (plain_net, ["up", "down"]) if kind == "plain" else (tiny_llama, TARGETS)
    settings = {"target_modules": targets, "modules_to_save": ["norm"], "bias": "lora_only"}
    model, ids = own(build(), **settings), some_ids()
    fastlora.save_adapter(model, tmp_path)
    stock = peft.PeftModel.from_pretrained(build(), tmp_path).merge_and_unload()
    merged = model.merge_and_unload()
    assert merged is model.get_base_model()
    assert [(n, type(m)) for n, m in merged.named_modules()] == [(n, type(m)) for n, m in stock.named_modules()]  # fmt: skip
    assert merged.state_dict().keys() == stock.state_dict().keys()
    torch.testing.assert_close(logits(merged, ids), logits(stock, ids))
    for name, value in stock.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, msg=name)


def test_unloaded_in_four_bits_and_in_floats(tmp_path):
    ids, base = some_ids(), tiny_llama()
    model = own(base, quantize="nf4")
    apart, untouched = logits(model, ids), values(base.model.layers[0].self_attn.k_proj)
    merged = model.merge_and_unload()
    linears = {n: m for n, m in merged.named_modules() if isinstance(m, QLoRALinear)}
    assert len(linears) == 14 and not any(layer.r for layer in linears.values())
    assert_same(merged.model.layers[0].self_attn.k_proj, untouched)
    four = logits(merged, ids)

    model = own(quantize="nf4")
    assert all(report.error == 0 for report in model.merge_report(dequantize=True))
    merged = model.merge_and_unload(dequantize=True)
    assert type(merged.model.layers[0].self_attn.k_proj) is nn.Linear
    assert not any(isinstance(m, (QLoRALinear, NF4Tensor)) for m in merged.modules())
    torch.testing.assert_close(logits(merged, ids), apart, atol=1e-5, rtol=1e-5)
    assert (four - apart).norm() > 100 * (logits(merged, ids) - apart).norm()
    merged.save_pretrained(tmp_path)  # an ordinary checkpoint
    again = type(merged).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, ids), logits(merged, ids))


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_a_warning_that_is_an_error_leaves_all_as_it_was(call):
    model = own(quantize="nf4")
    before, modules = values(model), list(model.named_modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="merging rounds away"):
            getattr(model, call)()
    assert list(model.named_modules()) == modules
    assert_same(model, before)
    assert not any(m.merged_adapters for m in model.modules() if isinstance(m, QLoRALinear))


@pytest.mark.parametrize("bias", ["none", "all"])
def test_an_adapter_that_was_unloaded_does_not_replace_its_file(tmp_path, bias):
    model = own(tiny_llama(attention_bias=True), bias=bias)
    fastlora.save_adapter(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model.merge_and_unload()
    for call in (fastlora.save_adapter, lambda m, p: m.save_pretrained(p), fastlora.load_adapter):
        with pytest.raises(ValueError, match="merged and unloaded; save before"):
            call(model, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("attention_bias", [True, False])
@pytest.mark.parametrize(("first", "then"), [(torch.float32, BF16), (BF16, torch.float32)])
def test_what_is_dequantised_has_the_dtype_that_the_model_was_cast_to(first, then, attention_bias):
    model = own(tiny_llama(dtype=first, attention_bias=attention_bias), quantize="nf4").to(then)
    merged = model.merge_and_unload(dequantize=True)
    assert {p.dtype for p in merged.parameters()} == {then}
    assert logits(merged, some_ids()).dtype == then
    model = own(tiny_llama(dtype=first, attention_bias=attention_bias), quantize="nf4")
    merged = model.merge_and_unload(dequantize=torch.float16)
    linears = [m for m in merged.model.modules() if isinstance(m, nn.Linear)]
    assert {p.dtype for m in linears for p in m.parameters()} == {torch.float16}


def test_a_model_of_nothing_but_four_bits_is_dequantised_to_what_it_was():
    net = nn.Sequential(nn.Linear(64, 64, bias=False, dtype=BF16))
    model = own(net, quantize="nf4", target_modules=["0"])
    assert model.merge_and_unload(dequantize=True)[0].weight.dtype == BF16


@pytest.mark.parametrize("dequantize", [False, True])
def test_a_trained_bias_comes_out_of_four_bits_itself(dequantize):
    model = own(tiny_llama(attention_bias=True), quantize="nf4", bias="lora_only")
    before = model.get_base_model().model.layers[0].self_attn.q_proj.bias
    assert before.requires_grad
    after = model.merge_and_unload(dequantize).model.layers[0].self_attn.q_proj
    assert not isinstance(after, QLoRALinear) if dequantize else not after.r
    assert after.bias is before and before.requires_grad


def test_layers_without_adapters_stay_themselves_in_four_bits():
    model = own(quantize="nf4")
    untouched = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, QLoRALinear) and not m.r}  # fmt: skip
    assert len(untouched) == 10
    merged = model.merge_and_unload()
    for name, module in untouched.items():
        assert merged.get_submodule(name) is module


def spoil(model):
    """The last of the layers cannot be merged."""
    layers = [m for m in model.modules() if isinstance(m, (LoRALinear, QLoRALinear)) and m.r]
    with torch.no_grad():
        layers[-1].lora_A["default"][0, 0] = float("inf")


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload", "merge_report"])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_an_error_leaves_all_layers_as_they_were(call, quantize):
    model = own(quantize=quantize)
    spoil(model)
    before, modules = values(model), list(model.named_modules())
    with pytest.raises(ValueError, match=r"module 'model\.layers\.1\.mlp\.down_proj': .*overflows"):
        getattr(model, call)()
    assert list(model.named_modules()) == modules
    assert_same(model, before)


def test_no_memory_for_the_last_layer_leaves_all_as_they_were(monkeypatch):
    model, made = own(quantize="nf4"), []
    before, ids = values(model), some_ids()
    apart, requantize = logits(model, ids), NF4Tensor.requantize

    def full(self, weight):
        made.append(weight)
        if len(made) == 4:
            raise torch.OutOfMemoryError("no room")
        return requantize(self, weight)

    monkeypatch.setattr(NF4Tensor, "requantize", full)
    with pytest.raises(torch.OutOfMemoryError):
        model.merge_adapter()
    assert_same(model, before)
    assert torch.equal(logits(model, ids), apart)


def test_while_merged_the_adapter_is_saved_and_not_replaced(tmp_path):
    model = own(quantize="nf4")
    want = {n: p.clone() for n, p in model.named_parameters() if "lora_" in n}
    model.merge_adapter()
    fastlora.save_adapter(model, tmp_path)
    for call in (model.merge_adapter, model.merge_and_unload, lambda: model.set_adapter("default"), lambda: fastlora.load_adapter(model, tmp_path)):  # fmt: skip
        with pytest.raises(ValueError, match="merged"):
            call()
    model.unmerge_adapter()
    randomize_adapters(model, seed=3)
    fastlora.load_adapter(model, tmp_path)
    for name, value in want.items():
        assert torch.equal(model.get_parameter(name), value)


def test_what_cannot_be_merged_says_so():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].register_forward_hook(lambda module, args, output: output)
    model = fastlora.get_peft_model(net, LoraConfig(r=2, target_modules=["0", "1"]))
    before = values(model)
    with pytest.raises(NotImplementedError, match="module '1': a LoRAWrapper leaves its base"):
        model.merge_adapter()
    assert_same(model, before)
    model = own()
    model.disable_adapter_layers()
    with pytest.raises(ValueError, match="no adapter acts"):
        model.merge_and_unload()


TIED = "'lm_head' a weight of its own, which it shared with 'model.embed_tokens'"


def test_a_weight_tied_to_another_module_is_merged_alone():
    base = tiny_llama(tie_word_embeddings=True)
    embedding = base.model.embed_tokens.weight
    before = embedding.detach().clone()
    model = own(base, target_modules=["lm_head"])
    with pytest.warns(UserWarning, match=TIED) as caught:
        model.merge_adapter()
    assert caught[0].filename == __file__
    assert base.lm_head.weight is not embedding and torch.equal(embedding, before)
    model.unmerge_adapter()
    assert base.lm_head.weight is embedding and base.config.tie_word_embeddings


def test_a_weight_that_was_tied_stays_merged_when_it_is_saved(tmp_path):
    ids, model = some_ids(), own(tiny_llama(tie_word_embeddings=True), target_modules=["lm_head"])
    want = logits(model, ids)
    with pytest.warns(UserWarning, match=TIED):
        merged = model.merge_and_unload()
    merged.tie_weights()
    torch.testing.assert_close(logits(merged, ids), want)
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again, ids), want)


@pytest.mark.parametrize("dequantize", [False, True])
def test_a_tied_weight_that_gets_no_update_stays_tied(dequantize):
    model = own(tiny_llama(tie_word_embeddings=True), target_modules=["lm_head", "q_proj"])
    model.get_base_model().lm_head.set_adapter("another")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = model.merge_and_unload(dequantize)
    assert type(merged.lm_head) is nn.Linear and merged.config.tie_word_embeddings
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_a_model_without_embeddings_is_unloaded():
    class Blind(nn.Sequential):
        config = None

        def get_input_embeddings(self):
            raise NotImplementedError

    model = own(Blind(nn.Linear(8, 8)), target_modules=["0"])
    assert type(model.merge_and_unload()[0]) is nn.Linear


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_pefts_arguments_are_taken_or_refused_by_name(call):
    model, peft_only = own(), {"progressbar": True} if call == "merge_and_unload" else {}
    before = values(model)
    with pytest.raises(ValueError, match=r"adapter_names: got \['other'\]; accepted is None or the active \['default'\]"):  # fmt: skip
        getattr(model, call)(adapter_names=["other"])
    if call == "merge_and_unload":
        with pytest.raises(
            ValueError, match=r"dequantize: got 'bf16'; accepted are True, False and"
        ):
            model.merge_and_unload(dequantize="bf16")
    assert_same(model, before)
    getattr(model, call)(adapter_names=["default"], safe_merge=True, **peft_only)
