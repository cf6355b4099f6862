"""QLoRALinear: a 4-bit base whose bits nothing changes, LoRALinear's features over it, sharded and offloaded too."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastlora
from fastlora import NF4Tensor, QLoRALinear

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def layer(**settings):
    torch.manual_seed(0)
    made = QLoRALinear.from_linear(nn.Linear(128, 96), **{"r": 8, **settings})
    for b in made.lora_B.values():
        nn.init.normal_(b)
    return made


def base_bits(module):
    return {
        name: t.clone() for name, t in module.state_dict().items() if name.startswith("weight.")
    }


def expected(module, x, names):
    w = module.weight.dequantize(x.dtype)
    y = nn.functional.linear(x, w, module.bias)
    for name in names:
        y = y + x @ module.lora_A[name].t() @ module.lora_B[name].t() * module.scaling[name]
    return y


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("double_quant", [True, False])
def test_from_linear_leaves_the_linear_alone(bias, double_quant):
    linear = nn.Linear(128, 96, bias=bias)
    before = copy.deepcopy(linear.state_dict())
    made = QLoRALinear.from_linear(linear, r=4, double_quant=double_quant, block_size=32)
    assert linear.weight.requires_grad
    for name, value in linear.state_dict().items():
        assert torch.equal(value, before[name])
    weight = NF4Tensor.quantize(linear.weight, 32, double_quant)
    assert torch.equal(made.weight.dequantize(), weight.dequantize())
    assert {n for n, p in made.named_parameters() if p.requires_grad} == {
        "lora_A.default",
        "lora_B.default",
    }
    if bias:
        assert torch.equal(made.bias, linear.bias) and made.bias is not linear.bias


def test_none_one_and_several_adapters():
    made, x = layer(), torch.randn(5, 128)
    torch.testing.assert_close(made(x), expected(made, x, ["default"]))
    made.add_adapter("second", r=4)
    nn.init.normal_(made.lora_B["second"])
    made.set_adapter(["default", "second"])
    torch.testing.assert_close(made(x), expected(made, x, ["default", "second"]), atol=1e-4, rtol=1e-4)  # fmt: skip
    made.enable_adapters(False)
    torch.testing.assert_close(made(x), expected(made, x, []))
    empty = layer(r=None)
    assert not list(empty.lora_A) and not any(p.requires_grad for p in empty.parameters())
    torch.testing.assert_close(empty(x), expected(empty, x, []))
    leaf = x.requires_grad_()
    (dx,) = torch.autograd.grad(empty(leaf).sum(), leaf)  # gradients pass through
    torch.testing.assert_close(dx, empty.weight.dequantize().sum(0).expand(5, 128))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.to(BF16),
        lambda m: m.double(),
        copy.deepcopy,
    ],
)
def test_casts_leave_the_base(change):
    made = layer()
    before = base_bits(made)
    changed = change(made)
    after = base_bits(changed)
    assert after.keys() == before.keys() and after
    for name, value in before.items():
        assert torch.equal(after[name], value) and after[name].dtype == value.dtype
    if changed.lora_A["default"].dtype in (BF16, FP16):
        x = torch.randn(3, 128).to(changed.lora_A["default"].dtype)
        assert changed(x).dtype == x.dtype


def test_state_dict_round_trips_through_another_layer():
    made, x = layer(), torch.randn(5, 128)
    other = QLoRALinear(128, 96, r=8)
    assert not torch.equal(other(x), made(x))
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(x), made(x))
    meta = QLoRALinear(128, 96, r=8, device="meta")
    meta.load_state_dict(made.state_dict(), assign=True)
    assert torch.equal(meta(x), made(x))


def test_dropout_trains_and_rests():
    made, x = layer(lora_dropout=0.5), torch.randn(64, 128)
    made.train()
    assert not torch.equal(made(x), made(x))
    made.eval()
    assert torch.equal(made(x), made(x))


def test_what_would_change_the_base_is_refused():
    for init in ("pissa", "olora"):
        with pytest.raises(ValueError, match="init_lora_weights"):
            layer(init_lora_weights=init)
    with pytest.raises(NotImplementedError, match="use_dora"):
        layer(use_dora=True)
    with pytest.raises(TypeError, match="linear: got Conv1d"):
        QLoRALinear.from_linear(nn.Conv1d(4, 4, 1))
    with pytest.raises(TypeError, match="weight: got Tensor"):
        QLoRALinear.from_quantized(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="bias: got shape"):
        QLoRALinear.from_quantized(NF4Tensor.quantize(torch.zeros(4, 64)), torch.zeros(3))
    with pytest.raises(ValueError, match="block_size: got 7"):
        layer(block_size=7)


def test_explain_says_that_it_dequantises():
    text = fastlora.explain(layer(), torch.randn(5, 128))
    assert "QLoRALinear: M=5 K=128 N=96 r=8" in text
    assert "dequantize" in text


# ---- sharded ----------------------------------------------------------------------------------------------------


def _shard_and_train(rank, world, port, queue):
    try:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        torch.manual_seed(0)
        model = nn.Sequential(layer(), nn.ReLU(), QLoRALinear.from_linear(nn.Linear(96, 64), r=4))
        nn.init.normal_(model[2].lora_B["default"])
        whole = copy.deepcopy(model)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=FP32)
        mesh = init_device_mesh("cpu", (world,))
        for part in (model[0], model[2], model):
            fully_shard(part, mesh=mesh, mp_policy=policy)
        # Rows of the weight are rows of its parameters: every rank holds its share of them.
        assert model[0].weight.codes.to_local().shape == (96 // world, 64)
        assert model[0].weight.absmax.to_local().shape == (96 // world, 2)
        x = torch.randn(6, 128)
        y = model(x)
        assert y.dtype == BF16
        exact = whole.to(BF16)(x.to(BF16))  # the adapters as the policy casts them
        assert torch.equal(y, exact)
        y.float().sum().backward()
        grad = model[0].lora_A["default"].grad.full_tensor()
        exact.float().sum().backward()
        torch.testing.assert_close(grad, whole[0].lora_A["default"].grad.float())
        for name, value in model.state_dict().items():
            value = value.full_tensor()
            assert value.dtype == before[name].dtype, name
            assert torch.equal(value, before[name]), name
        queue.put(None)
    except BaseException as error:
        queue.put(f"rank {rank}: {type(error).__name__}: {error}")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="fully_shard of this torch takes no integer parameters",
)
def test_fsdp2_shards_rows_and_leaves_every_bit():
    """Under a bf16 mixed-precision policy, which would ruin bits kept in a float type."""
    import socket

    import torch.multiprocessing as mp

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    mp.spawn(_shard_and_train, (2, port, queue), nprocs=2, join=True)
    assert [queue.get(), queue.get()] == [None, None]
