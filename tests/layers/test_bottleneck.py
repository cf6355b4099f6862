"""BottleneckLayer alone: the adapters library's formulas in fp64, dropout, several adapters, what is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlora.layers.bottleneck import Bottleneck, BottleneckLayer, BottleneckSettings, StreamTap
from tests.bottleneck_formula import adapted

WIDTH, R = 12, 5
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"original_ln_before": True},
    "sum, its residual": {"original_ln_before": True, "residual_before_ln": False},
    "sum, post add": {"original_ln_before": True, "residual_before_ln": "post_add"},
    "parallel": {"is_parallel": True, "scaling": 4.0},
    "norm before": {"ln_before": True},
    "norm after": {"ln_after": True},
    "norm after the sum": {"ln_after": True, "adapter_residual_before_ln": True},
    "parallel norm after": {"ln_after": True, "is_parallel": True},
    "gated": {"use_gating": True},
    "learned": {"scaling": "learned"},
    "per channel": {"scaling": "channel", "is_parallel": True},
    "all": {
        "original_ln_before": True,
        "ln_before": True,
        "ln_after": True,
        "use_gating": True,
        "scaling": "channel",
        "non_linearity": "gelu",
    },
}


class Block(nn.Module):
    """BERT's: dense, dropout, the sum, the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.0)
        self.LayerNorm = nn.LayerNorm(WIDTH)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)


def settings(**options: Any) -> BottleneckSettings:
    return BottleneckSettings(**options)


def drawn(layer: BottleneckLayer) -> BottleneckLayer:
    with torch.no_grad():
        for p in layer.bottlenecks.parameters():
            p.normal_(1.0 if p.ndim == 1 else 0.0, 0.4)
    return layer.double()


def tensors(layer: BottleneckLayer, name: str = "default") -> dict[str, Tensor]:
    start = f"adapters.{name}."
    return {k.removeprefix(start): v.tensor for k, v in layer.adapter_tensors(name).items()}


@pytest.mark.parametrize("option", OPTIONS)
def test_in_a_block_with_the_norm_behind(option: str) -> None:
    how = settings(**OPTIONS[option])
    block = Block()
    layer = BottleneckLayer(block, WIDTH, WIDTH, "block")
    layer.add_adapter("default", R, how)
    drawn(layer)
    x, s = torch.randn(2, 7, WIDTH).double(), torch.randn(2, 7, WIDTH).double()
    h = block.dense(x)
    exact = block.LayerNorm(adapted(tensors(layer), how, h, s, block.LayerNorm) + s)
    torch.testing.assert_close(layer(x, s), exact)
    layer.enable_adapters(False)
    assert torch.equal(layer(x, s), block(x, s))


@pytest.mark.parametrize("option", [o for o in OPTIONS if o != "sum, post add"])
@pytest.mark.parametrize("as_tuple", [False, True])
def test_behind_a_module_whose_norm_was_tapped(option: str, as_tuple: bool) -> None:
    how = settings(**OPTIONS[option])

    class Inner(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return (y, "weights") if as_tuple else y

    norm, inner = nn.LayerNorm(WIDTH).double(), Inner(WIDTH, WIDTH)
    layer = BottleneckLayer(inner, WIDTH, WIDTH, "tap")
    layer.add_adapter("default", R, how)
    drawn(layer)
    norm.register_forward_pre_hook(StreamTap(layer), with_kwargs=True)
    s = torch.randn(2, 7, WIDTH).double()
    y = layer(norm(s))
    assert layer._seen is None  # nothing is held until the next step
    h = nn.functional.linear(norm(s), inner.weight, inner.bias)
    exact = adapted(tensors(layer), how, h, s, None)
    if as_tuple:
        assert y[1] == "weights"
        y = y[0]
    torch.testing.assert_close(y, exact)
    if how.needs_stream:
        layer(s)  # the norm was called for h: once more is too much
        with pytest.raises(RuntimeError, match="whole transformer layer"):
            layer(s)


def test_beside_a_module_from_its_input_to_its_output() -> None:
    inner = nn.Linear(WIDTH, 9)
    layer = BottleneckLayer(inner, WIDTH, 9)
    how = settings(is_parallel=True)
    layer.add_adapter("default", R, how)
    drawn(layer)
    x = torch.randn(4, WIDTH).double()
    torch.testing.assert_close(layer(x), adapted(tensors(layer), how, inner(x), x, None))
    assert layer.weight is inner.weight


def test_sequential_adapters_are_stacked_and_parallel_ones_added() -> None:
    for parallel in (False, True):
        inner, how = nn.Linear(WIDTH, WIDTH), settings(is_parallel=parallel)
        layer = BottleneckLayer(inner, WIDTH, WIDTH)
        layer.add_adapter("one", R, how)
        layer.add_adapter("two", R, how)
        drawn(layer)
        layer.set_adapter(["one", "two"])
        x = torch.randn(4, WIDTH).double()
        exact = inner(x)
        for name in ("one", "two"):
            exact = adapted(tensors(layer, name), how, exact, x, None)
        torch.testing.assert_close(layer(x), exact)
        with pytest.raises(ValueError, match="exists already"):
            layer.add_adapter("one", R, how)


def test_dropout_is_on_the_update_and_only_in_training() -> None:
    adapter = Bottleneck(WIDTH, WIDTH, R, settings(dropout=0.25))
    nn.init.ones_(adapter.adapter_up.bias)
    nn.init.zeros_(adapter.adapter_up.weight)
    h = torch.randn(3000, WIDTH)
    got = adapter(h, h) - h
    assert {round(value, 3) for value in got.unique().tolist()} == {0.0, 1.333}
    assert abs((got == 0).float().mean().item() - 0.25) < 0.02
    torch.testing.assert_close(adapter.eval()(h, h), h + 1)


@pytest.mark.parametrize("how", ["bert", "houlsby", "mam_adapter"])
def test_initial_values(how: str) -> None:
    adapter = Bottleneck(400, 400, 200, settings(init_weights=how, use_gating=True))
    down, up = adapter.adapter_down[-1], adapter.adapter_up
    assert not down.bias.any() and not up.bias.any()
    x = torch.randn(5, 7, 400)
    if how == "mam_adapter":
        assert torch.equal(adapter(x, x), x)
        bound = 400**-0.5
        assert 0.99 * bound < down.weight.abs().max().item() <= bound
        return
    std = 0.02 if how == "bert" else 0.0088  # of N(0, 0.01) cut at two standard deviations
    for weight in (down.weight, up.weight):
        assert abs(weight.std().item() - std) < 0.02 * std
    if how == "houlsby":
        assert down.weight.abs().max().item() <= 0.02
    assert (adapter(x, x) - x).norm() < 0.2 * x.norm()  # nearly nothing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("option", ["plain", "all"])
def test_fp32_adapters_over_a_half_precision_base(dtype: torch.dtype, option: str) -> None:
    block = Block().to(dtype).requires_grad_(False)
    layer = BottleneckLayer(block, WIDTH, WIDTH, "block")
    layer.add_adapter("default", R, settings(**OPTIONS[option]))
    x, s = torch.randn(2, 3, WIDTH, dtype=dtype), torch.randn(2, 3, WIDTH, dtype=dtype)
    y = layer(x, s)
    assert y.dtype == dtype
    y.sum().backward()
    for name, p in layer.bottlenecks.named_parameters():
        assert p.grad is not None and p.grad.dtype == p.dtype == torch.float32, name
    wide = copy.deepcopy(layer).double()
    torch.testing.assert_close(y.double(), wide(x.double(), s.double()), rtol=3e-2, atol=3e-2)


def test_pickle_and_deepcopy_keep_the_tap() -> None:
    norm, inner = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
    layer = BottleneckLayer(inner, WIDTH, WIDTH, "tap")
    layer.add_adapter("default", R, settings(is_parallel=True))
    norm.register_forward_pre_hook(StreamTap(layer), with_kwargs=True)
    both = nn.Sequential(norm, layer)
    x = torch.randn(3, WIDTH)
    y = both(x)
    for twin in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        assert torch.equal(twin(x), y)
        (hook,) = twin[0]._forward_pre_hooks.values()
        assert hook.layer is twin[1]


@pytest.mark.parametrize("option", ["plain", "sum", "parallel"])
def test_compiled_whole(option: str) -> None:
    """The tap and the fused function in one graph."""
    torch._dynamo.reset()
    norm, inner = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
    layer = BottleneckLayer(inner, WIDTH, WIDTH, "tap")
    layer.add_adapter("default", R, settings(**OPTIONS[option]))
    norm.register_forward_pre_hook(StreamTap(layer), with_kwargs=True)
    both = nn.Sequential(norm, layer)
    x = torch.randn(3, WIDTH, requires_grad=True)
    leaves = [x, *layer.bottlenecks.parameters()]
    y = both(x)
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, y)
    for a, b in zip(
        torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(y.sum(), leaves)
    ):
        torch.testing.assert_close(a, b)


def test_what_is_no_output_to_adapt_is_refused() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"y": x}

    for base, message in ((Odd(), "dict"), (nn.Linear(WIDTH, 3), r"\(2, 3\)")):
        layer = BottleneckLayer(base, WIDTH, WIDTH)
        layer.add_adapter("default", R, settings())
        with pytest.raises(ValueError, match=message):
            layer(torch.randn(2, WIDTH))
    gated = Bottleneck(WIDTH, WIDTH, R, settings(use_gating=True))
    with pytest.raises(ValueError, match="use_gating"):
        gated(torch.randn(2, WIDTH), torch.randn(2, WIDTH))
