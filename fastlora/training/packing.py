"""Documents to blocks of a fixed length, blocks to batches, and the held-out split.

A block is a tuple of segments; a segment is a document, or a piece of one that is longer than a
block. Every segment's positions start at 0: models that build their mask from ``position_ids`` then
keep the segments of a block apart (block-diagonal attention), and the loss never asks a segment for
the first token of the next.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .data import Document

Block = tuple[Document, ...]
IGNORED = -100  # torch's own ignore_index


@dataclass(frozen=True)
class Batch:
    """Tensors int64 [rows, length]; ``labels`` are not shifted, IGNORED where nothing is asked."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor

    @property
    def targets(self) -> int:
        """How many tokens the loss is taken over."""
        return int((self.labels != IGNORED).sum())


def cut(documents: Sequence[Document], seq_length: int) -> list[Document]:
    """Documents as segments of at most ``seq_length`` tokens, in order, no token lost."""
    return [
        document.cut(start, start + seq_length)
        for document in documents
        for start in range(0, len(document), seq_length)
    ]


def with_targets(segments: Sequence[Document]) -> list[Document]:
    """The segments that carry loss; a first token, with nothing before it, carries none."""
    return [segment for segment in segments if segment.target[1:].any()]


def limit(segments: Sequence[Document], max_tokens: int) -> list[Document]:
    """The first segments that together have at most ``max_tokens`` tokens; at least one."""
    kept, tokens = list(segments[:1]), len(segments[0])
    for segment in segments[1:]:
        tokens += len(segment)
        if tokens > max_tokens:
            break
        kept.append(segment)
    return kept


def pack(segments: Sequence[Document], seq_length: int) -> list[Block]:
    """Best-fit decreasing: the longest first, each into the fullest block that has room.

    Each segment lands in exactly one block, whole. Deterministic. O(n log n) but for the sorted
    list's insertions.
    """
    order = sorted(range(len(segments)), key=lambda i: (-len(segments[i]), i))
    blocks: list[list[Document]] = []
    room: list[tuple[int, int]] = []  # (tokens left, block), sorted
    for i in order:
        size = len(segments[i])
        at = bisect.bisect_left(room, (size, -1))
        if at == len(room):
            blocks.append([])
            left, block = seq_length, len(blocks) - 1
        else:
            left, block = room.pop(at)
        blocks[block].append(segments[i])
        if left > size:
            bisect.insort(room, (left - size, block))
    return [tuple(block) for block in blocks]


def collate(blocks: Sequence[Block], pad_id: int, length: int | None = None) -> Batch:
    """Rows of one length: ``length``, or that of the longest block.

    Padding sits at the end and continues the last segment's positions: causal attention hides it
    from every real token, and a block of one segment keeps the plain causal mask (the fast path of
    every attention kernel).
    """
    width = length if length is not None else max(sum(map(len, block)) for block in blocks)
    ids = np.full((len(blocks), width), pad_id, dtype=np.int64)
    labels = np.full((len(blocks), width), IGNORED, dtype=np.int64)
    positions = np.zeros((len(blocks), width), dtype=np.int64)
    for row, block in enumerate(blocks):
        start = 0
        for segment in block:
            end = start + len(segment)
            ids[row, start:end] = segment.ids
            labels[row, start + 1 : end] = np.where(segment.target[1:], segment.ids[1:], IGNORED)
            positions[row, start:] = np.arange(width - start)
            start = end
    return Batch(torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(positions))


def hold_out(
    units: Sequence[Document], fraction: float, max_tokens: int, seed: int
) -> tuple[list[Document], list[Document]]:
    """``(training, held out)`` by ``seed``: about ``fraction`` of the tokens, not over ``max_tokens``.

    Units are held out whole, at least one, and at least one stays to train on.
    """
    wanted = min(fraction * sum(map(len, units)), max_tokens)
    chosen: set[int] = set()
    tokens = 0
    for i in np.random.default_rng(seed).permutation(len(units))[:-1].tolist():
        if chosen and tokens + len(units[i]) > wanted:
            break
        chosen.add(i)
        tokens += len(units[i])
    training = [unit for i, unit in enumerate(units) if i not in chosen]
    return training, [units[i] for i in sorted(chosen)]


class BatchOrder:
    """Which blocks step ``k`` takes: permuted anew each epoch, by ``seed`` and ``k`` alone.

    Nothing to save for a resume, and nothing that the number of steps already taken could disturb.
    """

    def __init__(self, blocks: int, per_step: int, seed: int) -> None:
        self.blocks, self.per_step, self.seed = blocks, per_step, seed
        self.steps_per_epoch = -(-blocks // per_step)
        self._epoch = -1
        self._order: list[int] = []

    def __call__(self, step: int) -> list[int]:
        """Block numbers of step ``step`` (from 0); the last step of an epoch may take fewer."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = (
                np.random.default_rng([self.seed, epoch]).permutation(self.blocks).tolist()
            )
            self._epoch = epoch
        return self._order[place * self.per_step : (place + 1) * self.per_step]
