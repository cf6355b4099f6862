"""Six layers of Llama-3-8B's shape: ``python -m benchmarks.bench_step [--rounds N] [--out DIR] [--device D]``.

Forward and backward of 2 x 4096 tokens without checkpointing, and adapters of rank 16, in the base's bf16, on all seven linears of a layer. Ratios
are to the frozen bf16 layers of the same run, forward and backward to their input: 1.00 would be adapters for nothing. The
layers and the last norm alone: no embedding, no output layer, no optimizer; backward starts from a fixed dY. All contenders
share one set of weights, and are held in fp32 to the same layers with the update added to the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fastlora
from benchmarks import bench
from benchmarks.bench import Bench, Row
from fastlora.testing.timing import Contender, describe

RANK = 16
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 6,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
TINY = LLAMA_3_8B | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SETTINGS: dict[str, Any] = {"r": RANK, "lora_alpha": RANK, "target_modules": LINEARS}


class StepBench(Bench):
    """One case: every contender makes the last hidden state, and the gradients of the input and of its adapters."""

    name, title = "step", "Training step of Llama layers"

    def run(self) -> None:
        from transformers import AutoModel, LlamaConfig

        shape, (batch, tokens) = (LLAMA_3_8B, (2, 4096)) if self.on_gpu else (TINY, (2, 32))
        config = LlamaConfig(**shape, vocab_size=8, use_cache=False)
        torch.manual_seed(self.rule.seed)
        with self.device:
            base = AutoModel.from_config(config, dtype=self.dtype).requires_grad_(False)
        hidden = config.hidden_size
        x = (self.random(batch, tokens, hidden) * hidden**0.5).requires_grad_()
        dy = self.random(batch, tokens, hidden)
        weights = [m.weight for m in linears(base)]
        factors = [t for w in weights for t in (self.random(RANK, w.shape[1]), self.random(w.shape[0], RANK))]  # fmt: skip

        contenders, truth, missing = {}, {}, {}
        quantized = build_fastlora(base, "nf4")
        in_nf4 = [layer.weight.dequantize() for layer in linears(quantized)]
        builds: dict[str, tuple[Callable[[], nn.Module], list[Tensor]]] = {
            "frozen bf16": (lambda: base, weights),
            "fastlora LoRA": (lambda: build_fastlora(base, None), weights),
            "fastlora QLoRA": (lambda: quantized, in_nf4),
            "peft LoRA": (lambda: build_peft(shared(base)), weights),
            "peft + bitsandbytes QLoRA": (lambda: build_peft_qlora(base, quantized), in_nf4),
        }
        for name, (build, its_weights) in builds.items():
            try:
                model = build()
            except ImportError as error:
                missing[name] = describe(error)
                continue
            adapters = [p for p in model.parameters() if p.requires_grad]
            with torch.no_grad():
                for parameter, value in zip(adapters, factors if adapters else [], strict=True):
                    parameter.copy_(value)
            contenders[name] = Contender(step(model.train(), [x, *adapters], dy))
            truth[name] = exact(base, its_weights, factors if adapters else [], x, dy)
        case = f"{config.num_hidden_layers} layers, {batch} x {tokens} tokens"
        # bf16 leaves several per cent in the gradients that pass through the softmax of thousands of tokens; the update
        # is as large as what the weights make, so that a wrong one shows.
        self.time(case, contenders, truth, tolerance=2**-3)
        self.rows += [Row(case, name, [], error=error) for name, error in missing.items()]

    def tables(self):  # type: ignore[no-untyped-def]
        return [("Forward + backward: time over the frozen bf16 layers", lambda row: row.ratio)]


def linears(model: nn.Module) -> Iterator[Any]:
    """The linears of the layers, in the order of ``parameters()``."""
    return (m for name, m in model.named_modules() if name.rpartition(".")[2] in LINEARS)


def shared(model: nn.Module) -> nn.Module:
    """A model of its own over the same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def step(model: nn.Module, leaves: list[Tensor], dy: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """y and the gradients of ``leaves``, of which the first is the input."""

    def run() -> tuple[Tensor, ...]:
        y = model(inputs_embeds=leaves[0]).last_hidden_state
        return (y.detach(), *torch.autograd.grad(y, leaves, dy))

    return run


def build_fastlora(base: nn.Module, quantize: str | None) -> nn.Module:
    config = fastlora.LoraConfig(**SETTINGS, quantize=quantize)
    return fastlora.get_peft_model(shared(base), config, autocast_adapter_dtype=False)


def build_peft(model: nn.Module) -> nn.Module:
    import peft

    config = peft.LoraConfig(**SETTINGS)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def build_peft_qlora(base: nn.Module, quantized: nn.Module) -> nn.Module:
    """Stock PEFT over bitsandbytes' linears, as transformers makes them, of the memory that ``quantized`` holds."""
    import bitsandbytes

    model: Any = shared(base)
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in LINEARS]
    for name, layer in zip(names, linears(quantized), strict=True):
        n, k = layer.weight.shape
        dtype = layer.weight.dtype
        linear = bitsandbytes.nn.Linear4bit(
            k, n, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
        linear.weight = layer.weight.to_bitsandbytes()
        model.set_submodule(name, linear)
    model.is_loaded_in_4bit = True  # by which peft knows
    return build_peft(model)


def exact(
    base: nn.Module, weights: list[Tensor], factors: list[Tensor], x: Tensor, dy: Tensor
) -> tuple[Tensor, ...]:
    """What a contender must return, in fp32: y, dX, and of W + B A's gradient dW those of A and B, B^T dW and dW A^T."""
    model: Any = copy.deepcopy(base).float().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})  # fp32 attention is memory's peak
    pairs = [(a.float(), b.float()) for a, b in zip(factors[::2], factors[1::2], strict=True)]
    leaves = [x.detach().float().requires_grad_()]
    with torch.no_grad():
        for i, (linear, weight) in enumerate(zip(linears(model), weights, strict=True)):
            linear.weight.copy_(weight)
            if pairs:
                a, b = pairs[i]
                linear.weight.addmm_(b, a)
                leaves.append(linear.weight.requires_grad_())
    y, dx, *dw = step(model, leaves, dy.float())()
    d_factors = [t for (a, b), d in zip(pairs, dw) for t in (b.t() @ d, d @ a.t())]
    return (y, dx, *d_factors)


def main(arguments: list[str] | None = None) -> int:
    return bench.main(StepBench, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
