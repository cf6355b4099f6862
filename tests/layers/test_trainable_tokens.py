"""TrainableTokens against the formula: the module with the rows put into its weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastlora.layers import TrainableTokens

V, D = 23, 12
ROWS = [5, 2, 19]


def layer_over(module: nn.Module) -> TrainableTokens:
    layer = TrainableTokens(module.double(), ROWS)
    with torch.no_grad():
        layer.trainable_tokens_delta["default"].normal_()
    return layer


def formula(layer: TrainableTokens, module: nn.Module, x: Tensor) -> Tensor:
    rows = layer.trainable_tokens_delta["default"]
    weight = layer.weight.index_copy(0, torch.tensor(ROWS), rows)
    return functional_call(module, {"weight": weight}, (x,))


MODULES: dict[str, Any] = {
    "embedding": lambda: nn.Embedding(V, D),
    "padding trained": lambda: nn.Embedding(V, D, padding_idx=2),
    "padding": lambda: nn.Embedding(V, D, padding_idx=3),
    "by frequency": lambda: nn.Embedding(V, D, scale_grad_by_freq=True),
    "linear": lambda: nn.Linear(D, V, bias=False),
    "linear with bias": lambda: nn.Linear(D, V),
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("shape", [(0,), (8,), (3, 9)])
def test_forward_and_gradients(kind: str, shape: tuple[int, ...]) -> None:
    module = MODULES[kind]()
    layer = layer_over(module)
    linear = isinstance(module, nn.Linear)
    x = torch.randn(*shape, D).double().requires_grad_() if linear else torch.randint(V, shape)
    got, expected = layer(x), formula(layer, layer.original_module, x)
    torch.testing.assert_close(got, expected)
    wanted = [layer.trainable_tokens_delta["default"], *([x] if linear else [])]
    seed = torch.randn_like(got)
    mine, other = (torch.autograd.grad(y, wanted, seed) for y in (got, expected))
    torch.testing.assert_close(mine, other)


def test_nothing_of_the_weights_size_is_saved() -> None:
    layer = layer_over(nn.Embedding(1000, D))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    ):
        layer(torch.randint(1000, (4,)))
    assert sizes
    assert max(sizes) <= 5 * D


def test_rows_begin_as_they_were_and_come_out_bit_for_bit() -> None:
    embedding = nn.Embedding(V, D).bfloat16()
    layer = TrainableTokens(embedding, ROWS)
    ids = torch.arange(V)
    assert layer.trainable_tokens_delta["default"].dtype == torch.float32
    assert torch.equal(layer(ids), embedding(ids))
    before = layer.weight
    with torch.no_grad():
        layer.trainable_tokens_delta["default"].normal_()
    expected = layer(ids)
    made = layer.merge()
    assert torch.equal(layer(ids), expected)
    assert 0 < made.error < 3e-3
    layer.unmerge()
    assert layer.weight is before
    with torch.no_grad():
        layer.trainable_tokens_delta["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        layer.merge()
    assert layer.weight is before


def test_a_tied_module_has_the_same_rows_and_goes_over_with_them() -> None:
    embedding, head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
    head.weight = embedding.weight
    layer = layer_over(embedding)
    tied = layer.tie(head.double())
    x = torch.randn(4, D).double()
    expected = formula(layer, head, x)
    torch.testing.assert_close(tied(x), expected)
    assert tied.adapter_tensors("default") == {}
    assert list(tied.state_dict()) == ["original_module.weight"]
    layer.merge()
    assert tied.original_module.weight is layer.weight
    torch.testing.assert_close(tied(x), expected)
    layer.unmerge()
    torch.testing.assert_close(tied(x), expected)
    layer.enable_adapters(False)
    assert torch.equal(tied(x), head(x))
    layer.rename_adapter("default", "mine")
    tied.rename_adapter("default", "mine")
    assert tied.adapters == ["mine"]


def test_wrong_rows_and_modules_are_refused_and_left_alone() -> None:
    embedding = nn.Embedding(V, D)
    for rows in ([V], [-1]):
        with pytest.raises(ValueError, match="0 to 22"):
            TrainableTokens(embedding, rows)
    with pytest.raises(TypeError, match="neither"):
        TrainableTokens(nn.LayerNorm(3), [0])
    with pytest.raises(TypeError, match="max_norm"):
        TrainableTokens(nn.Embedding(V, D, max_norm=1.0), [0])
    assert embedding.weight.requires_grad
