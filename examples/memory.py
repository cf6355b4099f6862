"""What fine-tuning takes: ten steps of Llama-sized models under the cap of a small card.

    python examples/memory.py                              # all cases, on a GPU with 48 GiB or more
    python examples/memory.py --case qlora-7b --out DIR    # one case; DIR gets a .json and a .md
    python examples/memory.py --tiny                       # two-layer models on the CPU, without caps

Models have random weights, for memory does not depend on their values. A linear is drawn on the GPU, and quantised before
the next one exists: the host never holds the model, and under QLoRA nothing ever holds it in 16 bits. Adapters (rank 16,
fp32) are on every linear of the layers; batch 1, 512 tokens, gradient checkpointing. Torch's allocator may take what the
card has less 0.6 GiB for the CUDA context; a case fails where that does not do, or its loss does not fall. Each case
runs in a process of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import init_empty_weights
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import fastlora
from fastlora.testing.environment import environment, file_stem
from fastlora.testing.timing import describe

GIB = 2**30
CONTEXT_GIB = 0.6
RANK, STEPS, LEARNING_RATE = 16, 10, 2e-4


@dataclass(frozen=True)
class Shape:
    """Of a Llama model, and of the sequence it is trained on."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tokens: int = 512

    def linears(self) -> list[tuple[int, int]]:
        """(N, K) of every linear of the layers."""
        h, i = self.hidden, self.intermediate
        kv = h // self.heads * self.kv_heads
        return [(h, h), (kv, h), (kv, h), (h, h), (i, h), (i, h), (h, i)] * self.layers


@dataclass(frozen=True)
class Case:
    """A model and the card that must do for it."""

    name: str
    shape: Shape
    quantize: bool
    card_gib: float

    @property
    def cap_bytes(self) -> int:
        return int((self.card_gib - CONTEXT_GIB) * GIB)


LLAMA_7B = Shape(4096, 11008, 32, 32, 32, 32000)
CASES = [
    Case("qlora-7b", LLAMA_7B, True, 6),
    Case("qlora-13b", Shape(5120, 13824, 40, 40, 40, 32000), True, 12),
    Case("lora-7b", LLAMA_7B, False, 16),
    Case("qlora-70b", Shape(8192, 28672, 80, 64, 8, 128256), True, 48),
]
TINY = Shape(64, 128, 2, 4, 2, 96, tokens=32)


@dataclass
class Result:
    """Of a case: bytes, and the loss of every step. ``error`` says why there is nothing."""

    case: str
    card_gib: float
    cap_bytes: int
    arithmetic: dict[str, int]
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    peak_reserved: int | None = None
    peak_allocated: int | None = None
    beside_allocator: int | None = None  # the CUDA context, and other processes where there are any
    host_peak: int = 0
    error: str | None = None


def arithmetic(shape: Shape, quantize: bool) -> dict[str, int]:
    """Bytes of every part, from the shapes alone. Not all of them live at once: the peak is to stay below the sum."""
    s, linears = shape, shape.linears()
    elements = [n * k for n, k in linears]
    factors = sum(RANK * (n + k) for n, k in linears)
    return {
        "linears": sum(map(_nf4_bytes, elements)) if quantize else 2 * sum(elements),
        "embedding, head, norms": 2 * s.hidden * (2 * s.vocabulary + 2 * s.layers + 1),
        "adapters, gradients, AdamW": 4 * 4 * factors,
        "checkpoints": 2 * s.tokens * s.hidden * s.layers,
        # a layer's own, made again in backward: about 7 tensors as wide as its MLP and 15 as wide as the model
        "activations of a layer": 2 * s.tokens * (7 * s.intermediate + 15 * s.hidden),
        "a linear's weight in floats": 2 * max(elements) if quantize else 0,
        "logits": 3 * 4 * s.tokens * s.vocabulary,  # log-probabilities and two gradients, fp32
    }


def _nf4_bytes(elements: int) -> int:
    """4 bits an element, 8 for each 64 of them, fp32 for each 256 of those; the scales' map and offset."""
    blocks = -(-elements // 64)
    return -(-elements // 2) + blocks + 4 * (-(-blocks // 256) + 256 + 1)


def build(shape: Shape, quantize: bool, device: torch.device) -> nn.Module:
    """The model with adapters, drawn module by module on ``device``."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        use_cache=False,
    )
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name in [name for name, module in model.named_modules() if module._parameters]:
        drawn = _draw(model.get_submodule(name), device)
        if quantize and isinstance(drawn, nn.Linear) and name != "lm_head":
            drawn = fastlora.QLoRALinear.from_linear(drawn, r=None)
        model.set_submodule(name, drawn)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    lora = fastlora.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    return fastlora.get_peft_model(model.to(device), lora).train()  # .to: the buffers are left


def _draw(module: nn.Module, device: torch.device) -> nn.Module:
    """A linear, an embedding or a norm, with memory and values."""
    module.to_empty(device=device, recurse=False).requires_grad_(False)
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    else:
        nn.init.ones_(module.weight)
    return module


def train(model: nn.Module, shape: Shape, device: torch.device) -> list[float]:
    """The loss of every step, on one batch of random tokens."""
    ids = torch.randint(shape.vocabulary, (1, shape.tokens), device=device)
    trained = [p for p in model.parameters() if p.requires_grad]
    # fused: its plain form makes copies of the adapters
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def run(case: Case, device: torch.device) -> Result:
    """A case in this process, which must not have used the GPU before."""
    parts = arithmetic(case.shape, case.quantize)
    result = Result(case.name, case.card_gib, case.cap_bytes, parts)
    on_gpu, started = device.type == "cuda", time.monotonic()
    torch.manual_seed(0)
    try:
        if on_gpu:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, case.cap_bytes / total), device)
        result.losses = train(build(case.shape, case.quantize, device), case.shape, device)
        if not result.losses[-1] < result.losses[0]:  # nor does NaN fall
            result.error = "the loss did not fall"
    except Exception as error:  # out of memory above all
        result.error = describe(error)
    if on_gpu:
        result.peak_reserved = torch.cuda.max_memory_reserved(device)
        result.peak_allocated = torch.cuda.max_memory_allocated(device)
        free, total = torch.cuda.mem_get_info(device)
        result.beside_allocator = total - free - torch.cuda.memory_reserved(device)
        if result.peak_reserved > case.cap_bytes:
            result.error = result.error or "the allocator took more than the cap"
    result.host_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result.seconds = time.monotonic() - started
    return result


def run_apart(case: Case, device: torch.device) -> Result:
    """A case in a process of its own, so that caps and peaks are its own."""
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            return pool.submit(run, case, device).result()
    except Exception as error:  # the process was killed, say
        parts = arithmetic(case.shape, case.quantize)
        return Result(case.name, case.card_gib, case.cap_bytes, parts, error=describe(error))


def cells(result: Result) -> dict[str, str]:
    """A line of the table: heading -> text."""

    def gib(size: int | None) -> str:
        return "-" if size is None else f"{size / GIB:.2f}"

    losses = result.losses
    return {
        "case": result.case,
        "card": f"{result.card_gib:g}",
        "cap": gib(result.cap_bytes),
        "arithmetic": gib(sum(result.arithmetic.values())),
        "reserved": gib(result.peak_reserved),
        "allocated": gib(result.peak_allocated),
        "context": gib(result.beside_allocator),
        "host": gib(result.host_peak),
        "loss": f"{losses[0]:.3f} -> {losses[-1]:.3f}" if losses else "-",
        "seconds": f"{result.seconds:.0f}",
        "result": result.error or ("no cap here" if result.peak_reserved is None else "fits"),
    }


def write(
    results: list[Result], device: torch.device, folder: Path, benchmark: str = "memory"
) -> list[Path]:
    """``<benchmark>-<device>.json`` and ``.md``, in place of earlier ones."""
    where = environment(device)
    content = {"schema": 1, "benchmark": "memory", "environment": where}
    content["rows"] = [asdict(result) for result in results]
    rows = [cells(result) for result in results]
    lines = [
        f"# Memory of fine-tuning on {where['device']}",
        "",
        f"{where['date']}, commit `{where['commit']}`, torch {where['torch']}, triton {where['triton']}. "
        f"GiB; {STEPS} steps, batch 1, rank {RANK}, gradient checkpointing. Cap: the card less {CONTEXT_GIB} for the CUDA context, a hard limit on "
        "torch's allocator. Arithmetic: the sum of the parts below. Reserved, allocated: that allocator's peaks. Context: what "
        "the GPU held beside it, of other processes too. Host: peak resident memory. Written by `python examples/memory.py`.",
        "",
        *_markdown(rows),
        "",
        *_markdown(
            [
                {"case": result.case, **{k: f"{v / GIB:.3f}" for k, v in result.arithmetic.items()}}
                for result in results
            ]
        ),
        "",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    stem = file_stem(benchmark, where)
    paths = [folder / f"{stem}.json", folder / f"{stem}.md"]
    paths[0].write_text(json.dumps(content, indent=1) + "\n")
    paths[1].write_text("\n".join(lines))
    return paths


def _markdown(rows: list[dict[str, str]]) -> list[str]:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def main(arguments: list[str] | None = None) -> int:
    """Run the cases asked for; 0 where each of them fits and learns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [case.name for case in CASES]
    parser.add_argument("--case", choices=[*names, "all"], default="all")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the result files go")
    parser.add_argument("--tiny", action="store_true", help="two layers on the CPU, no cap")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here; --tiny runs on the CPU")
    device = torch.device("cpu") if options.tiny else torch.device("cuda", 0)
    # Segments that grow: layers of many sizes leave no holes behind. Read when a process first uses the GPU.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    results = []
    for case in CASES:
        if options.case in (case.name, "all"):
            shape = TINY if options.tiny else case.shape
            results.append(run_apart(dataclasses.replace(case, shape=shape), device))
            print(f"{case.name}: {cells(results[-1])['result']}", flush=True)
            if options.out:  # also what comes before a case that takes too long
                benchmark = "memory" if options.case == "all" else f"memory-{options.case}"
                paths = write(results, device, options.out, benchmark)
    table = Table(*cells(results[0]), title="GiB", box=box.SIMPLE)
    for result in results:
        table.add_row(*cells(result).values())
    Console(width=120).print(table)
    if options.out:
        print(*paths, sep="\n")
    return 1 if any(result.error for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
