"""QLoRALinear: a 4-bit base whose bits nothing changes, LoRALinear's features over it, sharded and offloaded too."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastlora
from fastlora import NF4Tensor, QLoRALinear
from tests.faults.common import weight64

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


@pytest.mark.parametrize(("r", "alpha"), [(16, 8), (4, 32), (5, 3)])
def test_rslora_divides_by_the_root_of_the_rank(r, alpha):
    made, x = layer(r=r, lora_alpha=alpha, use_rslora=True), torch.randn(5, 128)
    assert made.scaling == {"default": alpha / r**0.5}
    update = (x.double() @ made.lora_A["default"].double().t()) @ made.lora_B["default"].double().t()  # fmt: skip
    base = x.double() @ weight64(made.weight).t() + made.bias.double()
    torch.testing.assert_close(made(x).double(), base + alpha / r**0.5 * update, atol=1e-4, rtol=1e-5)  # fmt: skip
    plain = layer(r=r, lora_alpha=alpha)
    assert plain.scaling == {"default": alpha / r} and not torch.equal(plain(x), made(x))


def test_what_would_change_the_base_is_refused():
    for init in ("pissa", "olora"):
        with pytest.raises(ValueError, match="init_lora_weights"):
            layer(init_lora_weights=init)
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

# in and out features of the first layer, its settings, and how its codes are sharded
SHARDED = {
    "rows": (128, 96, {}, [(48, 64), (48, 64)]),
    "uneven rows": (128, 97, {}, [(49, 64), (48, 64)]),
    "fewer rows than ranks": (128, 1, {}, [(1, 64), (0, 64)]),
    "blocks that straddle rows": (72, 97, {}, [(1746,), (1746,)]),
    "plain absmax": (128, 96, {"double_quant": False}, [(48, 64), (48, 64)]),
    "offloaded": (128, 96, {}, [(48, 64), (48, 64)]),
}


def _sharded(model, mesh, offload=False):
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    options = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if offload else {}
    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=FP32)
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh, mp_policy=policy, **options)
    return model


def _net(k, n, **settings):
    model = nn.Sequential(
        QLoRALinear.from_linear(nn.Linear(k, n), r=8, **settings),
        nn.ReLU(),
        QLoRALinear.from_linear(nn.Linear(n, 64), r=4),
    )
    for i in (0, 2):
        nn.init.normal_(model[i].lora_B["default"])
    return model


def _whole_bits(model):
    return {name: value.full_tensor().clone() for name, value in model.state_dict().items()}


def _same(got, expected, names):
    for name in names:
        assert got[name].dtype == expected[name].dtype, name
        assert torch.equal(got[name], expected[name]), name


def _shard_and_train(rank, mesh, folder, name):
    import torch.distributed.checkpoint as dcp

    k, n, settings, shapes = SHARDED[name]
    torch.manual_seed(0)
    model = _net(k, n, **settings)
    whole = copy.deepcopy(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    base = [name for name in before if "lora_" not in name]
    assert len(base) == 2 + sum(
        5 if m.weight.nested_block_size else 2 for m in (model[0], model[2])
    )
    _sharded(model, mesh, name == "offloaded")
    codes = model[0].weight.codes.to_local()
    assert codes.shape == shapes[rank] and codes.dtype == torch.uint8  # every rank has its share
    if len(shapes[0]) == 2:
        assert model[0].weight.absmax.to_local().shape == (shapes[rank][0], k // 64)

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4 and all("lora_" in name for name in trained)
    optimizer = torch.optim.SGD(trained.values(), lr=0.125)
    x = torch.randn(6, k)
    y = model(x)
    assert y.dtype == BF16
    exact = whole.to(BF16)(x.to(BF16))  # the adapters as the policy casts them
    assert torch.equal(y, exact)
    y.float().sum().backward()
    exact.float().sum().backward()
    _same(_whole_bits(model), before, before)
    optimizer.step()
    after = _whole_bits(model)
    _same(after, before, base)
    for name, parameter in whole.named_parameters():
        if parameter.grad is not None:
            stepped = before[name] - 0.125 * parameter.grad.float()
            torch.testing.assert_close(after[name], stepped, msg=name)
            assert not torch.equal(after[name], before[name])
    trained_y = model(x)
    assert not torch.equal(trained_y, y)

    dcp.save({"model": model.state_dict()}, checkpoint_id=folder)
    other = _sharded(_net(k, n, **settings), mesh, name == "offloaded")
    assert not torch.equal(other(x), trained_y)
    state = {"model": other.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    other.load_state_dict(state["model"])
    _same(_whole_bits(other), after, after)
    assert torch.equal(other(x), trained_y)


def _every_case(rank, world, folder):
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    try:
        mesh = init_device_mesh("cpu", (world,))
        for name in SHARDED:
            try:
                _shard_and_train(rank, mesh, f"{folder}/{name}", name)
            except Exception as error:
                raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="fully_shard of this torch takes no integer parameters",
)
def test_fsdp2_shards_trains_and_saves_and_leaves_every_bit(tmp_path):
    """Under a bf16 mixed-precision policy, which would ruin bits kept in a float type."""
    import torch.multiprocessing as mp

    mp.spawn(_every_case, (2, tmp_path), nprocs=2)  # raises what a process raises
