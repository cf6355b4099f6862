"""LoRALinear as a module: numbers, keys, copies, devices, dtypes."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlora
from fastlora.layers import LoRALinear, LoRAWrapper


def layer_with_values(**settings: object) -> LoRALinear:
    torch.manual_seed(0)
    return LoRALinear(12, 10, r=4, lora_alpha=8, init_lora_weights=False, **settings)


def expected(layer: LoRALinear, x: torch.Tensor, *names: str) -> torch.Tensor:
    y = F.linear(x, layer.weight, layer.bias)
    for name in names:
        update = x.to(layer.lora_A[name].dtype) @ layer.lora_A[name].T @ layer.lora_B[name].T
        y = y + layer.scaling[name] * update
    return y


@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_formula_and_goes_through_lora_linear(bias: bool) -> None:
    layer, x = layer_with_values(bias=bias), torch.randn(2, 3, 12)
    fastlora.reset_launches()
    y = layer(x)
    assert sum(count for (op, _), count in fastlora.launches().items() if op == "gemm") == 1
    torch.testing.assert_close(y, expected(layer, x, "default"))
    assert not torch.allclose(y, expected(layer, x))


def test_gradients_reach_the_adapter_alone_and_are_right() -> None:
    layer, x = layer_with_values(), torch.randn(5, 12, requires_grad=True)
    grad = torch.randn(5, 10)
    layer(x).backward(grad)
    assert layer.weight.grad is None
    assert layer.bias is not None
    assert layer.bias.grad is None
    a, b = (layer.lora_A["default"], layer.lora_B["default"])
    s = layer.scaling["default"]
    torch.testing.assert_close(b.grad, s * grad.T @ (x @ a.T))
    torch.testing.assert_close(a.grad, s * (grad @ b).T @ x)
    torch.testing.assert_close(x.grad, grad @ layer.weight + s * grad @ b @ a)


@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12)])
def test_output_may_be_changed_in_place(shape: tuple[int, ...]) -> None:
    """nn.ReLU(inplace=True), ``y += residual`` and the like, as after nn.Linear."""
    layer, x = layer_with_values(), torch.randn(shape)
    want = torch.relu(expected(layer, x, "default") + 1)
    y = layer(x)
    y += 1
    torch.relu_(y)
    torch.testing.assert_close(y, want)
    y.sum().backward()
    assert layer.lora_B["default"].grad.abs().sum() > 0


def test_bias_trains_when_asked() -> None:
    layer = layer_with_values()
    assert layer.bias is not None
    layer.bias.requires_grad_()
    grad = torch.randn(5, 10)
    layer(torch.randn(5, 12)).backward(grad)
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))


def test_state_dict_keys_and_round_trip() -> None:
    layer = layer_with_values()
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A.default", "lora_B.default"]
    other = LoRALinear(12, 10, r=4, lora_alpha=8)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 12)
    assert torch.equal(other(x), layer(x))


def test_base_checkpoint_loads_by_nn_linear_names() -> None:
    linear, layer = nn.Linear(12, 10), layer_with_values()
    result = layer.load_state_dict(linear.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys == ["lora_A.default", "lora_B.default"]
    assert torch.equal(layer.weight, linear.weight)


def test_from_linear_shares_and_freezes() -> None:
    linear = nn.Linear(12, 10).eval()
    layer = LoRALinear.from_linear(linear, r=4)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not linear.weight.requires_grad
    assert not linear.bias.requires_grad
    assert not layer.training
    x = torch.randn(3, 12)
    torch.testing.assert_close(layer(x), linear(x))  # B starts at zero


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"r": 0}, ValueError),
        ({"r": 513}, ValueError),
        ({"r": True}, ValueError),
        ({"lora_dropout": 1.5}, ValueError),
        ({"lora_dropout": float("nan")}, ValueError),
        ({"init_lora_weights": "mica"}, ValueError),
        ({"init_lora_weights": "loftq"}, ValueError),
        ({"lora_bias": True, "use_dora": True}, ValueError),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, ValueError),
        ({"adapter_name": "a.b"}, ValueError),
        ({"adapter_name": "keys"}, ValueError),
        ({"init_lora_weights": "pissa", "r": 11}, ValueError),
    ],
)
def test_bad_arguments_leave_the_linear_as_it_was(
    settings: dict[str, object], error: type[Exception]
) -> None:
    linear = nn.Linear(12, 10)
    with pytest.raises(error, match=next(iter(settings))):
        LoRALinear.from_linear(linear, **settings)
    assert linear.weight.requires_grad
    assert linear.bias.requires_grad


def test_from_linear_refuses_what_is_no_float_linear() -> None:
    with pytest.raises(TypeError, match="Conv1d"):
        LoRALinear.from_linear(nn.Conv1d(2, 2, 1))
    quantised = nn.Linear(4, 4)
    quantised.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="uint8"):
        LoRALinear.from_linear(quantised)


def test_deepcopy_is_independent() -> None:
    layer, x = layer_with_values(), torch.randn(3, 12)
    twin = copy.deepcopy(layer)
    before = layer(x)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        twin.lora_B["default"].zero_()
    twin.scaling["default"] = 0.0
    assert torch.equal(layer(x), before)


def test_pickles_through_torch_save() -> None:
    layer, x = layer_with_values(lora_dropout=0.1).eval(), torch.randn(3, 12)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), layer(x))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert list(loaded) == list(layer.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_base_keeps_fp32_adapters(dtype: torch.dtype) -> None:
    layer = LoRALinear(12, 10, r=4, dtype=dtype, init_lora_weights=False)
    assert layer.weight.dtype == dtype
    assert layer.lora_A["default"].dtype == torch.float32
    x = torch.randn(6, 12, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    exact = expected(copy.deepcopy(layer).double(), x.double(), "default")
    torch.testing.assert_close(y.double(), exact, atol=0.05, rtol=0.02)
    y.float().sum().backward()
    assert layer.lora_A["default"].grad.dtype == torch.float32


def test_adapter_dtype_is_free() -> None:
    layer = LoRALinear(12, 10, r=4, dtype=torch.bfloat16, adapter_dtype=torch.bfloat16)
    assert layer.lora_B["default"].dtype == torch.bfloat16
    assert LoRALinear(12, 10, dtype=torch.float64).lora_A["default"].dtype == torch.float64


def test_casts_with_the_model() -> None:
    layer = layer_with_values().to(torch.bfloat16)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer(torch.randn(3, 12, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer_with_values().half()(torch.randn(3, 12).half()).dtype == torch.float16


def test_adapters_below_the_inputs_precision_follow_peft() -> None:
    layer, x = layer_with_values(), torch.randn(6, 12)
    layer.lora_A.bfloat16()
    layer.lora_B.bfloat16()
    y = layer(x)
    assert y.dtype == torch.float32
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    want = F.linear(x, layer.weight, layer.bias) + F.linear(F.linear(x.bfloat16(), a), b) * 2.0
    torch.testing.assert_close(y, want)


def test_autocast_computes_in_its_dtype() -> None:
    layer, x = layer_with_values(), torch.randn(6, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected(layer, x, "default"), atol=0.05, rtol=0.05)


def test_meta_device_then_real() -> None:
    layer = LoRALinear(12, 10, r=4, device="meta", use_rslora=True)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    layer.to_empty(device="cpu")
    layer.scaling["default"] = 99.0
    layer.reset_parameters()
    assert layer.scaling["default"] == 16.0  # 32 / sqrt(4)
    assert torch.count_nonzero(layer.lora_B["default"]) == 0
    assert layer.lora_A["default"].std() > 0
    assert 0 < layer.weight.abs().max() <= 12**-0.5
    torch.testing.assert_close(
        layer(torch.ones(2, 12)), F.linear(torch.ones(2, 12), layer.weight, layer.bias)
    )


def test_meta_layer_resets_pissa_from_its_new_weight() -> None:
    layer = LoRALinear(12, 10, r=4, lora_alpha=8, device="meta", init_lora_weights="pissa")
    layer.to_empty(device="cpu").reset_parameters()
    assert torch.count_nonzero(layer.lora_B["default"]) > 0
    assert (
        torch.linalg.matrix_rank(layer.weight) == 6
    )  # 10 less the 4 directions moved to the adapter


def test_disable_enable_and_no_adapter() -> None:
    layer, x = layer_with_values(), torch.randn(3, 12)
    base = F.linear(x, layer.weight, layer.bias)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base)
    layer.enable_adapters()
    assert not torch.allclose(layer(x), base)
    layer.set_adapter([])
    assert torch.equal(layer(x), base)


def test_several_adapters_switch_and_add_up() -> None:
    layer, x = layer_with_values(), torch.randn(3, 12)
    layer.add_adapter("second", r=2, lora_alpha=1, use_rslora=True, init_lora_weights=False)
    assert layer.scaling["second"] == pytest.approx(2**-0.5)
    assert layer.active_adapters == ["default"]
    layer.set_adapter("second")
    torch.testing.assert_close(layer(x), expected(layer, x, "second"))
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == [
        "lora_A.second",
        "lora_B.second",
    ]
    layer.set_adapter(["default", "second"], trainable=False)
    torch.testing.assert_close(layer(x), expected(layer, x, "default", "second"))
    assert not any(p.requires_grad for p in layer.parameters())
    layer.set_adapter(["elsewhere"])
    torch.testing.assert_close(layer(x), expected(layer, x))
    with pytest.raises(ValueError, match="second"):
        layer.add_adapter("second")


def test_scaling_is_read_at_every_forward_and_may_be_a_tensor() -> None:
    layer, x = layer_with_values(), torch.randn(3, 12)
    layer.scaling["default"] = 0.25
    torch.testing.assert_close(layer(x), expected(layer, x, "default"))
    layer.scaling["default"] = torch.tensor(-3.0)
    torch.testing.assert_close(layer(x), expected(layer, x, "default"))
    assert "scaling=-3" in repr(layer)


def test_dropout_acts_in_training_and_on_the_low_rank_path_only() -> None:
    layer, x = layer_with_values(lora_dropout=0.5), torch.randn(64, 12)
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(layer(x), first)
    torch.testing.assert_close(layer.eval()(x), expected(layer, x, "default"))
    layer.train()
    with torch.no_grad():
        layer.lora_B["default"].zero_()
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_a_trained_base_weight_is_refused_with_the_reason() -> None:
    layer = layer_with_values()
    layer.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="requires_grad"):
        layer(torch.randn(3, 12))


def test_repr_tells_rank_scaling_and_state() -> None:
    layer = layer_with_values(lora_dropout=0.1)
    assert "default(r=4, scaling=2, dropout=0.1)" in repr(layer)
    layer.enable_adapters(False)
    assert "inactive" in repr(layer)


class OwnLinear(nn.Linear):
    """A linear whose forward is not nn.Linear's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_wrapper_keeps_the_bases_forward() -> None:
    torch.manual_seed(0)
    base = OwnLinear(12, 10)
    layer, x = LoRAWrapper(base, r=4, lora_alpha=8, init_lora_weights=False), torch.randn(3, 12)
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    torch.testing.assert_close(layer(x), base(x) + 2.0 * x @ a.T @ b.T)
    keys = ["lora_A.default", "lora_B.default", "base_layer.weight", "base_layer.bias"]
    assert sorted(layer.state_dict()) == sorted(keys)
    assert layer.weight is base.weight
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base(x))


class Int8Linear(nn.Module):
    """A quantised linear as libraries write them: integer storage, features as attributes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.step = float(linear.weight.detach().abs().max()) / 127
        self.register_buffer("weight", (linear.weight / self.step).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight * self.step).T


def test_wrapper_over_a_quantised_linear() -> None:
    torch.manual_seed(0)
    base = Int8Linear(nn.Linear(12, 10))
    layer, x = LoRAWrapper(base, r=4, init_lora_weights=False), torch.randn(3, 12)
    layer(x).sum().backward()
    assert layer.lora_A["default"].dtype == torch.float32
    assert layer.lora_A["default"].grad.abs().sum() > 0
    with pytest.raises(ValueError, match="quantised"):
        LoRAWrapper(base, init_lora_weights="pissa")
    with pytest.raises(TypeError, match="Embedding"):
        LoRAWrapper(nn.Embedding(3, 4))


def test_wrapper_dtype_follows_the_base() -> None:
    layer = LoRAWrapper(OwnLinear(12, 10).bfloat16(), r=4)
    assert layer.lora_A["default"].dtype == torch.float32
    assert layer(torch.randn(3, 12, dtype=torch.bfloat16)).dtype == torch.bfloat16
