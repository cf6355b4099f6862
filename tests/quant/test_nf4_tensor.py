"""NF4Tensor: bit for bit bitsandbytes', and left as it is by everything that casts, moves, copies or shards a module."""

import copy
import io

import pytest
import torch
from torch import nn

import fastlora
from fastlora import NF4Tensor, reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KEYS = {"codes", "absmax", "nested_absmax", "nested_code", "offset"}
COMPARED = "0.50.2"  # of bitsandbytes; NF4Tensor's promises are about what this version makes


def bits(tensor):
    return {name: t.detach().clone() for name, t in tensor.state_dict().items()}


def same_bits(tensor, expected, device=None):
    now = tensor.state_dict()
    assert set(now) == set(expected)
    for name, value in now.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value.to(expected[name].device), expected[name]), name
        assert device is None or value.device == torch.device(device)


def made(shape=(96, 256), dtype=BF16, device="cpu", **options):
    return NF4Tensor.quantize(torch.randn(shape, device=device).to(dtype), **options)


# ---- the numbers --------------------------------------------------------------------------------------------


def test_bitsandbytes_is_the_one_compared_with():
    bnb = pytest.importorskip("bitsandbytes")
    assert bnb.__version__ == COMPARED, (
        "look whether it still makes the same bits, then say so here"
    )


def by_formula(tensor):
    """The weight of an NF4Tensor in fp32, rounded to its dtype; no op of fastlora's."""
    codes, *scales = (t.detach().cpu().view(-1) for t in (tensor.codes, *tensor.scales))
    absmax, *nested = (t.view(FP32) if t.dtype == torch.int32 else t for t in scales)
    if nested:
        absmax = reference.dequantize_scales(absmax, *nested, tensor.nested_block_size)
    form = tensor.shape, tensor.block_size, tensor.dtype, tensor.quant_type == "fp4"
    return reference.dequantize_nf4(codes, absmax, *form).to(tensor.device)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("shape", [(96, 256), (33, 72), (64, 4096), (3, 71)])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_it_is_bitsandbytes_bit_for_bit(shape, dtype, block_size, double_quant, device):
    """On the GPU everything; on the CPU the codes, where it looks 8-bit codes up in a table, those but for neighbours."""
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(shape, device=device).to(dtype)
    param = bnb.nn.Params4bit(
        weight, quant_type="nf4", compress_statistics=double_quant, blocksize=block_size
    )._quantize(device)
    theirs = NF4Tensor.from_bitsandbytes(param)
    ours = NF4Tensor.quantize(weight, block_size, double_quant)
    for name, value in bits(ours).items():
        their = theirs.state_dict()[name]
        assert value.shape == their.shape
        if device.type == "cuda" or name != "absmax" or not double_quant:
            assert torch.equal(value, their), name
        else:
            code = ours.nested_code.view(FP32)
            assert (code[value.long()] - code[their.long()]).abs().max() < 0.015  # a gap at most
            assert (value != their).float().mean() < 0.2
    assert theirs.dtype == dtype
    expected = by_formula(theirs)
    assert torch.equal(theirs.dequantize(), expected)
    if reads_rightly(shape, block_size, device):
        made = bnb.functional.dequantize_4bit(param.data, param.quant_state)
        assert torch.equal(made, expected)


def reads_rightly(shape, block_size, device):
    """bitsandbytes' CPU kernels read a weight whose rows are not of whole blocks wrongly."""
    return device.type == "cuda" or shape[1] % block_size == 0


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, BF16, FP32])
@pytest.mark.parametrize("shape", [(64, 128), (33, 72), (7, 64)])
def test_bitsandbytes_memory_is_shared_both_ways(shape, quant_type, double_quant, storage, device):
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(shape, device=device).to(BF16)
    param = bnb.nn.Params4bit(
        weight, quant_type=quant_type, compress_statistics=double_quant, quant_storage=storage
    )._quantize(device)
    tensor = NF4Tensor.from_bitsandbytes(param)
    assert tensor.quant_type == quant_type
    assert at(tensor) == places(param)
    expected = by_formula(tensor)
    assert torch.equal(tensor.dequantize(), expected)
    back = tensor.to_bitsandbytes()
    assert places(back) == places(param) and back.bnb_quantized
    packed = back.quant_state.as_dict(packed=True)
    again = bnb.functional.QuantState.from_dict(packed, device)
    if reads_rightly(shape, 64, device):
        for codes, state in ((param, param.quant_state), (back, back.quant_state), (back, again)):
            assert torch.equal(bnb.functional.dequantize_4bit(codes.data, state), expected)


def places(param):
    """Where a Params4bit keeps its bits."""
    state = param.quant_state
    nested = (state.state2.absmax, state.state2.code, state.offset) if state.nested else ()
    return [t.data_ptr() for t in (param, state.absmax, *nested)]


def at(tensor):
    return [t.data_ptr() for t in (tensor.codes, *tensor.scales)]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    ("shape", "block_size"), [((64, 128), 64), ((33, 72), 64), ((3, 71), 32), ((1, 1), 64), ((16, 4096), 2048)]
)  # fmt: skip
def test_ours_is_read_by_bitsandbytes_where_it_lies(shape, block_size, double_quant, device):
    bnb = pytest.importorskip("bitsandbytes")
    tensor = made(shape, FP16, device, block_size=block_size, double_quant=double_quant)
    param = tensor.to_bitsandbytes()
    state = param.quant_state
    assert places(param) == at(tensor)
    assert (state.quant_type, state.blocksize, state.dtype) == ("nf4", block_size, FP16)
    assert tuple(state.shape) == shape and state.nested == double_quant
    assert not double_quant or (state.state2.blocksize, state.state2.dtype) == (256, FP32)
    expected = by_formula(tensor)
    if reads_rightly(shape, block_size, device):
        assert torch.equal(bnb.functional.dequantize_4bit(param.data, state), expected)
    back = NF4Tensor.from_bitsandbytes(param)
    assert at(back) == at(tensor)
    same_bits(back, bits(tensor))
    assert (back.form, back.dtype) == (tensor.form, FP16)
    assert torch.equal(back.dequantize(), expected)
    with torch.no_grad():  # one memory: what is written there is seen here
        param.data[0] ^= 0xFF
    assert torch.equal(back.codes, tensor.codes)
    assert not torch.equal(back.dequantize(), expected)


def hostile(device):
    """Rows of a block each: (weight, which rows hold a NaN, which an infinity, which are tiny throughout)."""
    weight = torch.randn(12, 64, device=device)
    nan, inf, tiny = [1, 2, 6], [3, 4, 5], [7, 8]
    weight[1, 5] = torch.nan
    weight[2] = torch.nan
    weight[3, 9] = -torch.inf
    weight[4, 0], weight[4, 1] = torch.inf, -torch.inf
    weight[5, 63] = torch.inf
    weight[6, 3], weight[6, 4] = torch.inf, torch.nan
    weight[7] = 0
    weight[8] *= 1e-40
    weight[9, ::2] *= 1e-40  # denormals in an ordinary block
    weight[10] *= 1e-36
    weight[11] *= 1e37
    return weight, nan, inf, tiny


@pytest.mark.filterwarnings("ignore:weight. holds NaN")
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_hostile_blocks_are_bitsandbytes(dtype, device):
    """On the GPU bit for bit but for tiny blocks; on the CPU, where a NaN makes their block NaN, the others."""
    bnb = pytest.importorskip("bitsandbytes")
    weight, nan, inf, tiny = hostile(device)
    weight = weight.to(dtype)
    param = bnb.nn.Params4bit(weight.clone(), quant_type="nf4", compress_statistics=False)
    theirs = NF4Tensor.from_bitsandbytes(param._quantize(device))
    ours = NF4Tensor.quantize(weight, 64, False)
    back = ours.dequantize(FP32).cpu()
    if device.type == "cpu":  # bitsandbytes' kernels may take subnormal numbers for zero
        assert torch.equal(ours.absmax[tiny], theirs.absmax[tiny])
    assert (back[7] == 0).all() and (back[8].abs() <= 1e-38).all()
    exempt = set(tiny)
    if device.type == "cpu":
        exempt |= {*nan, *inf}
        assert theirs.absmax.view(FP32)[nan].isnan().all()
        assert torch.equal(theirs.absmax[inf], ours.absmax[inf])
    for row in set(range(12)) - exempt:
        for name in ("codes", "absmax"):
            assert torch.equal(getattr(ours, name)[row], getattr(theirs, name)[row]), (row, name)
    absmax = ours.absmax.view(FP32).cpu()
    assert absmax[2] == 0 and absmax[[3, 4, 5, 6]].isinf().all()  # NaN takes no part
    assert back[1].isfinite().all() and back[1, 5] == -absmax[1, 0]
    assert not back[[3, 4, 5, 6]].isfinite().any()
    assert back[[9, 10, 11]].isfinite().all()


def test_the_default_device_does_not_matter():
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(4, 64)
    param = bnb.nn.Params4bit(weight, quant_type="nf4")._quantize("cpu")
    expected = NF4Tensor.quantize(weight).dequantize()
    with torch.device("meta"):
        assert torch.equal(NF4Tensor.from_bitsandbytes(param).dequantize(), expected)
        assert torch.equal(NF4Tensor.quantize(weight).dequantize(), expected)


def test_what_is_not_bitsandbytes_is_refused_by_name():
    bnb = pytest.importorskip("bitsandbytes")
    with pytest.raises(TypeError, match="param: got Parameter"):
        NF4Tensor.from_bitsandbytes(nn.Parameter(torch.zeros(2, 2)))
    with pytest.raises(ValueError, match="is not quantised"):
        NF4Tensor.from_bitsandbytes(bnb.nn.Params4bit(torch.zeros(2, 2)))
    param = bnb.nn.Params4bit(torch.randn(4, 64), quant_type="nf4")._quantize("cpu")
    param.quant_state.code = param.quant_state.code * 2
    with pytest.raises(ValueError, match="code of its own"):
        NF4Tensor.from_bitsandbytes(param)
    del param.quant_state.code
    param.quant_state.code, param.quant_state.packing_format_for_cpu = None, True
    with pytest.raises(ValueError, match="packed anew"):
        NF4Tensor.from_bitsandbytes(param)


@pytest.mark.parametrize("shape", [(1, 1), (3, 71), (5, 100), (0, 64), (4, 0)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_odd_and_empty_shapes(shape, double_quant, device):
    weight = torch.randn(shape, device=device)
    tensor = NF4Tensor.quantize(weight, 64, double_quant)
    back = tensor.dequantize()
    assert back.shape == shape and back.dtype == FP32
    codes, absmax = reference.quantize_nf4(weight.cpu(), 64)
    exact = reference.dequantize_nf4(codes, absmax, shape, 64, FP32)
    assert (back.cpu() - exact).norm() <= 0.01 * weight.cpu().norm()


def test_strides_do_not_matter(device):
    weight = torch.randn(64, 96, device=device)
    same_bits(NF4Tensor.quantize(weight.t()), bits(NF4Tensor.quantize(weight.t().contiguous())))
    part = torch.randn(64, 200, device=device)[:, 3:131]
    same_bits(NF4Tensor.quantize(part), bits(NF4Tensor.quantize(part.contiguous())))


def test_a_weight_that_is_not_finite_warns():
    for value in (torch.nan, torch.inf):
        weight = torch.randn(4, 64)
        weight[1, 2] = value
        with pytest.warns(UserWarning, match="NaN or infinities"):
            NF4Tensor.quantize(weight)


def test_a_large_weight_is_no_infinity(recwarn):
    NF4Tensor.quantize(torch.full((4, 64), 4e4, dtype=FP16))
    assert not recwarn.list


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(weight=[[1.0]]), "weight: got list"),
        (dict(weight=torch.zeros(3)), r"weight: got torch.float32 \(3,\)"),
        (dict(weight=torch.zeros(2, 2, dtype=torch.int8)), "weight: got torch.int8"),
        (dict(weight=torch.zeros(2, 2), block_size=48), "block_size: got 48"),
        (dict(weight=torch.zeros(2, 2), block_size=True), "block_size: got True"),
        (dict(weight=torch.zeros(2, 2), nested_block_size=3), "nested_block_size: got 3"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        NF4Tensor.quantize(**arguments)


@pytest.mark.parametrize("change", ["codes", "absmax", "nested_absmax", "nested_code", "offset"])
def test_parts_that_do_not_fit_are_named(change):
    parts = {name: t.data for name, t in made().named_parameters()}
    parts[change] = parts[change].view(-1)[1:]
    scales = tuple(parts[name] for name in ("absmax", "nested_absmax", "nested_code", "offset"))
    with pytest.raises(ValueError, match=change):
        NF4Tensor(parts["codes"], scales, (96, 256), BF16, 64, 256)


# ---- nothing changes the bits ---------------------------------------------------------------------------------


def test_its_parameters_are_frozen_integers_with_a_row_each():
    tensor = made()
    assert set(bits(tensor)) == KEYS
    for parameter in tensor.parameters():
        assert not parameter.requires_grad and not parameter.is_floating_point()
    assert tensor.codes.shape == (96, 128) and tensor.absmax.shape == (96, 4)
    assert made((33, 72)).codes.shape == (33 * 36,)
    assert made().nbytes < 96 * 256 * 0.54 + 2048


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.half(),
        lambda m: m.float(),
        lambda m: m.double(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.requires_grad_(False),
        lambda m: m.train(),
        lambda m: m.share_memory(),
        copy.deepcopy,
    ],
)
@pytest.mark.parametrize("double_quant", [False, True])
def test_casts_and_copies_leave_every_bit(change, double_quant):
    tensor = made(double_quant=double_quant)
    before, weight = bits(tensor), tensor.dequantize()
    changed = change(nn.Sequential(tensor))[0]
    same_bits(changed, before)
    assert torch.equal(changed.dequantize(), weight)


@pytest.mark.gpu
def test_offload_and_back_leaves_every_bit():
    tensor = made(device="cuda")
    before = bits(tensor)
    same_bits(tensor.cpu(), before, "cpu")
    on_cpu = tensor.dequantize()
    same_bits(tensor.cuda(), before, "cuda:0")
    assert torch.equal(tensor.dequantize().cpu(), on_cpu)
    assert ("dequantize", "cuda") in fastlora.launches()


@pytest.mark.parametrize("double_quant", [False, True])
def test_state_dict_round_trips(double_quant):
    tensor = made(double_quant=double_quant)
    file = io.BytesIO()
    torch.save(tensor.state_dict(), file)
    file.seek(0)
    other = NF4Tensor.empty((96, 256), BF16, double_quant=double_quant)
    other.load_state_dict(torch.load(file, weights_only=True))
    same_bits(other, bits(tensor))
    assert torch.equal(other.dequantize(), tensor.dequantize())
    with pytest.raises(RuntimeError, match="size mismatch"):
        NF4Tensor.empty((96, 128), BF16, double_quant=double_quant).load_state_dict(tensor.state_dict())  # fmt: skip


def test_no_two_weights_share_memory():
    one, other = made(), made()
    assert not {t.data_ptr() for t in one.parameters()} & {t.data_ptr() for t in other.parameters()}
    with torch.no_grad():
        one.nested_code.zero_()
    assert torch.equal(made().nested_code, other.nested_code) and other.nested_code.any()


def test_meta_then_materialised():
    tensor = NF4Tensor.empty((96, 256), BF16, device="meta")
    assert all(p.is_meta for p in tensor.parameters())
    loaded = made()
    tensor.load_state_dict(loaded.state_dict(), assign=True)
    assert torch.equal(tensor.dequantize(), loaded.dequantize())


def test_compiled_and_exported():
    tensor = made()
    x = torch.randn(3, 256, dtype=BF16)

    def run(x):
        return x @ tensor.dequantize().t()

    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = tensor

        def forward(self, x):
            return x @ self.weight.dequantize().t()

    assert torch.equal(torch.export.export(Layer(), (x,)).module()(x), run(x))
