"""benchmarks/loss_curve.py: fastlora's QLoRA runs follow peft + bitsandbytes within the noise that bf16 has in the latter."""

import json
from collections.abc import Iterator

import pytest
import torch

from benchmarks import loss_curve
from fastlora import NF4Tensor, QLoRALinear
from fastlora.layers import LoRALayer

pytest.importorskip("bitsandbytes")
pytest.importorskip("transformers")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Products this small take longer to share than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(found, least):
    curves, within = found["curves"], found["within_noise"]
    assert within == {"accelerated": True, "fastlora": True}, found["distance_from_exact"]
    assert found["distance_from_exact"]["stock"] > 0
    for losses in curves.values():  # every run learned, so that there was something to follow
        assert sum(losses[-5:]) < least * sum(losses[:5])
    # None is another's; but the two of fastlora may be one, where they run the same kernels over the same bits.
    for name in loss_curve.OURS:
        three = {tuple(curves[n]) for n in ("exact", "stock", name)}
        assert len(three) == 3, name


def test_the_command_line_on_a_small_model(tmp_path):
    assert loss_curve.main(["--out", str(tmp_path), "--device", "cpu"]) == 0
    found = json.loads(next(tmp_path.glob("loss-curve-cpu-*.json")).read_text())
    check(found, 0.85)
    assert found["environment"]["bitsandbytes"] != "unknown" and found["settings"]["steps"] == 40
    for name in (
        loss_curve.OURS
    ):  # 14 linears, forward and backward, 40 steps; the first layer needs no dX of three
        assert found["launches"][name]["dequantize torch"] == 40 * (14 + 14 - 3)
    picture = next(tmp_path.glob("loss-curve-cpu-*.png")).read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_every_run_has_one_base_and_one_adapter(tmp_path, device):
    """The codes are bitsandbytes' everywhere; on a GPU the quantised scales are as well."""
    settings = loss_curve.SMALL
    loss_curve.save_base(tmp_path, settings)
    theirs, ours = (loss_curve.build(name, tmp_path, settings, device) for name in ("stock", "fastlora"))  # fmt: skip
    values = dict(theirs.named_parameters())
    layers = [(n, m) for n, m in ours.named_modules() if isinstance(m, QLoRALinear)]
    assert len(layers) == 14
    for name, layer in layers:
        for part, factors in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            assert torch.equal(factors["default"], values[f"{name}.{part}.default.weight"])
        bits = NF4Tensor.from_bitsandbytes(values[f"{name}.base_layer.weight"])
        assert torch.equal(layer.weight.codes, bits.codes)
        if device.type == "cuda":
            for ours_, theirs_ in zip(layer.weight.scales, bits.scales, strict=True):
                assert torch.equal(ours_, theirs_)


@pytest.mark.parametrize("wrong", ["scaling", "seed"])
def test_a_run_that_is_slightly_wrong_is_beyond_the_noise(wrong):
    def build(name, folder, settings, device):
        model = loss_curve.build(name, folder, settings, device)
        for layer in model.modules() if name == "fastlora" else ():
            if isinstance(layer, LoRALayer):
                if wrong == "scaling":
                    layer.scaling["default"] *= 1.03
                else:
                    layer.reset_adapters()
        return model

    found = loss_curve.measure(loss_curve.SMALL, CPU, build)
    assert found["within_noise"] == {"accelerated": True, "fastlora": False}


def test_the_rows_of_few_are_multiplied_by_codes():
    """What csrc/nf4/sm90.cu takes: up to 1024 rows, and K of whole fours of blocks; and the curve stays as long."""
    few, usual = loss_curve.FEW, loss_curve.Settings()
    assert few.batch * few.length <= 1024 < usual.batch * usual.length
    assert few.hidden % 256 == 0 and few.intermediate % 256 == 0 and few.steps == usual.steps


def on_a_gpu(tmp_path, *options):
    assert loss_curve.main([*options, "--out", str(tmp_path), "--device", "cuda"]) == 0
    found = json.loads(next(tmp_path.glob("loss-curve-*.json")).read_text())
    check(found, 0.85)
    for launched in found["launches"].values():
        assert {key.split()[1] for key in launched} <= {"cuda", "triton"}, launched
    return found["launches"]


@pytest.mark.gpu
def test_the_curve_on_a_gpu(tmp_path):
    """The run that results/ shows, on fastlora's kernels: 28 linears, of which the first three need no dX."""
    for launched in on_a_gpu(tmp_path).values():
        reading = ("dequantize", "nf4_few", "nf4_gemm", "nf4_dx")
        ran = sum(n for key, n in launched.items() if key.split()[0] in reading)
        assert ran >= 200 * (28 + 28 - 3)


@pytest.mark.gpu
def test_the_curve_over_codes_on_a_gpu(tmp_path):
    """Forward and backward read the codes as they lie, in every linear of every step."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("512 rows are multiplied by codes on Hopper alone")
    for launched in on_a_gpu(tmp_path, "--few").values():
        codes = launched.get("nf4_gemm cuda", 0) + launched.get("nf4_few cuda", 0)
        assert codes == 200 * 28 and launched["nf4_dx cuda"] == 200 * (28 - 3), launched
        assert "dequantize cuda" not in launched
