"""DoRA, (IA)^3 and bottleneck adapters: ``python -m benchmarks.bench_methods [--rounds N] [--out DIR] [--device D]``.

DoRA of rank 16 over a linear in bf16 and in 4 bits, and (IA)^3 on a linear's output: ratios are to the frozen GEMMs of the same
run, x W^T and, with backward, dY W, and in another table DoRA's to fastlora's plain LoRA. Beside them PEFT's own layers, over
bitsandbytes' Linear4bit of the same codes where the base is in 4 bits. Adapters are in the base's dtype.

Bottlenecks y = x + up(relu(down(x))): ratios are to the same of torch's modules. Every contender is held to its formula in fp64
before it is timed. Prompts and prefixes have no kernels of their own, and are not here.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastlora
from benchmarks import bench
from benchmarks.bench import Bench, Row
from fastlora import LoRALinear, QLoRALinear, reference
from fastlora.layers.bottleneck import Bottleneck, BottleneckSettings
from fastlora.layers.ia3 import IA3Layer
from fastlora.testing.timing import Contender, Interval, describe, median_interval

SHAPES, WIDTHS = [(8192, 4096, 4096), (2048, 4096, 4096)], (16, 64, 256)  # M, K, N
SHAPES_CPU, WIDTHS_CPU = [(32, 64, 96)], (8,)
RANK, SCALING = 16, 2
FROZEN, LORA, DORA, IA3 = "frozen", "fastlora LoRA", "fastlora DoRA", "fastlora (IA)^3"
PEFT_LORA, PEFT_DORA, PEFT_IA3 = "peft LoRA", "peft DoRA", "peft (IA)^3"
MODULES, BOTTLENECK = "torch modules", "fastlora"
_BOTTLENECK_CASE = "bottleneck of "

Run = Callable[[], tuple[Tensor, ...]]


class MethodsBench(Bench):
    """Forward, and forward + backward, of one adapted linear or one bottleneck."""

    name, title = "methods", "DoRA, (IA)^3 and bottleneck adapters"

    def run(self) -> None:
        shapes, widths = (SHAPES, WIDTHS) if self.on_gpu else (SHAPES_CPU, WIDTHS_CPU)
        for (m, k, n), train in itertools.product(shapes, (False, True)):
            for width in widths:
                self.bottleneck(m, k, width, train)
            for quantized in (False, True):
                self.dora(m, k, n, quantized, train)
            self.ia3(m, k, n, train)

    def bottleneck(self, m: int, d: int, width: int, train: bool) -> None:
        """y [m, d], or y and the gradients of x and of both projections."""
        x, dy = self.random(m, d).requires_grad_(train), self.random(m, d)
        values = self.random(width, d), self.random(width), self.random(d, width), self.random(d)
        plain = nn.Sequential(nn.Linear(d, width), nn.ReLU(), nn.Linear(width, d))
        ours = Bottleneck(d, d, width, BottleneckSettings())
        down: Any = ours.adapter_down[-1]
        theirs, mine = _filled(plain, plain.parameters(), values), _filled(
            ours, (down.weight, down.bias, ours.adapter_up.weight, ours.adapter_up.bias), values
        )  # fmt: skip
        run = call(lambda: ours(x, x), [x, *mine], dy, train)
        contenders = {
            MODULES: Contender(call(lambda: x + plain(x), [x, *theirs], dy, train)),
            BOTTLENECK: Contender(run),
        }
        if self.on_gpu:
            within = functools.partial(fastlora.backend, "triton", strict=True)
            contenders["fastlora-triton"] = Contender(run, within)

        def exact(x: Tensor, *factors: Tensor) -> Tensor:
            a, _ = reference.bottleneck_down(x, *factors[:2], "relu", False)
            return reference.bottleneck_up(a, *factors[2:], x)

        case = f"{_BOTTLENECK_CASE}{width} {_direction(train)} {m}x{d}"
        self.time(case, contenders, in_fp64(exact, [x, *values], dy, train), tolerance=2**-6)

    def dora(self, m: int, k: int, n: int, quantized: bool, train: bool) -> None:
        """y [m, n], or y and the gradients of x, A, B and, of DoRA, the magnitude."""
        x, dy = self.random(m, k).requires_grad_(train), self.random(m, n)
        base = self.base(k, n)
        kind: Any = QLoRALinear if quantized else LoRALinear
        make = functools.partial(kind.from_linear, base, r=RANK, lora_alpha=SCALING * RANK, adapter_dtype=self.dtype)  # fmt: skip
        ours = {LORA: make(), DORA: make(use_dora=True)}
        weight = ours[LORA].weight
        w = weight.dequantize(self.dtype) if quantized else weight.detach()
        a, b = self.random(RANK, k), self.random(n, RANK)
        norms, _ = reference.row_norms(w.double(), a.double(), b.double(), None, SCALING)
        magnitude = (norms * self.around_one(n)).to(self.dtype)

        case = f"DoRA {'over NF4 ' if quantized else ''}{_direction(train)} {m}x{k}x{n}"
        layers, missing = dict[str, Any](ours), []
        for name, use_dora in ((PEFT_LORA, False), (PEFT_DORA, True)):
            try:
                layers[name] = peft_layer(base, weight if quantized else None, use_dora)
            except ImportError as error:
                missing.append(Row(case, name, [], error=describe(error)))
        contenders = {FROZEN: Contender(frozen(x, w, dy, train))}
        truth = {FROZEN: frozen(x.double(), w.double(), dy.double(), train)()}
        for formula, names, values in (
            (reference.lora_linear, (LORA, PEFT_LORA), (a, b)),
            (reference.dora_linear, (DORA, PEFT_DORA), (a, b, magnitude)),
        ):
            true = in_fp64(functools.partial(_over, formula, w.double()), [x, *values], dy, train)
            for name in (name for name in names if name in layers):
                layer = layers[name]
                leaves = [x, *_filled(layer, _factors(layer, len(values)), values)]
                contenders[name] = Contender(call(functools.partial(layer, x), leaves, dy, train))
                truth[name] = true
        self.time(case, contenders, truth, tolerance=2**-6)
        self.rows += missing

    def ia3(self, m: int, k: int, n: int, train: bool) -> None:
        """y [m, n], or y and the gradients of x and of the vector."""
        x, dy = self.random(m, k).requires_grad_(train), self.random(m, n)
        base, vector = self.base(k, n), self.around_one(n).to(self.dtype)
        w, case = base.weight.detach(), f"(IA)^3 {_direction(train)} {m}x{k}x{n}"
        layers: dict[str, Any] = {IA3: IA3Layer(base, adapter_dtype=self.dtype)}
        missing = []
        try:
            layers[PEFT_IA3] = peft_ia3_layer(base)
        except ImportError as error:
            missing.append(Row(case, PEFT_IA3, [], error=describe(error)))
        true = in_fp64(lambda x, l: x @ w.double().t() * l[:, 0], [x, vector[:, None]], dy, train)
        contenders = {FROZEN: Contender(frozen(x, w, dy, train))}
        for name, layer in layers.items():
            leaves = [x, *_filled(layer, [layer.ia3_l["default"]], [vector[:, None]])]
            contenders[name] = Contender(call(functools.partial(layer, x), leaves, dy, train))
        truth = dict.fromkeys(contenders, true)
        truth[FROZEN] = frozen(x.double(), w.double(), dy.double(), train)()
        self.time(case, contenders, truth, tolerance=2**-6)
        self.rows += missing

    def around_one(self, n: int) -> Tensor:
        """fp64 [n], far enough from one that nobody can leave it out."""
        return 1 + 0.3 * torch.randn(n, generator=self.generator, device=self.device).double()

    def base(self, k: int, n: int) -> nn.Linear:
        linear = nn.Linear(k, n, bias=False, device="meta")
        linear.weight = nn.Parameter(self.random(n, k), requires_grad=False)
        return linear

    def over_lora(self, row: Row) -> Interval | None:
        """Time over that of fastlora's LoRA in the same case, round by round."""
        lora = next((r for r in self.rows if (r.case, r.contender) == (row.case, LORA)), None)
        if lora is None or not row.times_us or not lora.times_us:
            return None
        pairs = zip(row.times_us, lora.times_us, strict=True)
        return median_interval([ours / theirs for ours, theirs in pairs], self.rule)

    def tables(self):  # type: ignore[no-untyped-def]
        def bottleneck(row: Row) -> bool:
            return row.case.startswith(_BOTTLENECK_CASE)

        return [
            ("Bottlenecks, m x d: time over torch's modules", lambda r: r.ratio if bottleneck(r) else None),
            ("Linears, m x k x n: time over the frozen GEMMs", lambda r: None if bottleneck(r) else r.ratio),
            ("DoRA, m x k x n: time over fastlora's LoRA", self.over_lora),
        ]  # fmt: skip

    def notes(self) -> list[str]:
        """What a bottleneck has to move at least, at a copy's bandwidth."""
        lines = [
            "Forward reads x for the first product and again for the sum, and writes y; backward reads dY three times and x "
            "once, and writes dX. At the bandwidth of a copy:",
            "",
        ]
        times = {row.case: row.times_us for row in self.rows if row.contender == BOTTLENECK}
        for case, took in ((case, times_us) for case, times_us in times.items() if times_us):
            m, d = map(int, case.split()[-1].split("x"))
            passes = 8 if _direction(True) in case else 3
            least = passes * m * d * self.dtype.itemsize / self.ceilings.copy_bytes_per_s * 1e6
            lines.append(f"- {case}: {least:.0f} us; took {sorted(took)[len(took) // 2]:.0f} us")
        return lines


def _direction(train: bool) -> str:
    return "f+b" if train else "fwd"


def call(run: Callable[[], Tensor], leaves: list[Tensor], dy: Tensor, train: bool) -> Run:
    """y, or y and the gradients of ``leaves``."""

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (run(),)

    def both() -> tuple[Tensor, ...]:
        y = run()
        return (y, *torch.autograd.grad(y, leaves, dy))

    return both if train else forward


def in_fp64(formula: Callable[..., Tensor], leaves: list[Tensor], dy: Tensor, train: bool) -> tuple[Tensor, ...]:  # fmt: skip
    """The truth: ``formula`` of ``leaves`` in fp64, and their gradients."""
    exact = [t.detach().double().requires_grad_(train) for t in leaves]
    results = call(lambda: formula(*exact), exact, dy.double(), train)()
    return tuple(t.detach() for t in results)


def frozen(x: Tensor, w: Tensor, dy: Tensor, train: bool) -> Run:
    def run() -> tuple[Tensor, ...]:
        y = x.detach() @ w.t()
        return (y, dy @ w) if train else (y,)

    return run


def _over(formula: Callable[..., Tensor], w: Tensor, x: Tensor, *factors: Tensor) -> Tensor:
    return formula(x, w, *factors, SCALING)


def _factors(layer: Any, count: int) -> list[Tensor]:
    """A, B and the magnitude, the first ``count`` of them: fastlora keeps Parameters, PEFT modules with a weight."""
    names = ("lora_A", "lora_B", "lora_magnitude_vector")[:count]
    kept = [getattr(layer, name)["default"] for name in names]
    return [f if isinstance(f, Tensor) else f.weight for f in kept]


def _filled(layer: nn.Module, parameters: Any, values: Any) -> list[Tensor]:
    """``layer``'s parameters with these values, in their dtype and on their device; trained."""
    parameters = list(parameters)
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value.detach().clone()
    layer.train()
    return parameters


def peft_layer(base: nn.Linear, weight: Any, use_dora: bool) -> nn.Module:
    """PEFT's LoRA layer over ``base``'s weight, or over the codes of an ``NF4Tensor`` as a bitsandbytes' Linear4bit."""
    import peft

    linear: nn.Module = nn.Linear(*base.weight.shape[::-1], bias=False, device="meta")
    if weight is not None:
        import bitsandbytes

        dtype = base.weight.dtype
        linear = bitsandbytes.nn.Linear4bit(
            base.in_features, base.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
        )  # fmt: skip
    linear.weight = base.weight if weight is None else weight.to_bitsandbytes()
    model: Any = nn.Sequential(linear)
    model.is_loaded_in_4bit = weight is not None  # by which PEFT knows
    config = peft.LoraConfig(
        r=RANK, lora_alpha=SCALING * RANK, target_modules=["0"], use_dora=use_dora
    )
    layer: nn.Module = peft.get_peft_model(
        model, config, autocast_adapter_dtype=False
    ).base_model.model[0]
    return layer


def peft_ia3_layer(base: nn.Linear) -> nn.Module:
    """PEFT's (IA)^3 layer over ``base``'s weight."""
    import peft

    linear = nn.Linear(*base.weight.shape[::-1], bias=False, device="meta")
    linear.weight = base.weight
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=[])
    model: Any = peft.get_peft_model(nn.Sequential(linear), config, autocast_adapter_dtype=False)
    layer: nn.Module = model.base_model.model[0]
    return layer


def main(arguments: list[str] | None = None) -> int:
    return bench.main(MethodsBench, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
