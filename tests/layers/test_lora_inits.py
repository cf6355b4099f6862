"""Every ``init_lora_weights`` against stock peft: one seed, one base, one result."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora.layers.inits import initial_factors

EXACT = [True, False, "gaussian", "orthogonal", "eva"]
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
    assert (init in (False, "orthogonal")) == bool(torch.count_nonzero(ours[1]))


@pytest.mark.parametrize("init", [True, False])
def test_the_same_seed_gives_the_same_lora_bias_as_peft(init: bool) -> None:
    settings = {"r": 4, "target_modules": ["0", "2"], "init_lora_weights": init, "lora_bias": True}
    torch.manual_seed(11)
    stock = peft.get_peft_model(base(torch.bfloat16), peft.LoraConfig(**settings))
    torch.manual_seed(11)
    own = fastlora.get_peft_model(base(torch.bfloat16), fastlora.LoraConfig(**settings))
    for index in (0, 2):
        theirs = stock.base_model.model[index].lora_B["default"].bias
        ours = own.get_base_model()[index].lora_bias["default"]
        assert torch.equal(theirs, ours)
        assert init == (not torch.count_nonzero(ours))


def test_orthogonal_factors_cancel_and_want_an_even_rank() -> None:
    made = initial_factors("orthogonal", None, 24, 16, 6, 1.0)
    assert (made.b @ made.a).abs().max() < 1e-6 < made.a.abs().max()
    with pytest.raises(ValueError, match="even"):
        initial_factors("orthogonal", None, 24, 16, 5, 1.0)


def by_hand(weight: Tensor, r: int, scaling: float, iterations: int, double: bool) -> Tensor:
    """LoftQ (arXiv 2310.08659, algorithm 1) in fp64 around bitsandbytes' rounding, which NF4Tensor's is: Q + s B A."""
    low = torch.zeros_like(weight, dtype=torch.float64)
    for _ in range(iterations):
        q = fastlora.NF4Tensor.quantize((weight.double() - low).float(), 64, double)
        q = q.dequantize(torch.float32).double()
        u, s, vh = torch.linalg.svd(weight.double() - q, full_matrices=False)
        low = u[:, :r] * s[:r] @ vh[:r]
    return q + low


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize("dora", [False, True])
def test_loftq_is_nearer_to_the_weight_than_rounding(
    iterations: int, double: bool, dora: bool
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(128, 48)
    before = linear.weight.detach().clone()
    layer = fastlora.QLoRALinear.from_linear(
        linear, r=8, lora_alpha=24, init_lora_weights="loftq", loftq_iter=iterations,
        double_quant=double, use_dora=dora,
    )  # fmt: skip
    assert torch.equal(linear.weight, before)
    whole = layer.merged_weight(torch.float32).weight.double()
    exact = by_hand(before, 8, 3.0, iterations, double)
    torch.testing.assert_close(whole, exact, rtol=1e-3, atol=1e-3)
    plain = fastlora.NF4Tensor.quantize(before, 64, double)
    rounding = (plain.dequantize(torch.float32) - before).norm()
    assert (whole - before).norm() < 0.85 * rounding
    assert torch.equal(layer.weight.codes, plain.codes) == (iterations == 1)


def test_loftq_in_a_model_trains_and_its_file_is_plain_lora(tmp_path) -> None:
    from tests.tiny_models import logits, some_ids, tiny_llama

    settings = {"r": 4, "target_modules": ["q_proj", "up_proj"], "quantize": "nf4"}
    torch.manual_seed(1)
    plain = fastlora.get_peft_model(tiny_llama(), fastlora.LoraConfig(**settings))
    torch.manual_seed(1)
    config = fastlora.LoraConfig(
        **settings, init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_iter=1)
    )
    model = fastlora.get_peft_model(tiny_llama(), config)
    truth = logits(tiny_llama(), some_ids())
    errors = [(logits(m, some_ids()) - truth).norm() for m in (plain, model)]
    assert errors[1] < errors[0]
    fastlora.save_adapter(model, tmp_path)
    fastlora.load_adapter(plain, tmp_path)  # over the same 4-bit base
    assert torch.equal(logits(plain.eval(), some_ids()), logits(model.eval(), some_ids()))


def test_loftq_where_nothing_is_quantised_is_refused() -> None:
    from tests.tiny_models import assert_unchanged, snapshot, tiny_llama

    model = tiny_llama()
    before = snapshot(model)
    config = fastlora.LoraConfig(
        r=4, target_modules=["q_proj", "lm_head"], quantize="nf4", init_lora_weights="loftq"
    )
    with pytest.raises(ValueError, match=r"lm_head.*loftq"):
        fastlora.get_peft_model(model, config)
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="at most 16"):
        fastlora.QLoRALinear.from_linear(nn.Linear(64, 16), r=17, init_lora_weights="loftq")
    with pytest.raises(ValueError, match="lora_alpha"):
        fastlora.QLoRALinear.from_linear(
            nn.Linear(64, 16), r=4, lora_alpha=0, init_lora_weights="loftq"
        )


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
