"""Small models that tests of several folders share, made in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 96


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random two-layer Llama with grouped-query attention; the same for the same seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).to(dtype).eval()


class PlainNet(nn.Module):
    """A plain torch model: an embedding, two residual blocks of linears, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 24)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(24, 40), "down": nn.Linear(40, 24, bias=False)})
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer["down"](torch.relu(layer["up"](x)))
        return self.head(self.norm(x))


def plain_net(seed: int = 0) -> PlainNet:
    torch.manual_seed(seed)
    return PlainNet().eval()


def some_ids(seed: int = 5, rows: int = 2, length: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    out = model(ids)
    return out if isinstance(out, Tensor) else out.logits


def randomize_adapters(model: nn.Module, seed: int = 7, scale: float = 0.1) -> None:
    """Non-zero A and B, so that an adapter that is ignored shows; by name order, alike in fastlora
    and PEFT."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".lora_A." in name or ".lora_B." in name:
                noise = torch.randn(parameter.shape, generator=generator) * scale
                parameter.copy_(noise)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What a refused call must not change: types, parameters by identity and value, flags."""
    return {
        "types": {name: type(module) for name, module in model.named_modules()},
        "modules": {name: id(module) for name, module in model.named_modules()},
        "parameters": {name: id(p) for name, p in model.named_parameters()},
        "trained": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "values": {name: value.detach().clone() for name, value in model.state_dict().items()},
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    for part in ("types", "modules", "parameters", "trained", "training"):
        assert after[part] == before[part], part
    assert after["values"].keys() == before["values"].keys()
    for name, value in before["values"].items():
        got = after["values"][name]
        torch.testing.assert_close(got, value, rtol=0, atol=0, equal_nan=True)


def loss_and_grads(model, ids):
    """The loss of a step that predicts ``ids``, and copies of the gradients by name."""
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads
