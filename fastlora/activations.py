"""The activations of a bottleneck: elementwise functions of p, and their gradients, in torch.

``triton/activations.py`` has the same by ``kind``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Activation(NamedTuple):
    """A function of p, which gives a new tensor, and dp of (g, p). ``kind`` is one name for all that are the same."""

    kind: str
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


_aten = torch.ops.aten
_ALL = (
    Activation("relu", F.relu, lambda g, p: _aten.threshold_backward(g, p, 0)),
    Activation("gelu", F.gelu, lambda g, p: _aten.gelu_backward(g, p)),
    Activation(
        "gelu_tanh",
        lambda p: F.gelu(p, approximate="tanh"),
        lambda g, p: _aten.gelu_backward(g, p, approximate="tanh"),
    ),
    Activation("silu", F.silu, lambda g, p: _aten.silu_backward(g, p)),
    Activation(
        "leaky_relu", F.leaky_relu, lambda g, p: _aten.leaky_relu_backward(g, p, 0.01, False)
    ),
    Activation("tanh", torch.tanh, lambda g, p: _aten.tanh_backward(g, torch.tanh(p))),
    Activation("sigmoid", torch.sigmoid, lambda g, p: _aten.sigmoid_backward(g, torch.sigmoid(p))),
    Activation("mish", F.mish, lambda g, p: _aten.mish_backward(g, p)),
    Activation("linear", torch.clone, lambda g, p: g),  # outputs of an op may not be one tensor
)
KINDS = {activation.kind: activation for activation in _ALL}
# By the names that transformers, and with it the adapters library, gives them.
ACTIVATIONS: dict[str, Activation] = {
    name: KINDS[kind]
    for kind, names in {
        "relu": ("relu",),
        "gelu": ("gelu",),
        "gelu_tanh": ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
        "silu": ("swish", "silu"),
        "leaky_relu": ("leakyrelu", "leaky_relu"),
        "tanh": ("tanh",),
        "sigmoid": ("sigmoid",),
        "mish": ("mish",),
        "linear": ("linear",),
    }.items()
    for name in names
}
