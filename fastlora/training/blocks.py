"""The data of one run: read, split, cut and packed as its options say."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from . import packing
from .config import FinetuneConfig, option
from .data import Document, read_documents
from .display import Display
from .errors import InputError

FEW_DOCUMENTS = 10


@dataclass(frozen=True)
class Data:
    """Blocks to train on, to evaluate on and to watch, and how many tokens they hold."""

    training: list[packing.Block]
    held_out: list[packing.Block]
    training_tokens: int
    held_out_tokens: int
    watched: list[packing.Block] = dataclasses.field(default_factory=list)

    @property
    def shares_blocks(self) -> bool:
        """Whether some block holds more than one document."""
        return any(len(block) > 1 for block in self._all)

    @property
    def largest_id(self) -> int:
        """The largest token id in any part."""
        return max(int(segment.ids.max()) for block in self._all for segment in block)

    @property
    def _all(self) -> list[packing.Block]:
        return self.training + self.held_out + self.watched


def prepare_data(config: FinetuneConfig, tokenizer: Any, display: Display) -> Data:
    """Read, split, cut and pack the data of a run; ``InputError`` for what cannot be trained on."""
    training = read_documents(config.data, tokenizer, config.loss_on)
    if config.eval_data is not None:
        held_out = read_documents(config.eval_data, tokenizer, config.loss_on)
    else:
        if len(training) < FEW_DOCUMENTS:  # a book, say: pieces of it are held out
            training = _segments(training, "data", config, display)
        if len(training) < 2:
            raise InputError(
                f"{config.data} is too little data: {sum(map(len, training))} tokens give no piece of --seq-length "
                f"{config.seq_length} to train on and another to hold out; lower it, add text, or give --eval-data"
            )
        training, held_out = packing.hold_out(
            training, config.eval_fraction, config.eval_tokens, config.seed
        )
    training = _segments(training, "data", config, display)
    held_out = packing.limit(_segments(held_out, "eval_data", config, display), config.eval_tokens)
    tokens = sum(map(len, training))
    if config.packs and tokens < config.seq_length:
        raise InputError(
            f"{config.data}: {tokens} tokens to train on do not fill one block of --seq-length "
            f"{config.seq_length}; lower it, add text, or use --no-packing"
        )

    def blocks(segments: list[Document]) -> list[packing.Block]:
        return (
            packing.pack(segments, config.seq_length)
            if config.packs
            else [(part,) for part in segments]
        )

    watched: list[Document] = []
    if config.watch is not None:
        # General text is no task with answers: all of it counts.
        watched = read_documents(config.watch, tokenizer, "all")
        watched = packing.limit(_segments(watched, "watch", config, display), config.eval_tokens)
    held_out_tokens = sum(map(len, held_out))
    return Data(blocks(training), blocks(held_out), tokens, held_out_tokens, blocks(watched))


def _segments(
    documents: list[Document], name: str, config: FinetuneConfig, display: Display
) -> list[Document]:
    cut = packing.cut(documents, config.seq_length)
    kept = packing.with_targets(cut)
    if not kept:
        raise InputError(
            f"{option(name)}: no piece of {config.seq_length} tokens holds anything to learn from"
        )
    # A last piece of one token (nothing before it to predict it from) is not worth a warning.
    if lost := sum(len(piece) > 1 for piece in cut) - len(kept):
        display.warn(
            f"{lost} of {len(cut)} pieces of {option(name)} hold no answer (their documents are longer than "
            f"--seq-length {config.seq_length}) and are left out"
        )
    return kept
