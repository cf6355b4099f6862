"""Merging in one layer: W + s B A as it is kept, what that costs, and every bit of W afterwards."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoRALinear, NF4Tensor, QLoRALinear
from fastlora.layers import LoRAWrapper

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
N, K = 96, 128


def layer(kind, dtype=FP32, size=0.02, device="cpu", **settings):
    """A layer whose adapter's update is about as large as ``size`` times its weight."""
    torch.manual_seed(0)
    made = kind.from_linear(nn.Linear(K, N, dtype=dtype, device=device), **{"r": 8, **settings})
    for name, b in made.lora_B.items():
        nn.init.normal_(b)
        a = made.lora_A[name]
        with torch.no_grad():
            b *= size * made._floats().norm() / ((b @ a) * made.scaling[name]).norm()
    return made


def exact_of(made, dtype=FP64):
    """W + s B A in fp64."""
    w = made.weight.dequantize(FP32) if isinstance(made, QLoRALinear) else made.weight
    total = w.to(dtype)
    for name in made.acting_adapters():
        update = made.lora_B[name].to(dtype) @ made.lora_A[name].to(dtype)
        total = total + update * made.scaling[name]
    return total.detach()


def kept(made):
    weight = made.weight
    return (weight.dequantize(FP32) if isinstance(weight, NF4Tensor) else weight).detach().double()


def bits(made):
    return {n: t.clone() for n, t in made.state_dict().items() if n.startswith("weight")}


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64])
def test_floats_are_rounded_once(dtype, device):
    made = layer(LoRALinear, dtype, device=device)
    exact = exact_of(made)
    merged = made.merge()
    rounded = exact.float().to(dtype) if dtype != FP64 else exact
    tolerance = torch.finfo(dtype).eps * exact.abs().max().item()
    torch.testing.assert_close(made.weight.detach(), rounded, rtol=0, atol=tolerance)
    assert made.weight.dtype == dtype
    measured = ((kept(made) - exact).norm() / exact.norm()).item()
    assert merged.error == pytest.approx(measured, rel=0.05, abs=1e-7)
    assert merged.update == pytest.approx(0.02, rel=0.1)
    assert (merged.error == 0) == (dtype in (FP32, FP64))


@pytest.mark.parametrize("block_size", [32, 64, 256])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_four_bits_are_quantised_again_and_the_error_is_reported(
    dtype, double_quant, block_size, device
):
    made = layer(QLoRALinear, dtype, device=device, block_size=block_size, double_quant=double_quant)  # fmt: skip
    exact, before = exact_of(made), made.weight
    merged = made.merge()
    assert made.weight is merged.weight is not before
    for name in ("block_size", "nested_block_size", "dtype", "shape", "quant_type", "device"):
        assert getattr(made.weight, name) == getattr(before, name), name
    measured = ((kept(made) - exact).norm() / exact.norm()).item()
    assert merged.error == pytest.approx(measured, rel=1e-3)
    # Never worse than quantising the exact sum afresh, for that is what it is.
    afresh = NF4Tensor.quantize(exact.float(), block_size, double_quant).dequantize(FP32)
    assert measured == pytest.approx(((afresh - exact).norm() / exact.norm()).item(), rel=1e-2)
    assert (
        merged.error > merged.update / 2
    )  # and so an update of 2 % is lost among codes 10 % apart


@pytest.mark.parametrize("kind", [LoRALinear, QLoRALinear])
def test_forward_of_a_merged_layer_is_that_of_its_weight(kind, device):
    made, x = layer(kind, device=device), torch.randn(5, K, device=device)
    base, apart = nn.functional.linear(x, kept(made).float(), made.bias), made(x)
    made.merge()
    want = nn.functional.linear(x, kept(made).float(), made.bias)
    torch.testing.assert_close(made(x), want, atol=1e-5, rtol=1e-5)
    distance = 0.5 if kind is QLoRALinear else 1e-4
    assert (made(x) - apart).norm() < distance * (apart - made.bias).norm()
    made.enable_adapters(False)
    torch.testing.assert_close(made(x), base, atol=1e-5, rtol=1e-5)
    made.enable_adapters(True)
    torch.testing.assert_close(made(x), want, atol=1e-5, rtol=1e-5)
    made.unmerge()
    assert torch.equal(made(x), apart)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("kind", [LoRALinear, QLoRALinear])
def test_unmerging_gives_every_bit_back(kind, enabled):
    made = layer(kind, BF16)
    before, weight = bits(made), made.weight
    for _ in range(3):
        made.merge()
        assert any(not torch.equal(value, before[name]) for name, value in bits(made).items())
        made.enable_adapters(enabled)
        made.unmerge()
        made.enable_adapters(True)
    assert made.weight is weight and made.acting_adapters() == ["default"]
    for name, value in bits(made).items():
        assert torch.equal(value, before[name]), name
    made.unmerge()  # nothing to do


@pytest.mark.parametrize("change", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.to("cpu")])  # fmt: skip
@pytest.mark.parametrize("kind", [LoRALinear, QLoRALinear])
def test_copies_of_a_merged_layer_can_be_unmerged(kind, change):
    made, x = layer(kind), torch.randn(3, K)
    apart = made(x)
    made.merge()
    keys = set(made.state_dict())
    again = change(made)
    assert torch.equal(again(x), made(x)) and set(again.state_dict()) == keys
    again.unmerge()
    assert torch.equal(again(x), apart)


def test_what_is_kept_aside_is_cast_and_moved_too():
    made = layer(LoRALinear)
    original = made.weight.detach().clone()
    made.merge()
    made.to(BF16)
    made.unmerge()
    assert torch.equal(made.weight, original.to(BF16))
    four = layer(QLoRALinear)
    four.merge()
    four.to("meta")
    assert all(p.is_meta for p in four._shelf[0].parameters())


def test_several_adapters_are_summed():
    made = layer(QLoRALinear)
    made.add_adapter("second", r=4, lora_alpha=3)
    nn.init.normal_(made.lora_B["second"])
    made.set_adapter(["default", "second"])
    exact = exact_of(made)
    merged = made.merge()
    assert made.merged_adapters == ["default", "second"]
    assert merged.error == pytest.approx(((kept(made) - exact).norm() / exact.norm()).item(), rel=1e-3)  # fmt: skip


def test_merged_weight_changes_nothing_and_dequantises():
    made = layer(QLoRALinear, BF16)
    exact, before = exact_of(made), bits(made)
    floats = made.merged_weight(dequantize=True)
    assert floats.weight.dtype == BF16
    assert torch.equal(floats.weight, exact.float().to(BF16))
    assert 0 < floats.error < 0.01 < made.merged_weight().error
    assert not made.merged_adapters
    for name, value in bits(made).items():
        assert torch.equal(value, before[name])


def test_dequantised_weights_have_the_dtype_asked_for_or_the_bias_s():
    made = layer(QLoRALinear).to(BF16)
    assert made.merged_weight(dequantize=True).weight.dtype == BF16
    assert made.merged_weight(dequantize=FP16).weight.dtype == FP16
    made.bias = None
    assert made.merged_weight(dequantize=True).weight.dtype == FP32


def test_a_merged_layer_trains_nothing_and_passes_gradients():
    made = layer(QLoRALinear)
    made.merge()
    x = torch.randn(4, K, requires_grad=True)
    made(x).sum().backward()
    torch.testing.assert_close(x.grad, kept(made).float().sum(0).expand(4, K))
    assert made.lora_A["default"].grad is None
    assert "r=0" in fastlora.explain(made, x) and "merged" in repr(made)


@pytest.mark.parametrize("kind", [LoRALinear, QLoRALinear])
def test_refusals_change_nothing(kind):
    made = layer(kind)
    before = bits(made)
    with torch.no_grad():
        made.lora_B["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="holds NaN"):
        made.merge()
    assert not made.merged_adapters
    for name, value in bits(made).items():
        assert torch.equal(value, before[name])
    with torch.no_grad():
        made.lora_B["default"].zero_()
    made.enable_adapters(False)
    with pytest.raises(ValueError, match="no adapter acts"):
        made.merge()
    made.enable_adapters(True)
    made.merge()
    merged = bits(made)
    for call in (made.merge, lambda: made.add_adapter("more"), made.reset_adapters, getattr(made, "reset_parameters", made.merge), lambda: made.set_adapter("default")):  # fmt: skip
        with pytest.raises(ValueError, match="are merged into the weight; unmerge first"):
            call()
        assert all(torch.equal(value, merged[name]) for name, value in bits(made).items())
    with pytest.raises(ValueError, match="on the meta device"):
        layer(kind).to("meta").merge()


def test_overflow_is_refused():
    made = layer(LoRALinear, FP16)
    with torch.no_grad():
        made.lora_B["default"].fill_(1e6)
    with pytest.raises(ValueError, match=r"overflows torch\.float16"):
        made.merge()


def test_a_base_that_is_not_finite_is_not_laid_to_adapters():
    made = layer(QLoRALinear)
    with torch.no_grad():
        made.weight.absmax.fill_(255)
        made.weight.nested_absmax.view(FP32).fill_(float("inf"))
    made.enable_adapters(False)
    with pytest.raises(ValueError, match="the base's own, no adapter in it, overflows"):
        made.merged_weight(dequantize=True)


def test_large_values_are_not_taken_for_overflow():
    made = layer(LoRALinear, BF16)
    with torch.no_grad():
        made.weight.fill_(1e30)  # its square is infinite in fp32
    assert made.merge().error < 0.01


@pytest.mark.parametrize("kind", [LoRALinear, QLoRALinear])
def test_neither_autocast_nor_a_wide_scaling_changes_the_merge(kind, device):
    made = layer(kind, device=device)
    want = made.merged_weight(dequantize=True)
    assert torch.equal(want.weight, exact_of(made).float())  # rounded once
    made.scaling["default"] = torch.tensor([made.scaling["default"]], dtype=FP64, device=device)
    with torch.autocast(device.type, BF16):
        got = made.merged_weight(dequantize=True)
        merged = made.merge()
    assert torch.equal(got.weight, want.weight) and got[1:] == want[1:]
    if kind is LoRALinear:
        assert made.weight.dtype == FP32 and torch.equal(merged.weight, want.weight)


@pytest.mark.parametrize("kind", [LoRALinear, QLoRALinear])
def test_what_is_merged_in_inference_mode_can_be_trained_on(kind):
    made, x = layer(kind), torch.randn(3, K)
    with torch.inference_mode():
        made.merge()
        base = made.as_base(made.weight)
    assert not any(p.is_inference() for m in (made, base) for p in m.parameters())
    outside = nn.Linear(K, K)
    base(outside(x)).sum().backward()
    made(outside(x)).sum().backward()


def test_what_is_not_ours_to_write_is_refused():
    bnb = pytest.importorskip("bitsandbytes")
    with pytest.raises(NotImplementedError, match="LoRAWrapper leaves its base as it is"):
        LoRAWrapper(nn.Linear(4, 4)).merged_weight()
    fp4 = bnb.nn.Params4bit(torch.randn(N, K), requires_grad=False, quant_type="fp4").to("cpu")
    made = QLoRALinear.from_quantized(NF4Tensor.from_bitsandbytes(fp4))
    with pytest.raises(ValueError, match="cannot be put back into 'fp4'"):
        made.merge()
    assert made.merged_weight(dequantize=True).weight.shape == (N, K)
