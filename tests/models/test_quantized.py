"""Models over 4-bit bases: LoraConfig(quantize="nf4"), and stock PEFT over bitsandbytes' Linear4bit."""

import copy
import gc
import warnings
import weakref
from functools import partial

import peft
import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoraConfig, NF4Tensor, QLoRALinear
from fastlora.testing.compare import assert_accurate
from tests.tiny_models import (
    assert_unchanged,
    logits,
    loss_and_grads,
    plain_net,
    randomize_adapters,
    snapshot,
    some_ids,
    tiny_llama,
)

BF16 = torch.bfloat16
READING = ("dequantize", "nf4_few", "nf4_gemm", "nf4_dx")  # ops that take the codes
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def own(model=None, device=None, **settings):
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], "quantize": "nf4", **settings})  # fmt: skip
    made = fastlora.get_peft_model(model or tiny_llama(), config, device=device)
    randomize_adapters(made)
    return made


def rows_of_blocks(**changes):
    """Whole blocks in every row: bitsandbytes' CPU kernels read others wrongly."""
    return tiny_llama(hidden_size=64, intermediate_size=128, **changes)


def stock(
    device="cpu", dtype=torch.float32, quant_type="nf4", compute=None, model=None, **settings
):
    """A PEFT model over Linear4bit, made as transformers makes one."""
    bnb = pytest.importorskip("bitsandbytes")
    model = (model or rows_of_blocks()).to(dtype)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            linear = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                quant_type=quant_type,
                compute_dtype=compute or dtype,
            )
            linear.load_state_dict(module.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear.to(device))
    model.is_loaded_in_4bit = True
    model.to(device)
    config = peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, config)
    randomize_adapters(model)
    return model.train()


# ---- fastlora's own -----------------------------------------------------------------------------------------------


def test_every_linear_but_the_output_layer_is_quantised(device):
    base = tiny_llama()
    weights = {n: p.detach().clone() for n, p in base.named_parameters()}
    model = own(base, device)
    layers = {n: m for n, m in base.named_modules() if isinstance(m, QLoRALinear)}
    assert {n.rpartition(".")[2] for n in layers} == set(LINEARS) and len(layers) == 14
    for name, layer in layers.items():
        adapted = name.endswith(("q_proj", "down_proj"))
        assert list(layer.r) == (["default"] if adapted else [])
        exact = NF4Tensor.quantize(weights[f"{name}.weight"].to(device)).dequantize()
        assert torch.equal(layer.weight.dequantize(), exact)
    assert type(base.lm_head) is nn.Linear
    assert all(p.device.type == device.type for p in model.parameters())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained)


def test_it_learns_and_only_its_adapters_change(device):
    model, ids = own(device=device, target_modules="all-linear").train(), some_ids(rows=4)
    ids = ids.to(device)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss, _ = loss_and_grads(model, ids)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    for name, value in frozen.items():
        assert torch.equal(model.get_parameter(name), value)


def test_four_bits_count_as_the_weight_they_stand_for():
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    floats = fastlora.get_peft_model(tiny_llama(), config)
    assert own().get_nb_trainable_parameters() == floats.get_nb_trainable_parameters()


def test_adapters_are_saved_and_loaded_as_pefts(tmp_path):
    model, ids = own(), some_ids()
    fastlora.save_adapter(model, tmp_path)
    again = own()
    fastlora.load_adapter(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(logits(again, ids), logits(model, ids))
    stocked = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    values = dict(stocked.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(values[f"{name}.weight"], parameter), name


def test_modules_trained_whole_and_plain_models_stay_floats():
    model = own(plain_net(), target_modules=["up"], modules_to_save=["head"])
    base = model.get_base_model()
    assert isinstance(base.layers[0]["up"], QLoRALinear)
    assert isinstance(base.layers[0]["down"], QLoRALinear) and not base.layers[0]["down"].r
    assert base.head.modules_to_save["default"].weight.is_floating_point()


def test_tied_and_shared_weights_stay_floats():
    net = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "c": nn.Linear(64, 64)})
    net["b"].weight = net["a"].weight
    model = own(nn.Sequential(net), target_modules=["c"])
    inner = model.get_base_model()[0]
    assert type(inner["a"]) is nn.Linear and type(inner["b"]) is nn.Linear
    assert isinstance(inner["c"], QLoRALinear)


class Full(nn.Module):
    """There is no room left for it."""

    def _apply(self, fn, recurse=True):
        raise torch.OutOfMemoryError("no room")


@pytest.mark.parametrize("there", ["meta", "elsewhere"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_device_without_room_leaves_the_model_as_it_was(there, tied, monkeypatch):
    """Whether a move replaces parameters or, between real devices, their data."""
    base, ids = tiny_llama(tie_word_embeddings=tied), some_ids()
    base.model.embed_tokens.weight.grad = torch.ones(96, 32)
    base.lm_head.full = Full()
    before, want = snapshot(base), logits(base, ids)
    tensors = [*base.parameters(), *base.buffers(), base.model.embed_tokens.weight.grad]
    places = [t.data_ptr() for t in tensors]
    if there == "elsewhere":
        monkeypatch.setattr(type(base), "to", lambda m, device: m._apply(torch.clone))
    with pytest.raises(torch.OutOfMemoryError):
        own(base, "meta" if there == "meta" else "cpu", quantize=None)
    assert_unchanged(base, before)
    assert (base.lm_head.weight is base.model.embed_tokens.weight) == tied
    assert [t.data_ptr() for t in tensors] == places
    assert torch.equal(logits(base, ids), want)


def test_bitsandbytes_weights_come_back_as_they_were_quantised(monkeypatch):
    bnb = pytest.importorskip("bitsandbytes")
    net = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4"), nn.Linear(64, 8), Full())
    before, weight = dict(vars(net[0].weight)), net[0].weight

    def quantises(model, device):
        net[0].to(device)  # on its way bitsandbytes quantises
        assert net[0].weight.bnb_quantized
        model._apply(torch.clone)

    monkeypatch.setattr(nn.Sequential, "to", quantises)
    with pytest.raises(torch.OutOfMemoryError):
        fastlora.get_peft_model(net, LoraConfig(r=2, target_modules=["1"]), device="cpu")
    assert net[0].weight is weight and weight.dtype == torch.float32 and weight.shape == (64, 64)
    assert vars(weight) == before and not weight.bnb_quantized


def test_an_error_leaves_the_model_as_it_was():
    base = tiny_llama()
    before = list(base.named_modules())
    with pytest.raises(ValueError, match="input_layernorm"):
        own(base, target_modules=["q_proj", "input_layernorm"])
    assert list(base.named_modules()) == before


# ---- stock PEFT over bitsandbytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_accelerate_takes_linear4bit_as_it_is(dtype, quant_type, device):
    model, ids = stock(device, dtype, quant_type), some_ids(rows=4).to(device)
    keys = list(dict(model.named_parameters()))
    want, want_grads = loss_and_grads(model, ids)
    fastlora.accelerate(model)
    assert all(layer.accelerated for layer in fastlora.acceleration_report(model))
    fastlora.reset_launches()
    got, got_grads = loss_and_grads(model, ids)
    ran = {op: 0 for op, _ in fastlora.launches()}
    for (op, _), count in fastlora.launches().items():
        ran[op] += count
    # Few rows may take the codes as they are. The first layer's three need no dX.
    reading = ("dequantize", "nf4_few", "nf4_gemm", "nf4_dx")
    assert sum(ran.get(op, 0) for op in reading) >= 14 + 11
    assert list(dict(model.named_parameters())) == keys
    assert got_grads.keys() == want_grads.keys()
    tolerance = 1e-4 if dtype == torch.float32 else 6e-2
    torch.testing.assert_close(got, want, rtol=tolerance, atol=0)
    for name, value in want_grads.items():
        assert (got_grads[name] - value).norm() <= tolerance * value.norm() + 1e-6, name
    fastlora.restore(model)
    assert {type(m).__name__ for m in model.modules() if hasattr(m, "lora_A")} == {"Linear4bit"}
    again, _ = loss_and_grads(model, ids)
    assert torch.equal(again, want)


def test_the_weight_is_read_where_bitsandbytes_keeps_it(device):
    model = fastlora.accelerate(stock(device))
    ids = some_ids().to(device)
    with torch.no_grad():
        before = model(ids).logits
        for module in model.modules():
            if type(module).__name__ == "Linear4bit" and hasattr(module, "compute_dtype"):
                module.weight.data.fill_(0x77)  # all zeros
        after = model(ids).logits
        moved = copy.deepcopy(model)
        assert torch.equal(moved(ids).logits, after)
    assert not torch.equal(before, after)


def test_an_accelerated_model_is_pickled(device):
    import pickle

    model, ids = fastlora.accelerate(stock(device)), some_ids().to(device)
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert all(layer.accelerated for layer in fastlora.acceleration_report(again))


def test_a_weight_repacked_in_between_runs_bitsandbytes_own_way(device):
    """With adapters off, eval on a CPU with AVX-512 bf16 lets bitsandbytes repack; then nothing else reads it."""
    model, ids = fastlora.accelerate(stock(device)), some_ids().to(device)
    with torch.no_grad():
        before = model(ids).logits  # wrapped by now
        model.eval()
        with model.disable_adapter():
            model(ids)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
        if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            layer.weight.quant_state.packing_format_for_cpu = True  # what it would have left
            report = fastlora.acceleration_report(model)
            assert sum("packed anew" in r.reason for r in report) == 1
            layer.weight.quant_state.packing_format_for_cpu = False
        torch.testing.assert_close(model(ids).logits, before, atol=3e-2, rtol=0)  # in bf16


def test_a_validation_in_inference_mode_does_not_end_training(device):
    model, ids = stock(device), some_ids().to(device)
    want, _ = loss_and_grads(model, ids)
    fastlora.accelerate(model)
    with torch.inference_mode():
        model(ids)
    got, grads = loss_and_grads(model, ids)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)
    assert grads


@pytest.mark.parametrize("leave", [lambda model: None, fastlora.restore])
def test_a_moved_model_holds_nothing_where_it_was(leave, device):
    """Before its next forward: what accelerate() keeps of a weight is a view of its memory."""
    from fastlora.models import peft_linear

    model, ids = fastlora.accelerate(stock(device)), some_ids().to(device)
    with torch.no_grad():
        want = model(ids).logits
    weights = [p for p in model.parameters() if hasattr(p, "quant_state")]
    views = [weakref.ref(peft_linear._wraps[weight][1].codes) for weight in weights]
    assert len(views) == 14 and all(view() is not None for view in views)
    leave(model)
    model.to(device)
    gc.collect()
    assert not any(view() is not None for view in views)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("build", ["accelerated", "own"])
def test_a_compiled_model_is_one_graph_as_stock_is(build, dtype, device):
    ids = some_ids(rows=4).to(device)
    theirs = stock(device, dtype)
    torch._dynamo.reset()
    torch.compile(theirs, backend="aot_eager", fullgraph=True)(ids)  # so that this can be asked
    model = own(rows_of_blocks().to(dtype), device).train() if build == "own" else fastlora.accelerate(theirs)  # fmt: skip
    want, want_grads = loss_and_grads(model, ids)
    torch._dynamo.reset()
    fastlora.reset_launches()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got, got_grads = loss_and_grads(compiled, ids)
    assert any(op in READING for op, _ in fastlora.launches())
    torch.testing.assert_close(got, want)
    prefix = "_orig_mod."
    assert got_grads.keys() == {prefix + name for name in want_grads}
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name, value in want_grads.items():
        assert (got_grads[prefix + name] - value).norm() <= tolerance * value.norm() + 1e-6, name


def test_a_compiled_model_reads_the_weight_where_it_is_and_follows_its_adapters(device):
    model, ids = fastlora.accelerate(stock(device)), some_ids().to(device)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        before = compiled(ids).logits
        torch.testing.assert_close(before, model(ids).logits)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        layer.base_layer.weight.data.fill_(0x77)  # all zeros
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
        assert not torch.allclose(compiled(ids).logits, before, atol=1e-3)
        with model.disable_adapter():
            torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


def prepared(device, **settings):
    """The recipe of PEFT's and transformers' documents: bf16 told, everything that is not in 4 bits cast to fp32."""
    bnb = pytest.importorskip("bitsandbytes")
    model = stock(device, BF16, model=rows_of_blocks(attention_bias=True), **settings)
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    told = {m.compute_dtype for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)}
    floats = {p.dtype for p in model.parameters() if p.is_floating_point()}
    assert told == {BF16} and floats == {torch.float32}
    return model


def autocast(on, device):
    return torch.autocast(device.type, BF16, enabled=on)


@pytest.mark.parametrize("on", [True, False], ids=["autocast", "plain"])
def test_the_usual_recipe_is_accelerated(on, device):
    """What prepare_model_for_kbit_training makes launches what the model it was made of does, and is as near to exact as
    stock is where it computes in bf16: under autocast (without, its low-rank path is in fp32, fastlora's is not)."""
    ids = some_ids(rows=4).to(device)

    def launched(model, on=on):
        fastlora.reset_launches()
        with autocast(on, device):
            found = loss_and_grads(model, ids)
        return *found, fastlora.launches()

    unprepared = fastlora.accelerate(stock(device, BF16, model=rows_of_blocks(attention_bias=True)))
    *_, want = launched(unprepared)
    model = prepared(device)
    loss, grads, nothing = launched(model, True)
    assert not nothing
    exact = stock(
        device, compute=torch.float32, model=rows_of_blocks(attention_bias=True).bfloat16()
    )
    for name, module in exact.named_modules():
        if hasattr(module, "compute_dtype") and hasattr(module, "quant_state"):
            module.weight = model.get_submodule(name).weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                exact.get_parameter(name).copy_(parameter)
    true_loss, true = loss_and_grads(exact, ids)
    fastlora.accelerate(model)
    got_loss, got, ran = launched(model)
    assert ran == want and sum(n for (op, _), n in ran.items() if op in READING) >= 14 + 11
    away = abs(loss - true_loss)
    assert away > 0 and abs(got_loss - true_loss) <= 2 * away + 2**-9 * true_loss
    assert got.keys() == grads.keys() == true.keys() and len(got) == 28
    for name, value in true.items():
        assert got[name].dtype == torch.float32
        theirs = (grads[name] - value).norm()
        assert (got[name] - value).norm() <= 2 * theirs + 2**-8 * value.norm(), name
    assert torch.equal(launched(fastlora.restore(model), True)[0], loss)


@pytest.mark.parametrize("compute", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("cast_to", [None, BF16])
def test_a_linear_computes_in_the_dtype_that_bitsandbytes_was_told(compute, dtype, cast_to, device):
    """Under autocast too; y has x's dtype. Where autocast could widen that, PEFT's own forward runs."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(64, 96, quant_type="nf4", compute_dtype=compute).to(device)
    linear.bias.requires_grad_(False)
    net = nn.Sequential(linear)
    net.is_loaded_in_4bit = True
    model = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["0"]))
    randomize_adapters(model)
    layer = model.base_model.model[0]
    x = torch.randn(5, 64, device=device).to(dtype)
    dy = torch.randint(-8, 9, (5, 96), device=device) / 8  # the same number in every dtype

    def run(call, x):
        leaves = [x.detach().requires_grad_(), *(p for p in model.parameters() if p.requires_grad)]
        y = call(leaves[0])
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    def under_autocast(x):
        with torch.autocast(device.type, cast_to, enabled=cast_to is not None):
            return model(x)

    def formula(dtype, x):
        a, b = (f["default"].weight.to(dtype) for f in (layer.lora_A, layer.lora_B))
        weight = NF4Tensor.from_bitsandbytes(linear.weight).dequantize(compute).to(dtype)
        before, x, s = x.dtype, x.to(dtype), layer.scaling["default"]
        y = x @ weight.t() + linear.bias.to(dtype) + s * (x @ a.t() @ b.t())
        return y if dtype == torch.float64 else y.to(before)

    truth = run(partial(formula, torch.float64), x.double())
    same_dtype, stocks = run(partial(formula, compute), x), run(under_autocast, x)
    fastlora.accelerate(model)
    fastlora.reset_launches()
    ours = run(under_autocast, x)
    widens = dtype == torch.float16 and cast_to == BF16
    assert widens != any(op in READING for op, _ in fastlora.launches())
    assert [t.dtype for t in ours] == [t.dtype for t in stocks]
    rows = [] if widens else zip(("y", "dx", "dA", "dB"), ours, same_dtype, truth, strict=True)
    for name, *three in rows:
        assert_accurate(name, *three)


def test_a_prepared_model_is_compiled_to_one_graph(device):
    model, ids = fastlora.accelerate(prepared(device)), some_ids(rows=4).to(device)
    want, want_grads = loss_and_grads(model, ids)
    torch._dynamo.reset()
    fastlora.reset_launches()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got, got_grads = loss_and_grads(compiled, ids)
    assert any(op in READING for op, _ in fastlora.launches())
    torch.testing.assert_close(got, want)
    for name, value in want_grads.items():
        away = (got_grads[f"_orig_mod.{name}"] - value).norm()
        assert away <= 2e-2 * value.norm() + 1e-6, name


def test_a_small_run_follows_peft_over_bitsandbytes(device):
    """One seed, one batch a step: the losses of 60 steps stay within the noise of two runs in bf16."""
    ids = (
        torch.arange(16 * 32, device=device).view(16, 32) * 7 % 90 + 3
    )  # each follows from the last

    def curve(model):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        losses = []
        for step in range(60):
            loss, _ = loss_and_grads(model, ids[step % 2 * 8 :][:8])
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses)

    def base():
        return tiny_llama(hidden_size=256, intermediate_size=512, num_attention_heads=8)

    settings = {"target_modules": "all-linear", "lora_alpha": 64}
    theirs = curve(stock(device.type, BF16, model=base(), **settings))
    fast = curve(fastlora.accelerate(stock(device.type, BF16, model=base(), **settings)))
    ours = own(base().to(BF16), device, **settings)
    ours = curve(ours.train())
    assert theirs[-8:].mean() < 0.85 * theirs[:8].mean()
    for name, losses in (("accelerated", fast), ("own", ours)):
        assert (losses - theirs).abs().max() < 0.05 * theirs[0], name
        assert (losses - theirs).mean().abs() < 0.02 * theirs[0], name


def test_explain_reads_a_linear4bit(device):
    """Its shape is the weight's, not that of the bytes it is packed in; it computes in the dtype that it was told."""
    model = fastlora.accelerate(prepared(device))
    layer = next(m for n, m in model.named_modules() if n.endswith("q_proj"))
    state = layer.base_layer.weight.quant_state
    n, k = state.shape
    lines = fastlora.explain(layer, torch.randn(5, k, device=device)).splitlines()
    assert any(f"M=5 K={k} N={n} r=" in line and "torch.bfloat16" in line for line in lines)
    assert any(name in line for line in lines for name in ("dequantize", "nf4_"))
    state.quant_type = "int3"
    with pytest.raises(TypeError, match="4-bit weight is of type 'int3'"):
        fastlora.explain(layer, torch.randn(5, k, device=device))
