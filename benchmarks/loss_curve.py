"""A small QLoRA run beside stock peft + bitsandbytes: ``python -m benchmarks.loss_curve [--few] [--steps N] [--out DIR]
[--device D]``.

One random Llama, one NF4 base, the same adapters, the same batches of a real text (LICENSE, byte by byte), four runs:

    exact        peft + bitsandbytes, everything but the 4-bit weights in fp32
    stock        peft + bitsandbytes in bf16
    accelerated  the same after fastlora.accelerate()
    fastlora     fastlora.get_peft_model(quantize="nf4") in bf16

Noise is measured, not guessed: it is what bf16 does to the stock run, its mean distance from the exact curve. The rule is
the project's: fastlora's runs are at most twice as far from the exact one. Writes ``loss-curve-<device>.json`` and ``.png``.

A step has 2048 rows, for which fastlora makes the weight floats. With ``--few`` it has 512, which it multiplies by the codes as
they lie (on Hopper), and every dimension is a multiple of four blocks, as that takes: ``loss-curve-few-<device>``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastlora
from benchmarks.options import RESULTS, device_argument
from fastlora.testing.environment import environment, file_stem

TEXT = Path(__file__).parents[1] / "LICENSE"
RUNS = ("exact", "stock", "accelerated", "fastlora")
OURS = RUNS[2:]


@dataclass(frozen=True)
class Settings:
    """The model, the adapter and the run."""

    hidden: int = 512
    intermediate: int = 1408
    layers: int = 4
    heads: int = 8
    rank: int = 16
    alpha: int = 32
    learning_rate: float = 2e-3
    steps: int = 200
    batch: int = 8
    length: int = 256
    seed: int = 0


FEW = Settings(intermediate=1536, batch=4, length=128)
SMALL = Settings(hidden=64, intermediate=128, layers=2, heads=4, steps=40, batch=4, length=64)


def batches(settings: Settings) -> Tensor:
    """Bytes [steps, batch, length] of ``TEXT``, from places that the seed draws."""
    text = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(settings.seed)
    count = settings.steps * settings.batch
    starts = torch.randint(len(text) - settings.length, (count, 1), generator=generator)
    rows = text[starts + torch.arange(settings.length)]
    return rows.view(settings.steps, settings.batch, settings.length)


def save_base(folder: Path, settings: Settings) -> None:
    """The base of every run, in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=settings.length,
        initializer_range=settings.hidden
        ** -0.5,  # a frozen output layer must be able to say something
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def stock(folder: Path, settings: Settings, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """peft over bitsandbytes, as transformers loads it."""
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=bits, dtype=dtype, device_map={"": device}
    )
    torch.manual_seed(settings.seed)
    adapters = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules="all-linear"
    )
    model: nn.Module = peft.get_peft_model(base, adapters)
    return model


def own(folder: Path, settings: Settings, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """fastlora's own layers, quantised by fastlora; one seed gives the adapters that it gives peft."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    torch.manual_seed(settings.seed)
    config = fastlora.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules="all-linear", quantize="nf4"
    )
    return fastlora.get_peft_model(base, config, device=device)


def build(name: str, folder: Path, settings: Settings, device: torch.device) -> nn.Module:
    """The model of one of ``RUNS``."""
    if name == "exact":
        return stock(folder, settings, device, torch.float32)
    if name == "fastlora":
        return own(folder, settings, device, torch.bfloat16)
    model = stock(folder, settings, device, torch.bfloat16)
    return fastlora.accelerate(model) if name == "accelerated" else model


def curve(model: nn.Module, rows: Tensor, learning_rate: float) -> list[float]:
    """The loss of every step of AdamW, one batch a step."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    losses = []
    for ids in rows:
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def measure(
    settings: Settings,
    device: torch.device,
    build: Callable[[str, Path, Settings, torch.device], nn.Module] = build,
) -> dict[str, Any]:
    """Every run: its losses, its mean distance from the exact one, and what fastlora launched."""
    rows = batches(settings).to(device)
    curves, launches = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        save_base(Path(folder), settings)
        for name in RUNS:
            model = build(name, Path(folder), settings, device)
            fastlora.reset_launches()
            curves[name] = curve(model, rows, settings.learning_rate)
            launches[name] = {f"{op} {by}": n for (op, by), n in fastlora.launches().items()}
    distance = {name: _distance(curves[name], curves["exact"]) for name in RUNS[1:]}
    within = {name: distance[name] <= 2 * distance["stock"] for name in OURS}
    return {
        "curves": curves,
        "distance_from_exact": distance,
        "within_noise": within,
        "launches": {name: launches[name] for name in OURS},
    }


def _distance(one: list[float], other: list[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def write(found: dict[str, Any], settings: Settings, device: torch.device, folder: Path, name: str) -> Path:  # fmt: skip
    """``<name>-<device>.json`` and the chart beside it."""
    where = environment(device)
    stem = file_stem(name, where)
    content = {"schema": 1, "environment": where, "settings": asdict(settings), **found}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.json"
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    rows = settings.batch * settings.length
    chart(found, f"QLoRA on {where['device']}, {rows} rows", path.with_suffix(".png"))
    return path


def chart(found: dict[str, Any], title: str, path: Path) -> None:
    """The curves, and below them how far each is from the exact one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = found["curves"]
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    losses, apart = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    labels = {
        "exact": "peft + bitsandbytes, fp32",
        "stock": "peft + bitsandbytes, bf16",
        "accelerated": "fastlora.accelerate() of it",
        "fastlora": "fastlora, quantize='nf4'",
    }
    for name, style in zip(RUNS, ("k-", "C1-", "C0--", "C2:"), strict=True):
        losses.plot(curves[name], style, linewidth=1.2, label=labels[name])
        if name != "exact":
            away = [a - b for a, b in zip(curves[name], curves["exact"], strict=True)]
            mean = found["distance_from_exact"][name]
            apart.plot(away, style, linewidth=1, label=f"mean distance {mean:.2g}")
    losses.set(ylabel="loss", title=f"{title}: one base, one seed, one text")
    apart.set(xlabel="step", ylabel="loss less fp32's")
    for axes in (losses, apart):
        axes.legend(fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _steps(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted is a number of at least 1")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 where a run of fastlora's is beyond the noise."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss_curve")
    parser.add_argument(
        "--steps", type=_steps, help="default 200, and 40 of a smaller model on a CPU"
    )
    parser.add_argument(
        "--few", action="store_true", help="on a GPU: 512 rows a step instead of 2048"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device_argument, default=default)
    options = parser.parse_args(arguments)
    large = FEW if options.few else Settings()
    settings = SMALL if options.device.type == "cpu" else large
    if options.steps:
        settings = Settings(**{**asdict(settings), "steps": options.steps})
    found = measure(settings, options.device)
    for name, losses in found["curves"].items():
        away = found["distance_from_exact"].get(name, 0.0)
        print(f"{name:12} loss {losses[0]:.4f} -> {losses[-1]:.4f}, mean distance {away:.2g}")
    name = "loss-curve-few" if options.few else "loss-curve"
    print(write(found, settings, options.device, options.out, name))
    return 0 if all(found["within_noise"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
