"""Virtual tokens by themselves: networks against plain formulas, keys and values against PEFT's cut of the rows, names."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastlora.layers import PrefixTokens, PromptLayer, VirtualTokens
from fastlora.layers.prompts import LSTMHead, mlp_head, prefix_head

TASK = "CAUSAL_LM"


def tokens(rows: int = 4, width: int = 6, transform: nn.Module | None = None) -> VirtualTokens:
    return VirtualTokens(nn.Embedding(rows, width), transform, rows, TASK)


def linear(module: nn.Linear, x: Tensor) -> Tensor:
    return x @ module.weight.double().T + module.bias.double()


def test_networks_are_their_formulas() -> None:
    x = torch.randn(1, 4, 6)
    mlp = mlp_head(6, 5)
    want = linear(mlp[0], x.double()).relu()
    want = linear(mlp[4], linear(mlp[2], want).relu())
    torch.testing.assert_close(mlp(x).double(), want, rtol=1e-5, atol=1e-6)
    prefix = prefix_head(6, 5, 24)
    want = linear(prefix[2], linear(prefix[0], x.double()).tanh())
    torch.testing.assert_close(prefix(x).double(), want, rtol=1e-5, atol=1e-6)
    lstm = LSTMHead(6, 5, layers=1)
    assert lstm(x).shape == x.shape
    forward, backward = _lstm(lstm.lstm, x[0], ""), _lstm(lstm.lstm, x[0].flip(0), "_reverse")
    both = torch.cat((forward, backward.flip(0)), dim=1)
    want = linear(lstm.mlp[2], linear(lstm.mlp[0], both).relu())
    torch.testing.assert_close(lstm(x)[0].double(), want, rtol=1e-5, atol=1e-6)


def _lstm(module: nn.LSTM, x: Tensor, end: str) -> Tensor:
    """One direction, step by step, in fp64."""
    w_x, w_h, b_x, b_h = (
        getattr(module, f"{name}_l0{end}").double()
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    hidden = cell = torch.zeros(module.hidden_size, dtype=torch.float64)
    found = []
    for row in x.double():
        i, f, g, o = (w_x @ row + b_x + w_h @ hidden + b_h).chunk(4)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        found.append(hidden)
    return torch.stack(found)


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_keys_and_values_of_every_layer(layers: int, stride: int) -> None:
    """PEFT's own steps on the rows: twice over for an encoder-decoder, in chunks of keys and values of both attentions."""
    count, heads, width = 3, 2, 5
    prefix = PrefixTokens(
        nn.Embedding(count, 2 * layers * heads * width),
        None,
        count,
        TASK,
        layers=layers,
        heads=heads,
        stride=stride,
    )
    rows = prefix.embedding.weight.view(1, count, 2 * layers, heads, width)
    chunks = torch.cat([rows] * stride, dim=2).permute(2, 0, 3, 1, 4).split(2 * stride)
    got = prefix.keys_values(torch.float32)
    assert len(got) == len(chunks) == layers
    for (keys, values), chunk in zip(got, chunks):
        assert torch.equal(keys, chunk[0][0]) and torch.equal(values, chunk[1][0])
    assert prefix.keys_values(torch.bfloat16)[0][0].dtype == torch.bfloat16


def test_collapsing_takes_the_values_it_is_given() -> None:
    made = tokens(transform=mlp_head(6, 5))
    state = {name: value.detach().clone() for name, value in made.named_parameters()}
    want = made().detach()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    got = made.collapsed(state)
    torch.testing.assert_close(got, want)
    assert not got.requires_grad and not made().any()
    state.pop("transform.0.bias")
    with pytest.raises(ValueError, match=r"transform\.0\.bias"):
        made.collapsed(state)


def test_adapters_by_name() -> None:
    layer = PromptLayer("P_TUNING")
    layer.add_adapter("a", tokens())
    layer.add_adapter("b", tokens(transform=mlp_head(6, 5)))
    layer.set_adapter("a")
    assert layer.adapters == ["a", "b"] and layer.acting() is layer.encoders["a"]
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"encoders.a.embedding.weight"}
    plain = layer.adapter_tensors("a")["prompt_embeddings"]
    assert plain.tensor is layer.state_dict(keep_vars=True)[plain.key] and plain.compute is None
    made = layer.adapter_tensors("b")["prompt_embeddings"]
    assert made.compute is not None and made.tensor.shape == (4, 6)
    assert layer.adapter_tensors("c") == {}
    for names, error in ((["a", "b"], "one adapter at a time"),):
        with pytest.raises(ValueError, match=error):
            layer.set_adapter(names)
    with pytest.raises(ValueError, match="exists already"):
        layer.add_adapter("a", tokens())
    with pytest.raises(ValueError, match="adapter_name"):
        layer.add_adapter("a.b", tokens())
    clone = copy.deepcopy(layer)
    clone.delete_adapter("a")
    assert clone.acting() is None and layer.acting() is layer.encoders["a"]
    layer.enable_adapters(False)
    assert layer.acting() is None
