"""Up to which width a bottleneck's kernels beat torch's products: ``python -m benchmarks.sweep_bottleneck [--widths 8,64 ...]``.

Prints, per rows and width, each part of ``ops/bottleneck.py`` on Triton over the same part by torch's own products, then whole
adapters over the five calls of a module (linear, relu, linear, add), and at the end the widths that ``WIDEST`` there should have.
Not a published figure: 15 rounds by the timing rule, no file is written.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastlora
from fastlora import reference
from fastlora.autograd.bottleneck import bottleneck
from fastlora.ops import bottleneck as ops_bottleneck
from fastlora.ops import torch_backend
from fastlora.testing.timing import Contender, DeviceClock, Rule, measure

FEATURES, KIND = 4096, "relu"
ROWS = (512, 2048, 8192)
WIDTHS = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
TORCH, TRITON = "torch", "triton"


def parts(m: int, d: int, r: int, device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, Contender]]:  # fmt: skip
    """Part -> its contenders, torch's first."""
    from fastlora import triton
    from fastlora.triton import bottleneck as kernels
    from fastlora.triton import launch

    wgrad_tiles = importlib.import_module(
        "fastlora.triton.wgrad"
    )  # the package's name is the function

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, device=device) * shape[-1] ** -0.5).to(dtype)

    x, dy, p = random(m, d), random(m, d), random(m, r)
    down, d_bias, up, u_bias = random(r, d), random(r), random(d, r), random(d)
    module = [t.clone().requires_grad_() for t in (x, down, d_bias, up, u_bias)]

    def tile(bm: int, bn: int, warps: int) -> Callable[[], object]:
        shape = kernels.UpTile(bm, bn, launch.pick(r, (16, 32, 64)), warps, 1 if r <= 64 else 3)
        return lambda: kernels.bottleneck_up(p, up, u_bias, x, shape)

    def down_tile(br: int) -> dict[str, Callable[[], object]]:
        """128 rows and more columns than the plan's tile has, K in as many runs as fill 132 SMs."""
        splits = max(1, 132 // (-(-m // 128) * -(-r // br)))
        shape = kernels.DownTile(128, 64, br, warps=8, stages=4, splits=splits)
        return {
            "down": lambda: kernels.bottleneck_down(x, down, d_bias, KIND, True, shape),
            "down backward": lambda: kernels.bottleneck_down_backward(dy, up.t(), p, KIND, True, shape),
        }  # fmt: skip

    def wgrad_tile(br: int) -> Callable[[], object]:
        shape = wgrad_tiles.WgradTile(64, 128, br, warps=8, stages=4, ctas=118)
        return lambda: triton.wgrad(*gradients[:4], None, *gradients[4:], shape)

    def with_ones() -> Tensor:
        """One product whose addend is the residual: the bias is a row of the factor beside a column of ones."""
        a, factor = p.new_zeros(m, r + 8), p.new_zeros(r + 8, d)
        a[:, :r], a[:, r], factor[:r], factor[r] = p, 1, up.t(), u_bias
        return torch.addmm(x, a, factor)

    def whole(call: Callable[..., Tensor], train: bool) -> Callable[[], object]:
        def run() -> object:
            if not train:
                with torch.no_grad():
                    return call(*module)
            y = call(*module)
            return torch.autograd.grad(y, module, dy)

        return run

    def five_calls(x: Tensor, *factors: Tensor) -> Tensor:
        down, d_bias, up, u_bias = factors
        return x + F.linear(F.relu(F.linear(x, down, d_bias)), up, u_bias)

    def ours(x: Tensor, *factors: Tensor) -> Tensor:
        return bottleneck(x, x, *factors, KIND)

    gradients = x, p, dy, p, dtype, dtype, dtype
    calls: dict[str, dict[str, Callable[[], object]]] = {
        "down": {
            TORCH: lambda: reference.bottleneck_down(x, down, d_bias, KIND, True),
            TRITON: lambda: kernels.bottleneck_down(x, down, d_bias, KIND, True),
        },
        "down backward": {
            TORCH: lambda: reference.bottleneck_down_backward(dy, up.t(), p, KIND, True),
            TRITON: lambda: kernels.bottleneck_down_backward(dy, up.t(), p, KIND, True),
        },
        "up": {
            TORCH: lambda: reference.bottleneck_up(p, up, u_bias, x),
            TRITON: lambda: kernels.bottleneck_up(p, up, u_bias, x),
            "addmm": with_ones,
            "64x128": tile(64, 128, 4),
            "128x128": tile(128, 128, 8),
            "128x256": tile(128, 256, 8),
        },
        "up backward": {
            TORCH: lambda: reference.bottleneck_up(p, down.t(), None, dy),
            TRITON: lambda: kernels.bottleneck_up(p, down.t(), None, dy),
        },
        "wgrad": {
            TORCH: lambda: torch_backend.bottleneck_wgrad(*gradients),
            TRITON: lambda: triton.wgrad(*gradients[:4], None, *gradients[4:]),
        },
    }
    for br in (128, 256):
        if r > 64 and (br == 128 or r > 128):
            for part, run in down_tile(br).items():
                calls[part][f"128x{br}"] = run
            calls["wgrad"][f"128x{br}"] = wgrad_tile(br)
    made = {part: {name: Contender(run) for name, run in c.items()} for part, c in calls.items()}
    for train in (False, True):
        made["f+b" if train else "fwd"] = {
            TORCH: Contender(whole(five_calls, train)),
            TRITON: Contender(whole(ours, train), _kernels),
            "as it comes": Contender(whole(ours, train)),
        }
    return made


def _kernels() -> contextlib.AbstractContextManager[object]:
    return fastlora.backend("triton", strict=True)


def sweep(rows: tuple[int, ...], widths: tuple[int, ...], d: int, device: torch.device) -> dict[str, dict[int, list[float]]]:  # fmt: skip
    """Part -> width -> Triton's time over torch's, one for each number of rows."""
    rule, clock = Rule(rounds=15), DeviceClock(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ratios: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for m in rows:
        for r in widths:
            for part, contenders in parts(m, d, r, device, dtype).items():
                timings = measure(contenders, TORCH, clock, rule)
                cells = []
                for name, timing in timings.items():
                    ratio = timing.ratio
                    cells.append(f"{name} {timing.median_us:.1f} us {ratio.median:.3f}" if ratio else f"{name} {timing.error}")  # fmt: skip
                if (ratio := timings[TRITON].ratio) is not None:
                    ratios[part][r].append(ratio.median)
                print(f"M={m:5} r={r:4} {part:14} {'   '.join(cells)}", flush=True)
    return ratios


def widest(ratios: dict[int, list[float]], rows: int) -> int:
    """The largest width up to which no width was slower, in the mean over numbers of rows, than torch's products."""
    best = 0
    for r, found in sorted(ratios.items()):
        if len(found) < rows or sum(found) / rows > 1.0:
            break
        best = r
    return best


def main(arguments: list[str] | None = None) -> int:
    def numbers(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(",")))

    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep_bottleneck")
    parser.add_argument("--rows", type=numbers, default=ROWS)
    parser.add_argument("--widths", type=numbers, default=WIDTHS)
    parser.add_argument("--features", type=int, default=FEATURES)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=default)
    options: Any = parser.parse_args(arguments)
    ratios = sweep(options.rows, options.widths, options.features, options.device)
    for part, by_width in ratios.items():
        print(f"{part:14} Triton is no slower up to {widest(by_width, len(options.rows))}")
    print(f"now: {ops_bottleneck.WIDEST}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
