"""Virtual tokens: what prompt tuning, P-tuning and prefix tuning train. How they enter a model's forward:
``models/prompt_forward.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from .adapter import AdapterLayer, AdapterTensor, check_adapter_name


class LSTMHead(nn.Module):
    """[1, tokens, width] -> the same: an LSTM in both directions, then two linears."""

    def __init__(self, width: int, hidden: int, layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.lstm = nn.LSTM(
            width, hidden, num_layers=layers, dropout=dropout, bidirectional=True, batch_first=True
        )
        self.mlp = nn.Sequential(
            nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(self.lstm(x)[0])
        return y


def mlp_head(width: int, hidden: int) -> nn.Sequential:
    """P-tuning's MLP."""
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, width),
    )


def prefix_head(width: int, hidden: int, out: int) -> nn.Sequential:
    """Prefix tuning's MLP."""
    return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, out))


class VirtualTokens(nn.Module):
    """One adapter's virtual tokens, by embeddings and, while they are trained that way, a network behind them.

    Args:
        embedding: [rows, width].
        transform: [1, rows, width] -> [1, rows, out]; None: the embeddings are the tokens.
        count: how many tokens stand in front of the input; with an encoder and a decoder there may be more rows.
        task_type: the adapter's, by which forward's arguments are handled.
    """

    def __init__(
        self, embedding: nn.Embedding, transform: nn.Module | None, count: int, task_type: str
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.transform = transform
        self.count, self.task_type = count, task_type

    def forward(self) -> Tensor:
        """[rows, out], as the file holds them."""
        weight: Tensor = self.embedding.weight
        return weight if self.transform is None else self.transform(weight[None])[0]

    def collapsed(self, state: Mapping[str, Tensor]) -> Tensor:
        """``forward`` with the parameters of ``state``, without gradient and without dropout.

        Raises:
            ValueError: it lacks some.
        """
        absent = sorted(name for name, _ in self.named_parameters() if name not in state)
        if absent:
            raise ValueError(f"state_dict: lacks the virtual tokens' {', '.join(absent)}")
        training = self.training
        try:
            with torch.no_grad():
                value: Tensor = torch.func.functional_call(self.eval(), dict(state), ())
        finally:
            self.train(training)
        return value


class PrefixTokens(VirtualTokens):
    """Virtual tokens that are keys and values of every layer.

    Args:
        layers, heads: of the base that has them; a row is [2 * layers, heads, head_dim].
        stride: layer i has the keys and values number (i * stride) % layers. 1, or 2 where PEFT counts an encoder and a
            decoder: its cut of the rows comes to that, and files would mean something else otherwise.
    """

    def __init__(
        self,
        embedding: nn.Embedding,
        transform: nn.Module | None,
        count: int,
        task_type: str,
        *,
        layers: int,
        heads: int,
        stride: int = 1,
    ) -> None:
        super().__init__(embedding, transform, count, task_type)
        self.layers, self.heads, self.stride = layers, heads, stride

    def keys_values(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Every layer's keys and values [heads, tokens, head_dim]."""
        rows = (
            self().to(dtype).view(self.count, 2 * self.layers, self.heads, -1).permute(1, 2, 0, 3)
        )
        pairs = [i * self.stride % self.layers for i in range(self.layers)]
        return [(rows[2 * pair], rows[2 * pair + 1]) for pair in pairs]


class PromptLayer(AdapterLayer):
    """The virtual tokens of a model, by adapter; it stands at the root of the base and has no forward of its own."""

    by_adapter: ClassVar[tuple[str, ...]] = ("encoders",)
    names_in_file: ClassVar[bool] = False

    def __init__(self, peft_type: str) -> None:
        super().__init__()
        self.peft_type = peft_type
        self.encoders = nn.ModuleDict()

    def add_adapter(self, name: str, tokens: VirtualTokens) -> None:
        """Another adapter's virtual tokens.

        Raises:
            ValueError: the name is taken, or none.
        """
        if check_adapter_name(name) in self.encoders:
            raise ValueError(f"name: adapter {name!r} exists already; choose another name")
        self.encoders[name] = tokens

    def adapter_tensors(self, name: str) -> dict[str, AdapterTensor]:
        if name not in self.encoders:
            return {}
        tokens: VirtualTokens = self.encoders[name]  # type: ignore[assignment]
        at = f"encoders.{name}."
        if tokens.transform is None:
            entry = AdapterTensor(f"{at}embedding.weight", tokens.embedding.weight)
        else:
            value = tokens.collapsed(dict(tokens.named_parameters()))
            entry = AdapterTensor(at, value, tokens.collapsed)
        return {"prompt_embeddings": entry}

    def check_active(self, names: list[str]) -> None:
        """ValueError if more than one of ``names`` has virtual tokens."""
        present = [name for name in names if name in self.encoders]
        if len(present) > 1:
            raise ValueError(
                f"names: got {present}; virtual tokens do not add up, accepted is one adapter at a time"
            )

    def acting(self) -> VirtualTokens | None:
        """The virtual tokens that act now."""
        names = self.acting_adapters()
        return self.encoders[names[0]] if names else None  # type: ignore[return-value]
