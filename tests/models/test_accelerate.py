"""accelerate and restore on stock PEFT models: same numbers, same keys, and PEFT's own forward
wherever that differs."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear
from torch import nn

import fastlora
from fastlora.models.peft_linear import FastLoraLinear
from tests.tiny_models import (
    logits,
    loss_and_grads,
    plain_net,
    randomize_adapters,
    snapshot,
    some_ids,
    tiny_llama,
)

TARGETS = ["q_proj", "v_proj", "down_proj"]


def stock(seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny_llama(dtype=dtype), config)
    randomize_adapters(model)
    return model


def gemms() -> int:
    return sum(count for (op, _), count in fastlora.launches().items() if op == "gemm")


def fast_layers(model: nn.Module, ids: torch.Tensor) -> int:
    """How many layers of one forward went through fastlora.lora_linear."""
    fastlora.reset_launches()
    with torch.no_grad():
        logits(model, ids)
    return gemms()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", ["none", "all"])
def test_outputs_and_gradients_are_stock_pefts(bias: str, rslora: bool) -> None:
    model, ids = stock(bias=bias, use_rslora=rslora), some_ids()
    keys = list(model.state_dict())
    want, want_grads = loss_and_grads(model, ids)
    assert fastlora.accelerate(model) is model
    assert fast_layers(model, ids) == 6
    got, got_grads = loss_and_grads(model, ids)
    torch.testing.assert_close(got, want)
    assert got_grads.keys() == want_grads.keys()
    for name, grad in want_grads.items():
        torch.testing.assert_close(got_grads[name], grad, msg=name)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widen", [True, False])
def test_low_precision_keeps_the_accuracy_rule(dtype: torch.dtype, widen: bool) -> None:
    """Error against fp64 at most twice that of PEFT's own formula carried out in ``dtype``."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48)).to(dtype)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(net, config, autocast_adapter_dtype=widen)
    x, grad = torch.randn(33, 64, dtype=dtype), torch.randn(33, 48, dtype=dtype)

    def run(m: nn.Module, dt: torch.dtype) -> list[torch.Tensor]:
        m.zero_grad()
        inputs = x.clone().to(dt).requires_grad_()
        y = m(inputs)
        y.backward(grad.to(dt))
        layer = m.base_model.model[0]
        weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        return [t.detach().double() for t in (y, inputs.grad, *(w.grad for w in weights))]

    exact = run(copy.deepcopy(model).double(), torch.float64)
    theirs = run(copy.deepcopy(model).to(dtype), dtype)
    fastlora.accelerate(model)
    fastlora.reset_launches()
    ours = run(model, dtype)
    assert gemms() == 2
    for e, t, o in zip(exact, theirs, ours):
        assert (o - e).abs().max() <= 2 * (t - e).abs().max() + 1e-6


def test_under_autocast() -> None:
    model, ids = stock(), some_ids()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = logits(model, ids)
        fastlora.accelerate(model)
        assert fast_layers(model, ids) == 6
        got = logits(model, ids)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, atol=0.03, rtol=0.05)


def test_dropout_is_drawn_in_training_only_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 16))
    config = peft.LoraConfig(r=4, target_modules=["0"], lora_dropout=0.5, init_lora_weights=False)
    model = peft.get_peft_model(net, config)
    x = torch.randn(4, 32)
    model.eval()
    want = model(x)
    fastlora.accelerate(model)
    torch.testing.assert_close(model(x), want)
    model.train()
    with torch.no_grad():
        draws = torch.stack([model(x) for _ in range(3000)])
    assert draws.std(0).max() > 0.1
    error = draws.std(0) / 3000**0.5
    assert ((draws.mean(0) - want).abs() < 6 * error + 1e-6).all()
    model.base_model.model[0].lora_dropout.eval()  # PEFT's forward asks the dropout module
    torch.testing.assert_close(model(x), want)


def test_restore_is_the_exact_inverse_and_both_are_idempotent() -> None:
    model, ids = stock(), some_ids()
    before, want = snapshot(model), logits(model, ids)
    fastlora.accelerate(fastlora.accelerate(model))
    assert sum(type(m) is FastLoraLinear for m in model.modules()) == 6
    assert all(isinstance(m, Linear) for m in model.modules() if type(m) is FastLoraLinear)
    assert fastlora.restore(fastlora.restore(model)) is model
    after = snapshot(model)
    for part in ("types", "modules", "parameters", "trained", "training"):
        assert after[part] == before[part]
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert torch.equal(logits(model, ids), want)
    assert fast_layers(model, ids) == 0


def disable(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def merge(model: Any) -> None:
    model.merge_adapter()


def two_active(model: Any) -> None:
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=TARGETS))
    randomize_adapters(model)
    model.base_model.set_adapter(["default", "second"])


def dora_active(model: Any) -> None:
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=TARGETS, use_dora=True))
    model.set_adapter("second")


def lora_layers(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


def hook(part: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for layer in lora_layers(model):
            module = getattr(layer, part)
            module = module if part == "base_layer" else module["default"]
            module.register_forward_hook(lambda m, args, out: out * 1.5)

    return change


def own_forward(model: Any) -> None:
    for layer in lora_layers(model):
        base = layer.base_layer
        base.forward = lambda x, base=base: 2 * nn.Linear.forward(base, x)


def train_base(model: Any) -> None:
    for layer in lora_layers(model):
        layer.base_layer.weight.requires_grad_(True)


def low_adapters(model: Any) -> None:
    for layer in lora_layers(model):
        layer.lora_A.bfloat16()
        layer.lora_B.bfloat16()


def other_dropout(model: Any) -> None:
    for layer in lora_layers(model):
        layer.lora_dropout["default"] = nn.AlphaDropout(0.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (disable, "disabled"),
        (merge, "merged"),
        (two_active, "2 active adapters"),
        (dora_active, "DoRA"),
        (hook("base_layer"), "base_layer or lora_A has a hook"),
        (hook("lora_A"), "base_layer or lora_A has a hook"),
        (hook("lora_B"), "lora_B or lora_dropout has a hook"),
        (hook("lora_dropout"), "lora_B or lora_dropout has a hook"),
        (own_forward, "forward of its own"),
        (train_base, "trained"),
        (other_dropout, "dropout"),
        (low_adapters, None),  # seen at the call only
    ],
)
def test_pefts_own_forward_runs_wherever_the_fast_one_would_differ(
    change: Callable[[Any], None], reason: str | None
) -> None:
    plain, model, ids = stock(), fastlora.accelerate(stock()), some_ids()
    change(plain)
    change(model)
    assert fast_layers(model, ids) == 0
    assert torch.equal(logits(model, ids), logits(plain, ids))
    report = fastlora.acceleration_report(model)
    assert len(report) == 6
    if reason is not None:
        assert all(not r.accelerated and reason in r.reason for r in report), report[0]


def test_and_comes_back_when_the_state_does() -> None:
    model, ids = fastlora.accelerate(stock()), some_ids()
    want = logits(model, ids)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, ids), want)
    model.unmerge_adapter()
    assert fast_layers(model, ids) == 6
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, ids), logits(tiny_llama(), ids))
    assert fast_layers(model, ids) == 6
    assert all(r.accelerated and r.reason == "" for r in fastlora.acceleration_report(model))


def test_mixed_batches_go_to_peft() -> None:
    plain, model, ids = stock(), fastlora.accelerate(stock()), some_ids()
    for m in (plain, model):
        m.add_adapter("second", peft.LoraConfig(r=2, target_modules=TARGETS))
        randomize_adapters(m)
        m.eval()
    names = ["second", "__base__"]
    fastlora.reset_launches()
    got = model(ids, adapter_names=names).logits
    assert gemms() == 0
    assert torch.equal(got, plain(ids, adapter_names=names).logits)


def test_set_scale_and_switching_keep_working() -> None:
    plain, model, ids = stock(), fastlora.accelerate(stock()), some_ids()
    for m in (plain, model):
        for layer in lora_layers(m):
            layer.set_scale("default", 3.0)
    torch.testing.assert_close(logits(model, ids), logits(plain, ids))
    for m in (plain, model):
        m.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
        randomize_adapters(m)
        m.set_adapter("second")
    torch.testing.assert_close(logits(model, ids), logits(plain, ids))
    assert fast_layers(model, ids) == 2
    for layer in lora_layers(model):
        layer.scaling = {name: torch.tensor(float(s)) for name, s in layer.scaling.items()}
    torch.testing.assert_close(logits(model, ids), logits(plain, ids))
    assert fast_layers(model, ids) == 2


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "Embedding"),
    ],
)
def test_layers_without_a_fast_path_are_left_and_named(
    settings: dict[str, Any], reason: str
) -> None:
    model, ids = stock(**settings), some_ids()
    want = logits(model, ids)
    types = {name: type(m) for name, m in model.named_modules()}
    fastlora.accelerate(model)
    left = [r for r in fastlora.acceleration_report(model) if not r.accelerated]
    assert left
    assert all(reason in r.reason for r in left)
    changed = {n for n, m in model.named_modules() if type(m) is not types[n]}
    assert changed == {r.name for r in fastlora.acceleration_report(model) if r.accelerated}
    torch.testing.assert_close(logits(model, ids), want)


def test_other_bases_are_left_and_named() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    small = GPT2Config(vocab_size=96, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = fastlora.accelerate(peft.get_peft_model(GPT2LMHeadModel(small), config))
    assert [r.reason for r in fastlora.acceleration_report(model)] == [
        "its base is a Conv1D, not an nn.Linear"
    ]
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 6))
    model = peft.get_peft_model(conv, peft.LoraConfig(r=2, target_modules=["0", "1"]))
    reasons = [r.reason for r in fastlora.acceleration_report(fastlora.accelerate(model))]
    assert reasons == ["PEFT's Conv2d layer has no fast path", ""]


def test_plain_torch_models_and_injected_layers() -> None:
    model = peft.get_peft_model(plain_net(), peft.LoraConfig(r=4, target_modules=["up", "down"]))
    randomize_adapters(model)
    ids = some_ids()
    want = logits(model, ids)
    fastlora.accelerate(model)
    assert fast_layers(model, ids) == 4
    torch.testing.assert_close(logits(model, ids), want)
    inner = model.base_model.model
    assert fastlora.restore(inner) is inner
    assert fast_layers(model, ids) == 0


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no PEFT LoRA layer"):
        fastlora.accelerate(plain_net())
    for function in (fastlora.accelerate, fastlora.restore, fastlora.acceleration_report):
        with pytest.raises(TypeError, match="str"):
            function("model")
    own = fastlora.get_peft_model(plain_net(), fastlora.LoraConfig(target_modules=["up"]))
    assert fastlora.accelerate(own) is own
    assert fastlora.restore(plain_net()) is not None


def test_errors_are_the_ones_of_the_base() -> None:
    model = fastlora.accelerate(
        peft.get_peft_model(nn.Sequential(nn.Linear(6, 5)), peft.LoraConfig(target_modules=["0"]))
    )
    for bad in (torch.randn(2, 7), torch.randn(2, 6).double(), torch.ones(2, 6, dtype=torch.long)):
        with pytest.raises(RuntimeError) as mine:
            model(bad)
        with pytest.raises(RuntimeError) as theirs:
            fastlora.restore(model)(bad)
        assert str(mine.value) == str(theirs.value)
        fastlora.accelerate(model)


def test_deepcopy_pickle_and_state_dict() -> None:
    model, ids = fastlora.accelerate(stock()), some_ids()
    want = logits(model, ids)
    twin = copy.deepcopy(model)
    assert fast_layers(twin, ids) == 6
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert fast_layers(loaded, ids) == 6
    for other in (twin, loaded):
        assert torch.equal(logits(other, ids), want)
    fresh = stock()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(fresh, ids), want)


def test_pefts_own_operations_keep_working(tmp_path: Any) -> None:
    model, ids = fastlora.accelerate(stock()), some_ids()
    want = logits(model, ids)
    assert {status.module_type for status in model.get_layer_status()} == {"lora.FastLoraLinear"}
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(again, ids), want)
    torch.testing.assert_close(logits(model.merge_and_unload(), ids), want)


class Wrapped(torch.Tensor):
    """A subclass with its own dispatch, as quantised and distributed tensors are."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, context: None, size: Any, stride: Any) -> Any:
        return Wrapped(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = torch.utils._pytree.tree_map_only(Wrapped, lambda t: t.inner, args)
        out = func(*plain, **(kwargs or {}))
        return Wrapped(out) if func is torch.ops.aten.detach.default else out


class Plain(torch.Tensor):
    """A subclass that only intercepts functions."""


@pytest.mark.parametrize("kind", [Wrapped, lambda t: t.as_subclass(Plain)])
def test_tensor_subclasses_go_to_peft(kind: Callable[[torch.Tensor], torch.Tensor]) -> None:
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)
    x = torch.randn(3, 6)
    want = model(x)
    fastlora.accelerate(model)
    base = model.base_model.model[0].base_layer
    base.weight = nn.Parameter(kind(base.weight.detach()), requires_grad=False)
    fastlora.reset_launches()
    torch.testing.assert_close(model(x).as_subclass(torch.Tensor), want)
    assert gemms() == 0
