"""``estimate(config)``: will a run fit, how big is what it saves, how long does it take. Reads config.json, no weights."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from . import base
from .blocks import prepare_data
from .config import FinetuneConfig
from .display import Display
from .engine import Engine, engine_of
from .errors import InputError
from .footprint import Footprint, GpuKernels, backward
from .loop import adamw, planned_steps, summed_loss
from .packing import Batch
from .run import prepare_model

GIB = 2**30
CONTEXT_GIB = 0.75  # what the CUDA context takes of a card: benchmarks/results/memory-*.json
# cuBLAS keeps 32 MiB on Hopper for every thread that calls it: forward's and backward's. Others keep less.
CUBLAS_BYTES = 2 * 32 * 2**20
# Holes between what tensors hold and what the allocator has taken: 1 to 8 % in benchmarks/results/memory-*.json.
HOLES = 0.04

# Dense bf16 or fp16 FLOP/s with fp32 sums, by NVIDIA's data sheets.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A40": 150e12,
    "A10": 125e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "RTX A6000": 155e12,
}
# What fastlora's LoRA reaches of that in a training step of Llama layers over 8192 tokens, and of the product of two large
# matrices timed beside it: benchmarks/results/step-nvidia-h200.json. Steps of few tokens, which wait for launches, reach less.
OF_PEAK, OF_GEMM = 0.46, 0.57


@dataclass(frozen=True)
class Estimate:
    """Bytes, parameters and seconds of a run. Peaks are of torch's allocator on a GPU; ``reserved`` is what it takes of the
    card, beside the CUDA context. What is not known is None: times without a rate, steps without data, ``fits`` without a card."""

    method: str
    rank: int | None
    dtype: str
    batch_size: int
    seq_length: int
    trained_parameters: int
    total_parameters: int
    saved_bytes: int
    weights_bytes: int
    optimizer_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    card_bytes: int | None
    fits: bool | None
    flops_per_token: float
    flops_per_second: float | None
    rate_from: str | None
    tokens_per_second: float | None
    step_seconds: float | None
    steps: int | None
    seconds: float | None


def estimate(
    config: FinetuneConfig,
    card: float | None = None,
    gpu: str | None = None,
    tokens_per_second: float | None = None,
) -> Estimate:
    """What the run that ``config`` describes takes; see ``Estimate``.

    Memory is that of a GPU. It is found by one step on the meta device, so kernels' own small workspaces are not in it.
    Where documents are packed they are taken to share rows, which attention masks.

    Args:
        config: as for ``finetune``; ``data`` may be "" where the number of steps is not asked. dtype "auto" is bf16 for a
            GPU (``card`` or ``gpu`` is given, or one is here), fp32 for this machine's CPU.
        card: GiB of the card that must do, of which 0.75 go to the CUDA context.
        gpu: a name in ``PEAK_FLOPS``, for the time. None: this machine's speed, measured by a short product, unless ``card``
            speaks of another one.
        tokens_per_second: the speed, where it is known better.

    Raises:
        InputError: an option cannot be, or the model cannot be trained so.
    """
    config.validate()
    for name, value in (("card", card), ("tokens-per-second", tokens_per_second)):
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"--{name} {value:g} must be a positive number")
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for_gpu = card is not None or gpu is not None or here.type == "cuda"
    if config.dtype != "auto":
        dtype = base.DTYPES[config.dtype]
    else:
        dtype = torch.bfloat16 if for_gpu else torch.float32
    if config.init == "eva":
        raise InputError(
            "--init eva gives layers ranks by the data, which is not run here: leave it out, for the sum of ranks stays"
        )
    peak_rate = None if gpu is None else _named_rate(gpu, dtype)

    engine = engine_of(config)
    blocks = _blocks(config)
    lm = enter_on_meta(config, engine, dtype)
    with base.quiet_transformers(), torch.random.fork_rng(devices=[]):
        weights, optimizer, step = _run_step(lm, config, engine.cast_to(dtype))
    peak = step.peak + CUBLAS_BYTES
    reserved = round(peak * (1 + HOLES))

    tokens = config.batch_size * config.grad_accumulation * config.seq_length
    rate, source = None, None
    if tokens_per_second is not None:
        rate, source = tokens_per_second * step.flops / tokens, "--tokens-per-second"
    elif peak_rate is not None:
        rate, source = OF_PEAK * peak_rate, f"{OF_PEAK:.0%} of {peak_rate / 1e12:.0f} TFLOP/s"
    elif here.type == "cuda" or not for_gpu:
        product = _measured_rate(here, dtype)
        rate = OF_GEMM * product
        source = f"{OF_GEMM:.0%} of {product / 1e12:.3g} TFLOP/s, measured on {here.type}"
    seconds = None if rate is None else step.flops / rate
    steps = None if blocks is None else planned_steps(config, blocks)
    count, total = engine.count(lm.model)
    return Estimate(
        method=config.method,
        rank=engine.rank(lm.model),
        dtype=str(dtype).removeprefix("torch."),
        batch_size=config.batch_size,
        seq_length=config.seq_length,
        trained_parameters=count,
        total_parameters=total,
        saved_bytes=engine.saved_bytes(lm.model, dtype),
        weights_bytes=weights,
        optimizer_bytes=optimizer,
        peak_allocated_bytes=peak,
        peak_reserved_bytes=reserved,
        card_bytes=None if card is None else round(card * GIB),
        fits=None if card is None else reserved <= (card - CONTEXT_GIB) * GIB,
        flops_per_token=step.flops / tokens,
        flops_per_second=rate,
        rate_from=source,
        tokens_per_second=None if seconds is None else tokens / seconds,
        step_seconds=seconds,
        steps=steps,
        seconds=None if seconds is None or steps is None else steps * seconds,
    )


def enter_on_meta(config: FinetuneConfig, engine: Engine, dtype: torch.dtype) -> base.CausalLM:
    """The model to train, without memory. ``InputError`` for a model that cannot be trained so."""
    from transformers import AutoConfig, AutoModelForCausalLM

    directory, gguf = base.locate(config.model)
    if gguf is not None:
        raise InputError(
            f"--model {config.model} is a .gguf file; give a directory with config.json"
        )
    how = base.quantization(config.model)
    if how is not None:
        raise InputError(
            f"--model {config.model} is quantised ({how}); give the original model's directory, with --method qlora for 4 bits"
        )
    try:
        with base.quiet_transformers(), torch.device("meta"):
            settings = AutoConfig.from_pretrained(directory, local_files_only=True)
            model = AutoModelForCausalLM.from_config(settings, dtype=engine.stored_as(dtype))
    except Exception as error:  # transformers raises many kinds for an unusable directory
        raise InputError(
            f"--model {config.model} is no causal language model: {type(error).__name__}: {error}"
        ) from error
    prepare_model(model.requires_grad_(False), config, None)
    with base.quiet_transformers(), torch.random.fork_rng(devices=[]):
        trained = engine.enter(model, torch.device("meta"), lambda text: None)
    return base.CausalLM(trained.train(), model)


def _blocks(config: FinetuneConfig) -> int | None:
    """Blocks to train on, if there is data."""
    from rich.console import Console

    if not config.data:
        return None
    silent = Display(Console(quiet=True), torch.device("cpu"))
    return len(prepare_data(config, base.load_tokenizer(config.model), silent).training)


def _run_step(
    lm: base.CausalLM, config: FinetuneConfig, cast_to: torch.dtype | None
) -> tuple[int, int, Footprint]:
    """Bytes of the weights and of the optimizer's state, and the footprint of one step."""
    step = Footprint(one_document=not config.packs)
    step.hold([*lm.model.parameters(), *lm.model.buffers()])
    weights = step.now
    trained = [p for p in lm.model.parameters() if p.requires_grad]
    optimizer = adamw(lm.model, config, foreach=True)  # as it runs on a GPU
    shape = config.batch_size, config.seq_length
    kernels = GpuKernels(step, cast_to)
    with step, kernels:
        # The optimizer's step first: it makes the states that are there from the second step on.
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state = step.now - weights
        batch = Batch(*(torch.empty(shape, dtype=torch.int64, device="meta") for _ in range(3)))
        for _ in range(config.grad_accumulation):
            with kernels.forward():
                loss = summed_loss(lm, batch, torch.device("meta"))
            backward(loss)
            del loss
    return weights, state, step


def _named_rate(gpu: str, dtype: torch.dtype) -> float:
    wanted = gpu.casefold().replace("nvidia", "").replace("geforce", "").strip()
    for name, flops in PEAK_FLOPS.items():
        if name.casefold() == wanted:
            if dtype == torch.float32:
                raise InputError(
                    "--gpu knows the speed in bf16 and fp16; with --dtype float32 give --tokens-per-second"
                )
            return flops
    raise InputError(
        f"--gpu {gpu!r} is not one of {', '.join(PEAK_FLOPS)}; for others give --tokens-per-second"
    )


def _measured_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two square matrices, the best of a short while."""
    if device.type == "cpu":
        base.share_cpu()
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < 0.5:
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
