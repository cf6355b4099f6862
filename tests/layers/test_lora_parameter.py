"""LoRAParameter against W + s B A, and what its forward and backward keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastlora import lora_linear_segments
from fastlora.layers import LoRAParameter
from fastlora.layers.experts import reads_experts

E, K, F = 5, 12, 20


class Stacked(nn.Module):
    """One product a matrix; no module that transformers marks."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(E, K, F) if transposed else torch.randn(E, F, K))
        self.down = nn.Parameter(torch.randn(E, F, K) if transposed else torch.randn(E, K, F))
        if transposed:
            self.is_transposed = True
        self.calls = 0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.calls += 1
        up, down = (self.up, self.down) if hasattr(self, "is_transposed") else (self.up.mT, self.down.mT)  # fmt: skip
        return torch.tanh(x @ up) @ down * scale


def experts(**settings: Any) -> nn.Module:
    """transformers' own, as Mixtral has them; ``transposed``: as GPT-OSS does, with biases."""
    from transformers import GptOssConfig, MixtralConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    sizes = {"hidden_size": K, "intermediate_size": F, "num_local_experts": E}
    if settings.get("transposed"):
        module, config = GptOssExperts, GptOssConfig(**sizes)
    else:
        module, config = MixtralExperts, MixtralConfig(**sizes)
    config._experts_implementation = "eager"
    made = module(config).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made


def over(module: nn.Module, *names: str, r: int = 3) -> LoRAParameter:
    layer: Any = module
    for name in names:
        layer = LoRAParameter(layer, name, r=r, lora_alpha=4.5)
    for part in layer.chain():
        with torch.no_grad():
            part.lora_A["default"].normal_(std=0.3)
            part.lora_B["default"].normal_(std=0.3)
    return layer


def delta(layer: LoRAParameter, name: str = "default") -> Tensor:
    """By PEFT's layout, entry by entry of e and i: row e * r + i of A, column i * E + e of B."""
    a, b, r = layer.lora_A[name], layer.lora_B[name], layer.r[name]
    stack = layer.stacked
    parts = [
        sum(torch.outer(b[:, i * stack + e], a[e * r + i]) for i in range(r)) for e in range(stack)
    ]
    whole = torch.stack(parts) * float(layer.scaling[name])
    return whole.mT if layer.transposed else whole


def formula(layer: LoRAParameter, *args: Any) -> Tensor:
    weights = {}
    for part in layer.chain():
        weights[part.parameter_name] = part.weight
        for name in part.acting_adapters():
            weights[part.parameter_name] = weights[part.parameter_name] + delta(part, name).view(
                part.weight.shape
            )
    return functional_call(layer.module, weights, args)


def check(layer: LoRAParameter, *args: Any) -> None:
    got, expected = layer(*args), formula(layer, *args)
    torch.testing.assert_close(got, expected)
    assert got.requires_grad
    if not expected.requires_grad:  # transformers' eager forward of no rows
        assert got.numel() == 0
        got.sum().backward()
        return
    wanted = [p for p in layer.parameters() if p.requires_grad]
    wanted += [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
    seed = torch.randn_like(got)
    mine, other = (torch.autograd.grad(y, wanted, seed, materialize_grads=True) for y in (got, expected))  # fmt: skip
    torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("names", [("up",), ("up", "down")])
def test_any_module(transposed: bool, names: tuple[str, ...]) -> None:
    layer = over(Stacked(transposed).double(), *names)
    check(layer, torch.randn(E, 4, K, dtype=torch.float64, requires_grad=True))


def test_a_matrix() -> None:
    layer = over(nn.Linear(K, F).double(), "weight")
    assert layer.stacked == 1
    check(layer, torch.randn(4, K, dtype=torch.float64, requires_grad=True))


def routed(rows: int, k: int = 2, used: int = E) -> tuple[Tensor, Tensor, Tensor]:
    """x, experts and routing weights."""
    x = torch.randn(rows, K, dtype=torch.float64, requires_grad=True)
    chosen = torch.stack([torch.randperm(used)[:k] for _ in range(rows)]) if rows else torch.empty(0, k, dtype=torch.int64)  # fmt: skip
    weights = torch.rand(rows, k, dtype=torch.float64).requires_grad_()
    return x, chosen, weights


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("names", [("gate_up_proj",), ("down_proj",), ("gate_up_proj", "down_proj")])  # fmt: skip
@pytest.mark.parametrize(("rows", "used"), [(0, E), (1, E), (17, E), (9, 2)])
def test_experts(transposed: bool, names: tuple[str, ...], rows: int, used: int) -> None:
    layer = over(experts(transposed=transposed), *names)
    args = routed(rows, used=used)
    assert reads_experts(layer.module, {part.parameter_name: part for part in layer.chain()}, args, {})  # fmt: skip
    check(layer, *args)


def test_experts_with_two_adapters_of_which_one_has_another_rank() -> None:
    layer = over(experts(), "gate_up_proj", "down_proj")
    for part in layer.chain():
        part.add_adapter("other", r=2, lora_alpha=1)
        with torch.no_grad():
            part.lora_B["other"].normal_()
        part.active_adapters = ["default", "other"]
    check(layer, *routed(11))
    layer.chain()[0].active_adapters = []
    check(layer, *routed(11))


def test_numbers_of_no_expert() -> None:
    layer = over(experts(), "gate_up_proj", "down_proj")
    x, chosen, weights = routed(6)
    chosen[1, 0] = chosen[3] = E  # as routers mark what other devices or nobody computes
    check(layer, x, chosen, weights)
    assert not layer(x, chosen, weights)[3].any()
    chosen[1, 0] = -1
    with pytest.raises(RuntimeError, match="non-negative"):
        layer(x, chosen, weights)


def test_one_grouped_product_serves_all_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def counted(x: Tensor, weight: None, a: Tensor, *rest: Any) -> Tensor:
        counts.append(a.shape[0])
        return lora_linear_segments(x, weight, a, *rest)

    layer = over(experts(), "gate_up_proj", "down_proj")
    for part in layer.chain():  # as hot-swapping has it: a scaling that is read on the device
        part.scaling["default"] = torch.tensor(part.scaling["default"])
    monkeypatch.setattr("fastlora.layers.experts.lora_linear_segments", counted)
    check(layer, *routed(11))
    assert counts == [E, E]


def test_experts_make_no_delta_and_keep_none() -> None:
    layer = over(experts(), "gate_up_proj", "down_proj", r=1)
    inner, outer = layer.chain()[1].weight, layer.weight
    own = {inner.untyped_storage().data_ptr(), outer.untyped_storage().data_ptr()}
    made: list[Tensor] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            made.extend(t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
            return out

    x, chosen, weights = routed(1)
    with Watch():
        layer(x, chosen, weights).sum().backward()
    new = [t for t in made if t.untyped_storage().data_ptr() not in own]
    assert len(new) > 20
    assert max(t.numel() for t in new) < min(inner[0].numel(), outer[0].numel())


def test_another_module_keeps_no_delta_until_backward() -> None:
    layer = over(Stacked().double(), "up")
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    ):
        y = layer(torch.randn(E, 1, K, dtype=torch.float64))
    assert max(sizes, default=0) < E * F * K
    assert layer.module.calls == 1
    y.sum().backward()
    assert layer.module.calls == 2
    with torch.no_grad():
        layer(torch.randn(E, 1, K, dtype=torch.float64))
    assert layer.module.calls == 3


def test_arguments_reach_the_module_and_attributes_come_from_it() -> None:
    layer = over(Stacked().double(), "up", "down")
    x = torch.randn(E, 2, K, dtype=torch.float64)
    torch.testing.assert_close(layer(x, scale=3.0), 3 * layer(x))
    assert layer.calls == 2
    with pytest.raises(AttributeError):
        layer.nothing  # noqa: B018


def test_hooks_on_experts_are_called() -> None:
    layer = over(experts(), "down_proj")
    seen = []
    layer.module.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    check(layer, *routed(4))
    assert len(seen) == 2  # the forward's and the formula's


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging(transposed: bool, dtype: torch.dtype) -> None:
    layer = over(Stacked(transposed).to(dtype), "up", "down")
    x = torch.randn(E, 4, K, dtype=dtype)
    befores = [part.weight for part in layer.chain()]
    for part, before in zip(layer.chain(), befores, strict=True):
        exact = before.double() + delta(part).double()
        part.merge()
        torch.testing.assert_close(part.weight, exact.to(dtype))
        assert part.weight.stride() == before.stride()
    assert torch.equal(layer(x), layer.module(x))
    for part, before in zip(layer.chain(), befores, strict=True):
        part.unmerge()
        assert part.weight is before


def test_what_cannot_be_is_refused_and_left_alone() -> None:
    module = Stacked()
    for name, settings, kind, message in (
        ("nothing", {}, TypeError, "no Parameter of its own"),
        ("up", {"lora_dropout": 0.1}, ValueError, "lora_dropout"),
        ("up", {"init_lora_weights": "pissa"}, ValueError, "init_lora_weights"),
        ("up", {"r": 0}, ValueError, "r: got 0"),
    ):
        with pytest.raises(kind, match=message):
            LoRAParameter(module, name, **settings)
    with pytest.raises(TypeError, match="two or three dimensions"):
        LoRAParameter(nn.LayerNorm(3), "weight")
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("transposed", [False, True])
def test_merging_makes_one_matrix_at_a_time(transposed: bool) -> None:
    """Nothing wider than the weight is larger than one expert's matrix, and the sum is rounded once."""
    from torch.utils._python_dispatch import TorchDispatchMode

    layer = over(Stacked(transposed).bfloat16(), "up")
    want = (layer.weight.double() + delta(layer).double()).bfloat16()
    seen = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            made = func(*args, **(kwargs or {}))
            if isinstance(made, Tensor) and made.dtype in (torch.float32, torch.float64):
                seen.append(made.untyped_storage().nbytes() // made.element_size())
            return made

    factors = max(p.numel() for p in layer.adapter_parameters("default"))
    with Largest():
        made = layer.merged_weight()
    assert torch.equal(made.weight, want)
    assert len(seen) > 3 * E and max(seen) <= max(K * F, factors)
    exact = want.double()
    assert 0 < made.error < 0.01 < made.update
    before = layer.weight.double()
    near = ((exact - before).norm() / exact.norm()).item()
    assert made.update == pytest.approx(near, rel=0.05)
