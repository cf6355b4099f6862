"""LoRAEmbedding against its formula, on every kind of ids and embedding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.layers import LoRAEmbedding

V, D = 23, 12


class Scaled(nn.Embedding):
    """As Gemma's: a scale in a buffer."""

    def __init__(self, *args: Any, scale: float = 3.3, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.register_buffer("embed_scale", torch.tensor(scale), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class ScaledByNumber(nn.Embedding):
    """As BART's: a scale in an attribute."""

    embed_scale = 2.5

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


class Shifted(nn.Embedding):
    """As OPT's positions: a forward of its own, under the same name."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + 1


def layer_over(embedding: nn.Embedding, dtype: Any = torch.float64, **settings: Any) -> LoRAEmbedding:  # fmt: skip
    layer = LoRAEmbedding(embedding.to(dtype), r=4, lora_alpha=6, **settings)
    with torch.no_grad():
        layer.lora_A["default"].normal_()
        layer.lora_B["default"].normal_()
    return layer


def formula(layer: LoRAEmbedding, ids: Tensor, scale: float = 1.0) -> Tensor:
    a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    one_hot = F.one_hot(ids, V).to(layer.weight.dtype)
    y = scale * (one_hot @ layer.weight + (one_hot @ a.t() @ b.t()) * 1.5)
    if "default" not in layer.lora_magnitude_vector:
        return y
    norm = torch.linalg.vector_norm(layer.weight + (a.t() @ b.t()) * 1.5, dim=0).detach()
    return y * (layer.lora_magnitude_vector["default"] / norm)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("integer", [torch.int64, torch.int32])
@pytest.mark.parametrize("dora", [False, True])
def test_forward_and_gradients(shape: tuple[int, ...], integer: torch.dtype, dora: bool) -> None:
    layer = layer_over(nn.Embedding(V, D), use_dora=dora)
    ids = torch.randint(V, shape)
    got, expected = layer(ids.to(integer)), formula(layer, ids)
    torch.testing.assert_close(got, expected)
    parameters = layer.adapter_parameters("default")
    assert len(parameters) == 2 + dora
    seed = torch.randn_like(got)
    mine, other = (torch.autograd.grad(y, parameters, seed) for y in (got, expected))
    torch.testing.assert_close(mine, other)
    assert not layer.weight.requires_grad


def test_ids_with_strides() -> None:
    layer = layer_over(nn.Embedding(V, D))
    ids = torch.randint(V, (6, 8)).t()[::2, 1:]
    torch.testing.assert_close(layer(ids), formula(layer, ids))


@pytest.mark.parametrize("bad", [V, -1, 10**9])
def test_an_id_out_of_range_is_an_error(bad: int) -> None:
    with pytest.raises(IndexError):
        layer_over(nn.Embedding(V, D))(torch.tensor([0, bad]))


def test_a_padding_row_gets_no_gradient() -> None:
    layer = layer_over(nn.Embedding(V, D, padding_idx=3))
    ids = torch.tensor([3, 4, 3, 5])
    torch.testing.assert_close(layer(ids), formula(layer, ids))
    layer(ids).sum().backward()
    moved = layer.lora_embedding_A["default"].grad.abs().sum(0).nonzero().flatten()
    assert moved.tolist() == [4, 5]


def test_scale_grad_by_freq() -> None:
    layer = layer_over(nn.Embedding(V, D, scale_grad_by_freq=True))
    twin = layer_over(nn.Embedding(V, D))
    with torch.no_grad():
        for mine, other in zip(layer.parameters(), twin.parameters(), strict=True):
            other.copy_(mine)
    ids, counts = torch.tensor([3, 4, 3, 3]), torch.ones(V, dtype=torch.float64)
    counts[3] = 3
    layer(ids).sum().backward()
    twin(ids).sum().backward()
    expected = twin.lora_embedding_A["default"].grad / counts
    torch.testing.assert_close(layer.lora_embedding_A["default"].grad, expected)


def test_sparse_gives_dense_gradients() -> None:
    layer = layer_over(nn.Embedding(V, D, sparse=True))
    layer(torch.tensor([1, 2])).sum().backward()
    assert layer.lora_embedding_A["default"].grad.layout is torch.strided


@pytest.mark.parametrize(("kind", "scale"), [(Scaled, 3.3), (ScaledByNumber, 2.5)])
def test_scaled_rows(kind: Any, scale: float) -> None:
    layer = layer_over(kind(V, D))
    ids = torch.randint(V, (7,))
    torch.testing.assert_close(layer(ids), formula(layer, ids, scale), rtol=1e-6, atol=1e-6)
    plain = layer.as_base(layer.merged_weight().weight)
    assert type(plain) is kind
    torch.testing.assert_close(plain(ids), layer(ids))


def test_what_is_no_plain_embedding_is_refused_and_left_alone() -> None:
    for bad, message in (
        (Shifted(V, D), "more than look up rows"),
        (nn.Embedding(V, D, max_norm=1.0), "max_norm"),
        (nn.Linear(3, 4), "no nn.Embedding"),
        (nn.EmbeddingBag(V, D), "no nn.Embedding"),
    ):
        with pytest.raises(TypeError, match=message):
            LoRAEmbedding(bad, r=2)
        assert all(p.requires_grad for p in bad.parameters())
    embedding = nn.Embedding(V, D)
    for settings, message in (({"r": 0}, "r: got 0"), ({"lora_bias": True}, "lora_bias: got True")):
        with pytest.raises(ValueError, match=message):
            LoRAEmbedding(embedding, **settings)
    assert embedding.weight.requires_grad


def test_it_begins_as_the_base_and_shares_its_weight() -> None:
    embedding = nn.Embedding(V, D)
    layer = LoRAEmbedding(embedding, r=4)
    ids = torch.randint(V, (9,))
    assert torch.equal(layer(ids), embedding(ids))
    assert layer.weight is embedding.weight
    assert layer.lora_embedding_A["default"].shape == (4, V)
    assert layer.lora_embedding_B["default"].shape == (D, 4)
    assert layer.state_dict().keys() == {"weight", "lora_embedding_A.default", "lora_embedding_B.default"}  # fmt: skip


def test_hooks_of_the_embedding_go_on() -> None:
    embedding = nn.Embedding(V, D)
    handle = embedding.register_forward_hook(lambda module, args, y: y.detach().requires_grad_())
    layer = LoRAEmbedding(embedding, r=4)
    assert layer(torch.tensor([1])).is_leaf
    handle.remove()
    assert not layer(torch.tensor([1])).is_leaf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_merging(dtype: torch.dtype, dora: bool) -> None:
    layer = layer_over(nn.Embedding(3000, D), dtype, use_dora=dora)  # more than one block of rows
    before = layer.weight.clone()
    a, b = layer.lora_embedding_A["default"].double(), layer.lora_embedding_B["default"].double()
    exact = before.double() + 1.5 * (b @ a).t()
    if dora:
        magnitude = layer.lora_magnitude_vector["default"].double()
        exact = exact * (magnitude / torch.linalg.vector_norm(exact, dim=0))
    made = layer.merge()
    torch.testing.assert_close(
        layer.weight, exact.to(dtype), rtol=1e-6 if dtype == torch.float32 else 2**-8, atol=1e-7
    )
    assert dora or torch.equal(layer.weight, exact.to(torch.float32).to(dtype))
    assert made.error < (1e-6 if dtype == torch.float32 else 3e-3)
    assert not layer(torch.tensor([4])).requires_grad
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_on_the_meta_device() -> None:
    layer = LoRAEmbedding(nn.Embedding(V, D, device="meta"), r=4)
    assert layer.lora_embedding_A["default"].is_meta
    layer.to_empty(device="cpu")
    layer.weight.zero_()
    layer.reset_adapters()
    assert layer.lora_embedding_A["default"].abs().max() == 0
    assert layer.lora_embedding_B["default"].std() > 0.5
