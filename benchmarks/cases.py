"""The cases whose figures this project publishes: one list per benchmark. Order matters where a time budget cuts it."""

from __future__ import annotations

from fastlora.testing.providers import Case

SQUARE, UP, DOWN = (
    (8192, 4096, 4096),
    (8192, 4096, 14336),
    (8192, 14336, 4096),
)  # Llama-3-8B's linears
SQUARE_70B, UP_70B = (8192, 8192, 8192), (8192, 8192, 28672)  # Llama-3-70B's

LINEAR = (
    *(Case(*shape) for shape in (SQUARE, UP, DOWN)),
    *(Case(*shape, dropout=0.05) for shape in (SQUARE, UP, DOWN)),
    Case(2048, 4096, 4096),
    Case(*SQUARE, adapter_dtype="float32"),
    *(Case(*shape) for shape in (SQUARE_70B, UP_70B)),
    *(Case(m, 4096, 4096, train=False) for m in (1, 16, 256)),
    *(Case(*shape, r=64) for shape in (SQUARE, UP, DOWN, SQUARE_70B, UP_70B)),
    Case(*UP, adapter_dtype="float32"),
)

# Enough of each kind to see whether a change moved anything.
LINEAR_QUICK = (
    Case(*SQUARE),
    Case(*SQUARE, dropout=0.05),
    Case(2048, 4096, 4096),
    Case(16, 4096, 4096, train=False),
)

# A machine without a GPU: the same kinds at sizes a core can do.
LINEAR_CPU = (
    Case(256, 512, 512, dtype="float32"),
    Case(256, 512, 512, dtype="float32", dropout=0.05),
    Case(256, 512, 1024, dtype="float32", bias=True),
    Case(128, 256, 256),
    Case(1, 512, 512, train=False),
)
