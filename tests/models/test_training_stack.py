"""What surrounds a model in training, with fastlora's layers and with accelerated PEFT layers
alike."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import LoraConfig
from tests.tiny_models import logits, plain_net, randomize_adapters, some_ids, tiny_llama

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "plain": ["up", "down"]}
BASES = {"llama": tiny_llama, "plain": plain_net}


def own(kind: str, **settings: Any) -> Any:
    config = LoraConfig(r=4, target_modules=TARGETS[kind], **settings)
    model = fastlora.get_peft_model(BASES[kind](), config)
    randomize_adapters(model)
    return model.train()


def stock(kind: str, **settings: Any) -> Any:
    config = peft.LoraConfig(r=4, target_modules=TARGETS[kind], **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(BASES[kind](), config)
    randomize_adapters(model)
    return model.train()


def accelerated(kind: str, **settings: Any) -> Any:
    return fastlora.accelerate(stock(kind, **settings))


BUILDERS = pytest.mark.parametrize("build", [own, accelerated])


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    out = logits(model, ids)
    return nn.functional.cross_entropy(out.flatten(0, 1), ids.flatten())


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """By names that fastlora and PEFT share."""
    return {
        name.removesuffix(".weight").replace(".base_layer", ""): p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def assert_same_gradients(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    assert any(value.abs().sum() > 0 for value in want.values())
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=name, atol=1e-6, rtol=1e-4)


@pytest.fixture(scope="module")
def stock_gradients() -> dict[str, dict[str, torch.Tensor]]:
    result = {}
    for kind in BASES:
        model = stock(kind)
        loss_of(model, some_ids(rows=4)).backward()
        result[kind] = gradients(model)
    return result


@BUILDERS
@pytest.mark.parametrize("kind", BASES)
def test_gradient_accumulation_is_the_whole_batch(
    kind: str, build: Callable[..., Any], stock_gradients: Any
) -> None:
    model, ids = build(kind), some_ids(rows=4)
    for half in (ids[:2], ids[2:]):
        (loss_of(model, half) / 2).backward()
    assert_same_gradients(gradients(model), stock_gradients[kind])


@BUILDERS
def test_retained_graphs_and_frozen_halves(build: Callable[..., Any], stock_gradients: Any) -> None:
    model, ids = build("llama"), some_ids(rows=4)
    loss = loss_of(model, ids)
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()
    assert_same_gradients(gradients(model), stock_gradients["llama"])
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    model.zero_grad()
    loss_of(model, ids).backward()
    want = {n: g for n, g in stock_gradients["llama"].items() if "lora_B" in n}
    assert_same_gradients(gradients(model), want)


@BUILDERS
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_gives_the_same_gradients(
    build: Callable[..., Any], reentrant: bool, dropout: float
) -> None:
    plain, ids = build("llama", lora_dropout=dropout), some_ids(rows=4)
    saving = build("llama", lora_dropout=dropout)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saving.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
    for model in (plain, saving):
        torch.manual_seed(2)
        loss_of(model, ids).backward()
    assert_same_gradients(gradients(saving), gradients(plain))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_one_layer_by_hand(reentrant: bool) -> None:
    layer = fastlora.LoRALinear(12, 10, r=4, lora_dropout=0.5, init_lora_weights=False)
    x = torch.randn(6, 12, requires_grad=True)
    results = []
    for wrap in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=reentrant)):
        torch.manual_seed(0)
        layer.zero_grad()
        x.grad = None
        wrap(layer, x).square().sum().backward()
        results.append([x.grad.clone(), layer.lora_A["default"].grad.clone()])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)


@BUILDERS
def test_saved_tensor_hooks_see_everything(build: Callable[..., Any], stock_gradients: Any) -> None:
    model, ids, packed = build("plain"), some_ids(rows=4), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor.shape)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, ids)
    loss.backward()
    assert packed
    assert_same_gradients(gradients(model), stock_gradients["plain"])


@BUILDERS
@pytest.mark.parametrize("kind", BASES)
def test_torch_compile(kind: str, build: Callable[..., Any], stock_gradients: Any) -> None:
    model, ids = build(kind), some_ids(rows=4)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=kind == "plain")
    loss = loss_of(compiled, ids)
    torch.testing.assert_close(loss, loss_of(model, ids))
    loss.backward()
    assert_same_gradients(gradients(model), stock_gradients[kind])


def test_a_compiled_model_follows_its_adapters_state() -> None:
    model, ids = accelerated("plain"), some_ids()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    want = logits(model, ids)
    torch.testing.assert_close(logits(compiled, ids), want)
    model.base_model.disable_adapter_layers()
    torch.testing.assert_close(logits(compiled, ids), logits(plain_net(), ids))
    model.base_model.enable_adapter_layers()
    model.merge_adapter()
    torch.testing.assert_close(logits(compiled, ids), want, atol=1e-5, rtol=1e-5)
    fastlora.restore(model)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(compiled, ids), want, atol=1e-5, rtol=1e-5)


def test_optimiser_steps_as_stock() -> None:
    models = [stock("llama"), own("llama"), accelerated("llama")]
    curves = []
    for model in models:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=0.02)
        curve = []
        for step in range(8):
            loss = loss_of(model, some_ids(seed=step, rows=4))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0][-1] < curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[2] == pytest.approx(curves[0], rel=1e-4)


@pytest.fixture
def _one_process(tmp_path: Path) -> Iterator[None]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@BUILDERS
@pytest.mark.usefixtures("_one_process")
def test_distributed_data_parallel(build: Callable[..., Any], stock_gradients: Any) -> None:
    model = build("plain")
    wrapped = nn.parallel.DistributedDataParallel(model)
    loss_of(wrapped, some_ids(rows=4)).backward()
    assert_same_gradients(gradients(model), stock_gradients["plain"])


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize(
    ("build", "what"),
    [
        (own, "blocks"),
        (own, "layers"),
        (accelerated, "blocks"),
        (accelerated, "layers"),
        (accelerated, "adapters"),
    ],
)
def test_fully_sharded_data_parallel(
    build: Callable[..., Any], what: str, tmp_path: Path, stock_gradients: Any
) -> None:
    """What is sharded above a layer, or with it, is whole when it runs: fast. Adapters sharded on
    their own are whole only within their own forward, so PEFT's forward has to call it."""
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))  # also where there is a GPU

    model, ids = build("llama"), some_ids(rows=4)
    for block in model.get_base_model().model.layers:
        for layer in block.modules():
            if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer) and what != "blocks":
                if what == "adapters":
                    fully_shard(layer.lora_A["default"], mesh=mesh)
                    fully_shard(layer.lora_B["default"], mesh=mesh)
                fully_shard(layer, mesh=mesh)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    fastlora.reset_launches()
    loss_of(model, ids).backward()
    assert bool(fastlora.launches()) == (what != "adapters")
    got = {name: grad.full_tensor() for name, grad in gradients(model).items()}
    assert_same_gradients(got, stock_gradients["llama"])
    if build is own:
        with pytest.raises(ValueError, match="sharded"):
            model.save_pretrained(tmp_path)
        whole = {name: value.full_tensor() for name, value in model.state_dict().items()}
        model.save_pretrained(tmp_path, state_dict=whole)
        read = fastlora.load_adapter(tiny_llama(), tmp_path)
        torch.testing.assert_close(logits(read, ids), logits(model.eval(), ids))
        with pytest.raises(ValueError, match="before fully_shard"):
            fastlora.load_adapter(model, tmp_path)
    elif what != "blocks":
        with pytest.raises(ValueError, match="fully_shard"):
            fastlora.restore(model)


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_weights_merged_before_they_were_sharded_are_not_exchanged(ran: bool, whole: bool) -> None:
    """FSDP would go on with a Parameter that is in the model no more. After a forward the outermost module's are plain."""
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    model, ids = own("llama").eval(), some_ids()
    model.merge_adapter()
    want = logits(model, ids).detach()
    # Of several layers, the last alone is sharded: the first must not be exchanged before that is seen.
    fully_shard(model if whole else model.get_base_model().model.layers[-1], mesh=mesh)
    if ran:
        torch.testing.assert_close(logits(model, ids), want)
    else:
        layer = model.get_base_model().model.layers[-1].mlp.down_proj
        for call in (layer.unmerge, lambda: layer.enable_adapters(False)):
            with pytest.raises(ValueError, match="unmerge before fully_shard"):
                call()
    for call in (model.unmerge_adapter, model.disable_adapter_layers, lambda: model.disable_adapter().__enter__()):  # fmt: skip
        with pytest.raises(ValueError, match="merged before the weight was sharded; unmerge before fully_shard"):  # fmt: skip
            call()
        torch.testing.assert_close(logits(model, ids), want)
    model.enable_adapter_layers()  # nothing to exchange


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("ran", [False, True])
def test_what_is_sharded_is_not_merged_in_place(ran: bool) -> None:
    """Nor while it is gathered: what is put there goes with the next gathering."""
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, ids = own("llama").eval(), some_ids()
    want = logits(model, ids).detach()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    if ran:
        torch.testing.assert_close(logits(model, ids), want)
    with pytest.raises(ValueError, match=r"is sharded, .*merge before fully_shard"):
        model.merge_adapter()
    torch.testing.assert_close(logits(model, ids), want)
