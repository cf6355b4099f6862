"""The options that every benchmark has: how many rounds, where to, on what."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastlora.testing.timing import MIN_ROUNDS, Rule

RESULTS = Path(__file__).parent / "results"


def _rounds(text: str) -> int:
    if not text.isdecimal() or int(text) < MIN_ROUNDS:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; the timing rule asks for a number of at least {MIN_ROUNDS}"
        )
    return int(text)


def device_argument(text: str) -> torch.device:
    """A device that there is, for argparse."""
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted are cpu, cuda and cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"got {text!r}; torch sees {torch.cuda.device_count()} CUDA devices here"
        )
    return device


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=_rounds, default=Rule.rounds)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device_argument, default=default)
