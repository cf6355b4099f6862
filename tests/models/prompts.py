"""What the tests of virtual tokens share: the methods, and models with them that one seed made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests import tiny_zoo
from tests.tiny_zoo import TASKS, tensors

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("PromptTuningConfig", {}),
    "p-mlp": ("PromptEncoderConfig", {}),
    "p-lstm": (
        "PromptEncoderConfig",
        {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 12},
    ),
    "prefix": ("PrefixTuningConfig", {}),
    "prefix-mlp": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 20}),
}
REPARAMETERISED = ("p-mlp", "p-lstm", "prefix-mlp")
COUNT = 3


def config(library: Any, method: str, task: str = "CAUSAL_LM", **changes: Any) -> Any:
    kind, settings = METHODS[method]
    settings = {"task_type": task, "num_virtual_tokens": COUNT, **settings, **changes}
    return getattr(library, kind)(**settings)


def build(library: Any, method: str, name: str = "llama", **changes: Any) -> Any:
    """The model with an adapter that one seed made; the base is the same for the same name."""
    task, make = TASKS[name]
    base = make()
    torch.manual_seed(1)
    return library.get_peft_model(base, config(library, method, task, **changes)).eval()


def inputs(name: str, padding: str | None = None) -> dict[str, Tensor]:
    return tiny_zoo.inputs(TASKS[name][0], padding)


def assert_same(got: Any, want: Any) -> None:
    got, want = tensors(got), tensors(want)
    assert got.keys() == want.keys() and got
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=2e-5, atol=5e-6)


def same(got: Any, want: Any) -> bool:
    return torch.equal(got.loss, want.loss)


def trained(model: Any) -> list[torch.nn.Parameter]:
    """In an order that both libraries share: the virtual tokens, then modules trained whole."""
    pairs = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [p for n, p in sorted(pairs, key=lambda pair: "modules_to_save" in pair[0])]
