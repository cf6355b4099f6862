"""A linear over a 4-bit base with LoRA: ``python -m benchmarks.bench_qlora [--rounds N] [--out DIR] [--device D]``.

Ratios are to the frozen bf16 GEMMs of the same run, x W^T and, with backward, dY W: 1.00 would be a QLoRA layer at the price
of a frozen 16-bit one. Scales are quantised, rank 16, adapters in bf16. "peft + bitsandbytes" is PEFT's own layer over
bitsandbytes' Linear4bit, of the same codes. Contenders are held to the same formula over the dequantised weight in fp64 before
they are timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastlora
from benchmarks import bench
from benchmarks.bench import Bench, Row
from fastlora import NF4Tensor, reference
from fastlora.testing.timing import Contender, describe

FEW = [(4096, 14336), (14336, 4096), (4096, 4096), (8192, 28672)]  # K, N
FEW_ROWS = (1, 16, 64, 128, 256, 512)
TRAIN = [(2048, 4096, 14336), (8192, 4096, 4096), (8192, 4096, 14336)]  # M, K, N
RANK, SCALING = 16, 2
PEFT = "peft + bitsandbytes"


class QloraBench(Bench):
    """Forward of few rows, and forward + backward of many."""

    name, title = "qlora", "Linears over a 4-bit base"

    def run(self) -> None:
        few, rows = (FEW, FEW_ROWS) if self.on_gpu else ([(64, 96)], (1, 16))
        for k, n in few:
            for m in rows:
                self.linear(m, k, n, False)
        for m, k, n in TRAIN if self.on_gpu else [(32, 64, 96)]:
            self.linear(m, k, n, True)

    def linear(self, m: int, k: int, n: int, train: bool) -> None:
        """y, or y and the gradients of x, A and B."""
        w = self.random(n, k)
        weight = NF4Tensor.quantize(w)
        x, a, b, dy = (
            self.random(m, k),
            self.random(RANK, k),
            self.random(n, RANK),
            self.random(m, n),
        )
        leaves = [t.requires_grad_(train) for t in (x, a, b)]

        def call(run: Callable[..., Tensor], leaves: list[Tensor] = leaves) -> Callable[[], tuple[Tensor, ...]]:  # fmt: skip
            def forward() -> tuple[Tensor, ...]:
                with torch.no_grad():
                    return (run(*leaves),)

            def both() -> tuple[Tensor, ...]:
                y = run(*leaves)
                return (y, *torch.autograd.grad(y, leaves, dy))

            return both if train else forward

        def frozen() -> tuple[Tensor, ...]:
            y = x.detach() @ w.t()
            return (y, dy @ w) if train else (y,)

        case = f"{'f+b' if train else 'fwd'} {m}x{k}x{n}"
        ours = call(lambda x, a, b: fastlora.qlora_linear(x, weight, a, b, SCALING))
        contenders = {"frozen bf16": Contender(frozen), "fastlora": Contender(ours)}
        if self.on_gpu:
            within = functools.partial(fastlora.backend, "triton", strict=True)
            contenders["fastlora-triton"] = Contender(ours, within)
        missing = []
        try:
            layer, factors = peft_layer(weight, a, b)
            contenders[PEFT] = Contender(call(lambda x, *_: layer(x), [x, *factors]))
        except ImportError as error:
            missing = [Row(case, PEFT, [], error=describe(error))]
        exact = [t.detach().double().requires_grad_(train) for t in leaves]
        y = reference.lora_linear(
            exact[0], weight.dequantize().double(), exact[1], exact[2], SCALING
        )
        true = (y.detach(), *(torch.autograd.grad(y, exact, dy.double()) if train else ()))
        base = (
            x.detach().double() @ w.double().t(),
            *([dy.double() @ w.double()] if train else []),
        )
        truth = {name: base if name == "frozen bf16" else true for name in contenders}
        self.time(case, contenders, truth, tolerance=2**-6)
        self.rows += missing

    def tables(self):  # type: ignore[no-untyped-def]
        return [("m x k x n: time over the frozen bf16 GEMMs", lambda row: row.ratio)]


def peft_layer(weight: NF4Tensor, a: Tensor, b: Tensor) -> tuple[nn.Module, list[Tensor]]:
    """PEFT's lora.Linear4bit over the memory of ``weight``, made as PEFT makes it, and its A and B with these values."""
    import bitsandbytes
    import peft

    n, k = weight.shape
    linear = bitsandbytes.nn.Linear4bit(
        k, n, bias=False, compute_dtype=a.dtype, quant_type="nf4", device="meta"
    )
    linear.weight = weight.to_bitsandbytes()
    model: Any = nn.Sequential(linear)
    model.is_loaded_in_4bit = True  # by which peft knows
    config = peft.LoraConfig(r=RANK, lora_alpha=SCALING * RANK, target_modules=["0"])
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    layer: Any = model.base_model.model[0].train()  # in eval bitsandbytes' CPU kernels repack it
    factors = [f["default"].weight for f in (layer.lora_A, layer.lora_B)]
    with torch.no_grad():
        for factor, value in zip(factors, (a, b), strict=True):
            factor.data = value.detach().clone()
    return layer, factors


def main(arguments: list[str] | None = None) -> int:
    return bench.main(QloraBench, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
