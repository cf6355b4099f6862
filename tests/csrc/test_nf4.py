"""NF4 in the op library, on Triton and in plain torch: one specification, bit for bit, on hostile inputs too."""

import math

import pytest
import torch

import fastlora
from fastlora import _library, ops, reference
from fastlora.ops import Form
from fastlora.quant.scales import dynamic_map, quantize_scales

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [(1, 1), (3, 71), (33, 72), (96, 256), (64, 4096), (130, 1000)]
needs_library = pytest.mark.skipif(
    not _library.load(), reason=f"no op library: {_library.status().reason}"
)


def backends(device):
    """What runs the ops here: on a GPU csrc and Triton, on a CPU the library and Triton's interpreter."""
    return ("cuda", "triton") if device.type == "cuda" else ("torch", "triton")


def dtypes(backend, device):
    return (FP32, FP16) if backend == "triton" and device.type == "cpu" else (FP32, BF16, FP16)


def pack(code, absmax, shape, block_size, double_quant, fp4=False):
    """Random codes and scales of a weight of that shape, as ops take them: (codes, scales, form)."""
    if not double_quant:
        return code, (absmax,), Form(*shape, block_size, 0, fp4)
    return code, quantize_scales(absmax, 256), Form(*shape, block_size, 256, fp4)


def random_weight(shape, block_size, double_quant, device, fp4=False):
    count = math.prod(shape)
    code = torch.randint(0, 256, (-(-count // 2),), dtype=torch.uint8, device=device)
    absmax = torch.rand(-(-count // block_size), device=device) * 3 + 1e-3
    return pack(code, absmax, shape, block_size, double_quant, fp4)


def truth(codes, scales, form, dtype):
    """By the formula, in numpy, one element at a time of the flattening."""
    import numpy as np

    absmax = scales[0].cpu()
    if form.nested_block_size:
        q, wide, code, offset = (t.cpu() for t in scales)
        scale = wide.repeat_interleave(form.nested_block_size)[: q.numel()]
        absmax = (code[q.long()].numpy() * scale.numpy()) + offset.numpy()
    absmax = np.asarray(absmax, np.float32)
    value = np.asarray(reference.FP4_CODE if form.fp4 else reference.NF4_CODE, np.float32)
    at = np.arange(form.rows * form.cols)
    byte = codes.cpu().numpy()[at // 2]
    code = np.where(at % 2 == 0, byte >> 4, byte & 15)
    flat = torch.from_numpy(value[code] * absmax[at // form.block_size])
    return flat.view(form.rows, form.cols).to(dtype)


@pytest.mark.parametrize("fp4", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_is_exact(shape, block_size, double_quant, fp4, device):
    weight = random_weight(shape, block_size, double_quant, device, fp4)
    for backend in backends(device):
        with fastlora.backend(backend, strict=True):
            for dtype in dtypes(backend, device):
                got = ops.dequantize(*weight, dtype)
                assert got.dtype == dtype
                assert torch.equal(got.cpu(), truth(*weight, dtype)), (backend, dtype)
        assert fastlora.launches()["dequantize", backend] == len(dtypes(backend, device))


@pytest.mark.parametrize("block_size", [32, 64, 512, 4096])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_is_the_reference(shape, block_size, device):
    for backend in backends(device):
        for dtype in dtypes(backend, device):
            weight = torch.randn(shape, device=device).to(dtype)
            with fastlora.backend(backend, strict=True):
                codes, absmax = ops.quantize(weight, block_size)
            true_codes, true_absmax = reference.quantize_nf4(weight.cpu(), block_size)
            assert torch.equal(absmax.cpu(), true_absmax)
            # The GPU's reciprocal may be a last bit off: a value on a bound falls on its other side.
            wrong = (codes.cpu() != true_codes).sum().item()
            assert wrong <= (codes.numel() // 1000 if backend == "cuda" else 0), (backend, dtype)


def test_blocks_of_zeros_nan_infinities_and_denormals(device):
    weight = torch.randn(7, 64, device=device)
    weight[1] = 0
    weight[2, 5] = torch.nan
    weight[3] = torch.nan
    weight[4, 9] = -torch.inf
    weight[5] *= 1e-40
    true_codes, true_absmax = reference.quantize_nf4(weight.cpu(), 64)
    for backend in backends(device):
        with fastlora.backend(backend, strict=True):
            codes, absmax = ops.quantize(weight, 64)
            assert torch.equal(absmax.cpu(), true_absmax)
            codes = codes.cpu().view(7, 32)
            for row in (1, 2, 3, 4):
                assert torch.equal(codes[row], true_codes.view(7, 32)[row]), (backend, row)
            back = ops.dequantize(codes.to(device), (absmax,), Form(7, 64, 64, 0, False), FP32)
        assert (back[1] == 0).all()
        assert (back[3] == 0).all()  # of NaN alone: absmax is 0
        assert back[2].isfinite().all()
        assert back[2, 5] == -absmax[2]
        assert not back[4].isfinite().any()
        assert (back[5].abs() <= 1e-38).all()


@needs_library
@pytest.mark.parametrize("block_size", [1, 256])
def test_scales_are_quantised_to_the_nearest_code(block_size, device):
    code = dynamic_map().to(device)
    values = torch.cat((torch.randn(1000), code.cpu(), (code[1:] + code[:-1]).cpu() / 2)).to(device)
    codes, absmax = torch.ops.fastlora._nf4_quantize_scales(values, code, block_size)
    true_codes, true_absmax = reference.quantize_scales(values.cpu(), code.cpu(), block_size)
    assert torch.equal(absmax.cpu(), true_absmax)
    scale = absmax.repeat_interleave(block_size)[: values.numel()]
    error = (code[codes.long()] * scale - values).abs()
    best = (code[None] * scale[:, None] - values[:, None]).abs().amin(1)
    assert (error <= best * (1 + 1e-5) + 1e-7 * scale).all()
    if device.type == "cpu":
        assert torch.equal(codes, true_codes)
    nothing = torch.zeros_like(values)
    zeros, absmax = torch.ops.fastlora._nf4_quantize_scales(nothing, code, block_size)
    assert (absmax == 0).all() and (zeros == 0).all()  # 0 / 0: absmax makes zeros of them again


@needs_library
def test_a_part_of_the_weight_comes_into_memory_of_the_callers(device):
    """Slabs, at any even offset and of any length, into views that are not aligned."""
    codes, scales, form = random_weight((37, 200), 64, True, device)
    whole = ops.dequantize(codes, scales, form, BF16).view(-1)
    room = torch.empty(8000, dtype=BF16, device=device)
    run = torch.ops.fastlora._nf4_dequantize
    for begin, count, at in ((0, 7400, 0), (64, 128, 0), (8, 999, 3), (2, 5000, 1), (7398, 2, 8), (6, 0, 0)):  # fmt: skip
        room.fill_(7.0)
        out = room[at : at + count]
        run(codes, *scales, 64, 256, False, begin, out)
        assert torch.equal(out, whole[begin : begin + count])
        assert (room[at + count :] == 7).all() and (room[:at] == 7).all()


@needs_library
def test_codes_at_any_address(device):
    codes, scales, form = random_weight((37, 200), 64, False, device)
    expected = ops.dequantize(codes, scales, form, FP16)
    for offset in (1, 2, 3):
        room = torch.zeros(codes.numel() + 4, dtype=torch.uint8, device=device)
        moved = room[offset : offset + codes.numel()].copy_(codes)
        assert torch.equal(ops.dequantize(moved, scales, form, FP16), expected)


@needs_library
def test_bad_arguments_are_refused(device):
    codes, scales, _ = random_weight((4, 64), 64, True, device)
    out = torch.empty(4, 64, dtype=BF16, device=device)
    run = torch.ops.fastlora._nf4_dequantize
    run(codes, *scales, 64, 256, False, 0, out)
    wrong = [
        (codes, *scales, 48, 256, False, 0, out),
        (codes, *scales, 64, 100, False, 0, out),
        (codes, *scales, 64, 256, False, 1, out),
        (codes, *scales, 64, 256, False, 2, out),  # past the end
        (codes[:-1], *scales, 64, 256, False, 0, out),
        (codes, scales[0][:-1], *scales[1:], 64, 256, False, 0, out),
        (codes, scales[0].float(), *scales[1:], 64, 256, False, 0, out),
        (codes, *scales[:2], scales[2][:255], scales[3], 64, 256, False, 0, out),
        (codes, *scales[:3], None, 64, 256, False, 0, out),
        (codes, *scales, 64, 256, False, 0, out.t()),
        (codes, *scales, 64, 256, False, 0, out.double()),
    ]
    for arguments in wrong:
        with pytest.raises((ValueError, RuntimeError), match="_nf4"):
            run(*arguments)
    for weight in (torch.zeros(4, 64, device=device).t(), torch.zeros(4, 64, device=device).double()):  # fmt: skip
        with pytest.raises((ValueError, RuntimeError), match="_nf4"):
            torch.ops.fastlora._nf4_quantize(weight, 64)


def test_the_ops_have_fake_kernels(device):
    weight = torch.randn(33, 71, device=device)
    torch.library.opcheck(torch.ops.fastlora._quantize.default, (weight, 64))
    codes, scales, form = random_weight((33, 71), 64, True, device)
    torch.library.opcheck(
        torch.ops.fastlora._dequantize.default, (codes, list(scales), *form, FP16)
    )


@pytest.mark.huge
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("rows", [2**16, 2**16 + 1])
def test_more_elements_than_31_bits_count(rows, double_quant, backend):
    """Exactly 2^31 elements, and more: the last rows, and those around 2^30, are those of a weight of two rows."""
    cols = 2**15
    blocks, nested = cols // 64, 256
    weight = torch.randn(rows, cols, device="cuda", dtype=BF16)
    with fastlora.backend(backend, strict=True):
        codes, absmax = ops.quantize(weight, 64)
        scales = quantize_scales(absmax, nested) if double_quant else (absmax,)
        form = Form(rows, cols, 64, nested if double_quant else 0, False)
        whole = ops.dequantize(codes, scales, form, BF16)
        assert fastlora.launches() == {("quantize", backend): 1, ("dequantize", backend): 1}
        for begin in (0, rows // 2 - 1, rows - 2):
            part = slice(begin, begin + 2)
            part_codes, part_absmax = ops.quantize(weight[part].contiguous(), 64)
            assert torch.equal(codes.view(rows, -1)[part].flatten(), part_codes)
            assert torch.equal(absmax.view(rows, -1)[part].flatten(), part_absmax)
            their = scales[0].view(rows, blocks)[part].flatten(), *scales[1:]
            if double_quant:
                their = their[0], scales[1].view(rows, -1)[part].flatten(), *scales[2:]
            exact = truth(part_codes, their, form._replace(rows=2), BF16)
            assert torch.equal(whole[part].cpu(), exact)
    assert ((whole - weight).abs().amax() < 1.0).item()
