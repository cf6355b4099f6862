"""Inside torch's training machinery; whole models are in tests/models/test_training_stack.py."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastlora
from tests.faults.common import operands


def losses(device, wrap, steps=4, width=24, kind=fastlora.LoRALinear):
    """A two-layer net that shares nothing but its input; Adam; dropout on."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(
        kind(width, width, r=width // 4, lora_dropout=0.2, init_lora_weights=False, device=device)
        for _ in range(2)
    )
    optimiser = torch.optim.Adam([p for p in layers.parameters() if p.requires_grad], lr=0.01)
    x = torch.randn(10, width, device=device, requires_grad=True)
    curve = []
    for _ in range(steps):
        optimiser.zero_grad()
        y = wrap(lambda x: layers[1](torch.tanh(layers[0](x))), x)
        loss = (y - 1.0).square().mean()
        loss.backward()
        optimiser.step()
        curve.append(loss.item())
    assert len(set(curve)) == steps  # every step changed something
    return curve


def offloaded(function, x):
    with torch.autograd.graph.save_on_cpu():
        return function(x)


def quantised(function, x):
    """A hook that keeps saved tensors as bytes, and gives back new tensors of another storage."""
    pack = lambda t: (t.detach().clone().contiguous().view(torch.uint8), t.dtype, t.shape)  # noqa: E731
    unpack = lambda p: p[0].clone().view(p[1]).view(p[2])  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return function(x)


WRAPPERS = {
    "reentrant": lambda f, x: checkpoint(f, x, use_reentrant=True),
    "not reentrant": lambda f, x: checkpoint(f, x, use_reentrant=False),
    "nested": lambda f, x: checkpoint(
        lambda x: checkpoint(f, x, use_reentrant=False) * 1.0, x, use_reentrant=False
    ),
    "offloaded": offloaded,
    "bytes": quantised,
    "offloaded checkpoint": lambda f, x: offloaded(
        lambda x: checkpoint(f, x, use_reentrant=False), x
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_saving_less_trains_the_same(strict_backend, device, name):
    assert losses(device, WRAPPERS[name]) == losses(device, lambda f, x: f(x))


def test_selective_checkpointing_sees_one_op(device):
    """Policies choose by op: ours must be there to be chosen, and recomputing them must not change the mask."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    seen = set()

    def policy(ctx, op, *args, **kwargs):
        seen.add(str(op))
        keep = op in (torch.ops.fastlora._gemm.default, torch.ops.aten.randint.low)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def wrap(function, x):
        return checkpoint(
            function,
            x,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )

    assert losses(device, wrap) == losses(device, lambda f, x: f(x))
    assert {"fastlora._gemm.default", "fastlora._down.default"} <= seen


def test_views_of_saved_tensors_are_not_seen_as_changed(device):
    """A view of the layer's input that is changed in place afterwards is an error, not a wrong gradient."""
    x, w, a, b = operands(device=device)
    source = x.requires_grad_() * 1.0
    y = fastlora.lora_linear(source[:6], w, a.requires_grad_(), b)
    with torch.no_grad():
        source[0] = 0.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_backend")
@pytest.mark.parametrize("name", WRAPPERS)
def test_saving_less_trains_the_same_on_the_gpu_under_autocast(name):
    def under_autocast(wrap):
        def run(function, x):
            with torch.autocast("cuda", torch.bfloat16):
                return wrap(function, x).float()

        return run

    saving = losses("cuda", under_autocast(WRAPPERS[name]), width=32)
    assert saving == losses("cuda", under_autocast(lambda f, x: f(x)), width=32)
