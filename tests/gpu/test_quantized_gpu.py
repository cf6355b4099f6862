"""4-bit models on a GPU: read there, trained there, merged there, on fastlora's kernels alone."""

from __future__ import annotations

import contextlib
import copy
import gc

import pytest
import torch

import fastlora
from fastlora import LoraConfig, NF4Tensor, QLoRALinear
from fastlora.io.quantize import quantize_checkpoint
from tests.tiny_models import logits, randomize_adapters, some_ids, tiny_llama

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


@pytest.fixture(params=["triton", "auto"])
def kernels(request):
    """Triton's kernels strictly, or those that fastlora picks: plain torch never runs."""
    strict = request.param == "triton"
    with fastlora.backend("triton", strict=True) if strict else contextlib.nullcontext():
        yield
    ran = {by for _, by in fastlora.launches()}
    assert ran and ran <= ({"triton"} if strict else {"triton", "cuda"})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_llama(dtype=torch.bfloat16, hidden_size=64, intermediate_size=128).save_pretrained(folder / "floats")  # fmt: skip
    quantize_checkpoint(folder / "floats", folder / "four")
    return folder / "four"


def train(model, ids, steps=3):
    """Losses of a few steps, and the adapters after them."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {n: p.detach().cpu() for n, p in trained.items()}


def adapted(checkpoint, device):
    model = fastlora.load_quantized(checkpoint, device).float()  # 4 bits stay as they are
    model = fastlora.get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    randomize_adapters(model)
    return model.train()


def test_load_quantized_reads_to_a_gpu_what_it_reads_to_the_cpu(checkpoint, kernels):
    there, here = (fastlora.load_quantized(checkpoint, device) for device in (CUDA, "cpu"))
    assert {t.device for t in (*there.parameters(), *there.buffers())} == {CUDA}
    state = there.state_dict()
    for name, value in here.state_dict().items():
        assert torch.equal(state[name].cpu(), value) and state[name].dtype == value.dtype, name
    assert sum(isinstance(m, QLoRALinear) for m in there.modules()) == 14
    with fastlora.backend("torch"):
        want = logits(here.float(), some_ids())
    fastlora.reset_launches()
    got = logits(there.float(), some_ids().to(CUDA)).cpu()
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    reading = ("dequantize", "nf4_gemm")
    assert sum(n for (op, _), n in fastlora.launches().items() if op in reading) == 14


def test_it_trains_on_a_gpu_as_on_the_cpu(checkpoint, kernels):
    ids = some_ids(rows=4, length=32)
    with fastlora.backend("torch"):
        want, want_adapters = train(adapted(checkpoint, "cpu"), ids)
    fastlora.reset_launches()
    losses, adapters = train(adapted(checkpoint, CUDA), ids.to(CUDA))
    assert losses == pytest.approx(want, rel=1e-4)
    for name, value in want_adapters.items():
        torch.testing.assert_close(adapters[name], value, atol=1e-4, rtol=1e-3, msg=name)


def test_it_generates_in_bf16(checkpoint, kernels):
    """Few rows at a time, the update beside the codes."""
    model = fastlora.load_quantized(checkpoint, CUDA)
    model = fastlora.get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    randomize_adapters(model, scale=0.02)
    ids = some_ids(rows=1).to(CUDA)
    out = model.eval().generate(ids, max_new_tokens=8, do_sample=False)
    assert out.shape[1] > ids.shape[1] and torch.equal(out[:, : ids.shape[1]], ids)


@pytest.mark.filterwarnings("ignore:merging rounds away")
def test_merging_on_a_gpu_is_reported_and_taken_back(checkpoint, kernels):
    model = fastlora.load_quantized(checkpoint, CUDA)
    model = fastlora.get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    randomize_adapters(model, scale=0.007)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    reports = model.merge_adapter()
    base = model.get_base_model()
    for name, error, _ in reports:
        layer = base.get_submodule(name)
        assert isinstance(layer.weight, NF4Tensor) and layer.weight.device == CUDA
        update = layer.lora_B["default"] @ layer.lora_A["default"] * layer.scaling["default"]
        exact = layer._shelf[0].weight.dequantize(torch.float32).double() + update.double()
        away = layer.weight.dequantize(torch.float32) - exact
        assert error == pytest.approx((away.norm() / exact.norm()).item(), rel=1e-3)
    model.unmerge_adapter()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_model_moved_off_the_gpu_leaves_no_memory_there():
    """accelerate() keeps views of bitsandbytes' weights; they must not keep what has moved."""
    pytest.importorskip("bitsandbytes")
    from tests.models.test_quantized import stock

    def used():
        model = fastlora.accelerate(stock("cuda", torch.bfloat16))
        with torch.no_grad():
            model(some_ids().to(CUDA))
        assert all(layer.accelerated for layer in fastlora.acceleration_report(model))
        return model

    used()  # libraries' workspaces stay
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = used()
    held = torch.cuda.memory_allocated() - before
    model.cpu()
    gc.collect()
    assert held > 50_000 and torch.cuda.memory_allocated() - before < 0.1 * held


def bytes_held(model, multiple=1):
    """Of all parameters, each rounded up to a ``multiple``, as an allocator does; buffers are a few hundred."""
    return sum(-(-p.nbytes // multiple) * multiple for p in model.parameters())


def quantized_bytes(n, k):
    """Of an NF4 weight in blocks of 64 with quantised scales: codes, scales, theirs, their code and offset."""
    blocks = -(-n * k // 64)
    return -(-n * k // 2) + blocks + 4 * (-(-blocks // 256)) + 4 * 256 + 4


def in_four_bits(base, adapters=0):
    """What ``base`` takes with every linear but the output layer in 4 bits, and the largest of these in its dtype."""
    linears = [m for n, m in base.named_modules() if type(m) is torch.nn.Linear and n != "lm_head"]
    four = sum(quantized_bytes(m.out_features, m.in_features) for m in linears)
    floats = bytes_held(base) - sum(m.weight.nbytes for m in linears)
    return four + floats + 4 * adapters, max(m.weight.nbytes for m in linears)


def check_peak(model, base, peak, adapters=0):
    """``peak``: the most bytes that were allocated on the way to ``model``. torch allocates by 512."""
    expected, largest = in_four_bits(base, adapters)
    assert bytes_held(model) == expected
    assert peak <= bytes_held(model, 512) + 4 * largest
    assert bytes_held(model, 512) + 4 * largest < 0.5 * bytes_held(base)


@contextlib.contextmanager
def no_more_than(extra):
    """Torch's allocator gets ``extra`` bytes more than it holds; yields what tells the peak above what there was."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    room = torch.cuda.memory_reserved() + extra
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(
        room / torch.cuda.get_device_properties(0).total_memory
    )
    try:
        yield lambda: torch.cuda.max_memory_allocated() - before
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.fixture(scope="module")
def large():
    """400 MiB in bf16, on the CPU; a linear has 8 at most."""
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 13}
    return tiny_llama(dtype=torch.bfloat16, vocab_size=1024, **shape)


def test_the_full_model_never_fits(large, tmp_path):
    """On a card for six tenths of the model: neither quantised from the CPU, nor quantised to a file and read from there."""
    size, ids = bytes_held(large), some_ids().to(CUDA)
    large.save_pretrained(tmp_path / "floats")
    with no_more_than(int(0.6 * size)) as peak:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(size, dtype=torch.uint8, device=CUDA)
        quantize_checkpoint(tmp_path / "floats", tmp_path / "four", device=CUDA)
        assert 0 < peak() <= 4 * in_four_bits(large)[1]
    with no_more_than(int(0.6 * size)) as peak:
        read = fastlora.load_quantized(tmp_path / "four", CUDA)
        check_peak(read, large, peak())
        assert torch.isfinite(logits(read, ids)).all()
        del read
    base = copy.deepcopy(large)
    config = LoraConfig(r=4, target_modules="all-linear", quantize="nf4")
    with no_more_than(int(0.6 * size)) as peak:
        model = fastlora.get_peft_model(base, config, device="cuda")
        check_peak(model, large, peak(), model.get_nb_trainable_parameters()[0])
        assert {p.device for p in model.parameters()} == {CUDA}
        assert torch.isfinite(logits(model, ids)).all()


def test_a_gpu_without_room_leaves_everything_on_the_cpu():
    """The embeddings are moved, then the output layer does not fit."""
    base = tiny_llama(vocab_size=1 << 16, hidden_size=512, intermediate_size=512)
    tensors = [*base.parameters(), *base.buffers()]
    places = [(t.data_ptr(), t.device) for t in tensors]
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + (200 << 20)  # each of the two takes 128 MiB
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        config = LoraConfig(r=4, target_modules=["q_proj"])
        with pytest.raises(torch.OutOfMemoryError):
            fastlora.get_peft_model(base, config, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [(t.data_ptr(), t.device) for t in tensors] == places
    assert torch.isfinite(logits(base, some_ids())).all()
