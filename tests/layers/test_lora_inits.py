"""Every ``init_lora_weights`` against stock peft: one seed, one base, one result."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora.layers.inits import initial_factors

EXACT = [True, False, "gaussian"]
SPLIT = ["pissa", "pissa_niter_8", "olora"]


def base(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 16)).to(dtype)


def both(
    init: bool | str, dtype: torch.dtype, **settings: object
) -> list[list[tuple[Tensor, ...]]]:
    """Per library, per layer: (A, B, W, scaling)."""
    torch.manual_seed(11)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=init, **settings)
    stock = peft.get_peft_model(base(dtype), config).base_model.model
    torch.manual_seed(11)
    own = fastlora.get_peft_model(
        base(dtype),
        fastlora.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=init, **settings),
    ).get_base_model()
    result = []
    for model, suffix in ((stock, True), (own, False)):
        layers = []
        for index in (0, 2):
            layer = model[index]
            a, b = layer.lora_A["default"], layer.lora_B["default"]
            if suffix:
                a, b, weight = a.weight, b.weight, layer.base_layer.weight
            else:
                weight = layer.weight
            layers.append((a.detach(), b.detach(), weight.detach(), layer.scaling["default"]))
        result.append(layers)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", EXACT)
def test_the_same_seed_gives_the_same_adapter_as_peft(init: bool | str, dtype: torch.dtype) -> None:
    for theirs, ours in zip(*both(init, dtype)):
        for left, right in zip(theirs[:3], ours[:3]):
            assert left.dtype == right.dtype
            assert torch.equal(left, right)
    assert (init is False) == bool(torch.count_nonzero(ours[1]))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", SPLIT)
def test_splits_of_the_base_weight_match_peft(init: str, dtype: torch.dtype, rslora: bool) -> None:
    tolerance = 2e-5 if dtype == torch.float32 else 0.02
    original = base(dtype)
    for index, (theirs, ours) in zip((0, 2), zip(*both(init, dtype, use_rslora=rslora))):
        # The sign of a singular vector is free, so only B A and W are compared.
        (a1, b1, w1, s1), (a2, b2, w2, s2) = theirs, ours
        assert s1 == s2
        assert a2.dtype == torch.float32
        assert w2.dtype == dtype
        torch.testing.assert_close(b1 @ a1, b2 @ a2, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(w1, w2, atol=tolerance, rtol=tolerance)
        whole = w2.float() + s2 * b2 @ a2
        torch.testing.assert_close(
            whole, original[index].weight.float(), atol=tolerance, rtol=tolerance
        )
        assert not torch.allclose(w2, original[index].weight)


def test_a_split_leaves_the_given_weight_alone() -> None:
    linear = nn.Linear(24, 16)
    before = linear.weight.detach().clone()
    layer = fastlora.LoRALinear.from_linear(linear, r=4, init_lora_weights="pissa")
    assert torch.equal(linear.weight, before)
    assert layer.weight is not linear.weight
    x = torch.randn(5, 24)
    torch.testing.assert_close(layer(x), linear(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_split_needs_a_readable_weight_of_enough_rank(init: str) -> None:
    with pytest.raises(ValueError, match="quantised"):
        initial_factors(init, None, 8, 8, 2, 1.0)
    with pytest.raises(ValueError, match="float64"):
        initial_factors(init, torch.zeros(8, 8, dtype=torch.float64), 8, 8, 2, 1.0)
    with pytest.raises(ValueError, match="meta"):
        initial_factors(init, torch.zeros(8, 8, device="meta"), 8, 8, 2, 1.0)
    with pytest.raises(ValueError, match="at most 6"):
        initial_factors(init, torch.zeros(6, 8), 8, 6, 7, 1.0)


@pytest.mark.parametrize("init", ["pissa_niter_", "pissa_niter_x", "loftq", "", 1, None])
def test_unknown_inits_are_refused(init: object) -> None:
    with pytest.raises(ValueError, match="init_lora_weights"):
        initial_factors(init, torch.zeros(8, 8), 8, 8, 2, 1.0)
