"""Packing loses nothing, repeats nothing and mixes nothing; the split and the order are
functions of the seed.
"""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlora.training.data import Document
from fastlora.training.packing import (
    IGNORED,
    BatchOrder,
    collate,
    cut,
    hold_out,
    limit,
    pack,
    with_targets,
)

PAD = 0


def numbered(lengths: list[int]) -> list[Document]:
    """Documents of tokens 1, 2, 3, ... over all of them, so that a token says where it came
    from; a third is masked.
    """
    documents, start = [], 1
    for length in lengths:
        ids = np.arange(start, start + length, dtype=np.int32)
        documents.append(Document(ids, ids % 3 != 0))
        start += length
    return documents


LENGTHS = st.lists(st.integers(1, 70), min_size=1, max_size=40)


@given(lengths=LENGTHS, seq_length=st.integers(2, 50))
@settings(max_examples=200, deadline=None)
def test_every_token_once_and_every_label_right(lengths: list[int], seq_length: int) -> None:
    documents = numbered(lengths)
    segments = cut(documents, seq_length)
    blocks = pack(segments, seq_length)
    batch = collate(blocks, PAD, seq_length)
    assert batch.input_ids.shape == (len(blocks), seq_length)
    ids = batch.input_ids.numpy()
    assert sorted(ids[ids != PAD].tolist()) == list(range(1, sum(lengths) + 1))

    wanted = {
        int(token): bool(t) for d in documents for token, t in zip(d.ids, d.target, strict=True)
    }
    firsts = {int(segment.ids[0]) for segment in segments}
    place_in_segment = {
        int(token): i for segment in segments for i, token in enumerate(segment.ids)
    }
    for token, label, position in zip(
        ids.ravel(), batch.labels.ravel().tolist(), batch.position_ids.ravel().tolist(), strict=True
    ):
        if token == PAD:
            assert label == IGNORED
        else:
            # A label stands on its own token, unless that token is masked or has nothing before it.
            assert label == (token if wanted[token] and token not in firsts else IGNORED)
            assert position == place_in_segment[token]


@given(lengths=LENGTHS, seq_length=st.integers(2, 50))
@settings(max_examples=100, deadline=None)
def test_packing_is_tight(lengths: list[int], seq_length: int) -> None:
    """Best fit: no two blocks could have been one."""
    blocks = pack(cut(numbered(lengths), seq_length), seq_length)
    used = sorted(sum(map(len, block)) for block in blocks)
    assert used[-1] <= seq_length
    assert len(used) < 2 or used[0] + used[1] > seq_length


def test_documents_that_fit_are_not_cut() -> None:
    documents = numbered([5, 9, 3, 10])
    assert [segment.ids.tolist() for segment in cut(documents, 10)] == [
        d.ids.tolist() for d in documents
    ]


def test_padding_continues_positions_so_that_one_segment_keeps_the_causal_mask() -> None:
    batch = collate([(numbered([4])[0],)], PAD, 7)
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    assert batch.input_ids[0, 4:].tolist() == [PAD] * 3
    assert batch.targets == 2  # tokens 2 and 4: 1 is the first, 3 is masked


def test_unpacked_batch_is_as_wide_as_its_longest() -> None:
    batch = collate([(d,) for d in numbered([4, 6])], PAD)
    assert batch.input_ids.shape == (2, 6)


@given(
    lengths=st.lists(st.integers(2, 30), min_size=2, max_size=40),
    fraction=st.floats(0.01, 0.9),
    max_tokens=st.integers(2, 500),
    seed=st.integers(0, 5),
)
@settings(max_examples=150, deadline=None)
def test_hold_out_partitions(
    lengths: list[int], fraction: float, max_tokens: int, seed: int
) -> None:
    documents = numbered(lengths)
    training, held_out = hold_out(documents, fraction, max_tokens, seed)
    again = hold_out(documents, fraction, max_tokens, seed)
    assert [d.ids.tolist() for d in again[1]] == [d.ids.tolist() for d in held_out]
    assert training
    assert held_out
    tokens = sorted(int(t) for d in training + held_out for t in d.ids)
    assert tokens == list(range(1, sum(lengths) + 1))
    size = sum(map(len, held_out))
    assert len(held_out) == 1 or size <= min(fraction * len(tokens), max_tokens)


def test_hold_out_follows_the_seed_and_the_fraction() -> None:
    documents = cut(numbered([1000]), 50)
    training, held_out = hold_out(documents, 0.2, 10_000, seed=3)
    assert (len(training), len(held_out)) == (16, 4)
    other = hold_out(documents, 0.2, 10_000, seed=4)[1]
    assert [d.ids[0] for d in other] != [d.ids[0] for d in held_out]


def test_limit_keeps_at_least_one() -> None:
    segments = numbered([9, 5, 5])
    assert limit(segments, 4) == segments[:1]
    assert limit(segments, 14) == segments[:2]
    assert limit(segments, 99) == segments


def test_segments_without_targets_are_dropped() -> None:
    silent = Document(np.arange(4, dtype=np.int32), np.array([True, False, False, False]))
    loud = Document(np.arange(2, dtype=np.int32), np.array([False, True]))
    assert with_targets([silent, loud]) == [loud]


@given(blocks=st.integers(1, 40), per_step=st.integers(1, 9), seed=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_order_takes_each_block_once_an_epoch_and_depends_on_the_step_alone(
    blocks: int, per_step: int, seed: int
) -> None:
    order = BatchOrder(blocks, per_step, seed)
    epochs = [
        [
            i
            for step in range(order.steps_per_epoch)
            for i in order(epoch * order.steps_per_epoch + step)
        ]
        for epoch in range(2)
    ]
    assert [sorted(epoch) for epoch in epochs] == [list(range(blocks))] * 2
    if blocks > 12:
        assert epochs[0] != epochs[1]
    last = 2 * order.steps_per_epoch - 1
    assert BatchOrder(blocks, per_step, seed)(last) == order(last)  # asked first, as after a resume


def test_packed_documents_get_the_logits_they_get_alone() -> None:
    """What position_ids are for, on a real (tiny) model; and the probe that tells when a model
    ignores them.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastlora.training.base import CausalLM, keeps_documents_apart

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    ).eval()
    lm = CausalLM(model, model)
    documents = numbered([7, 11, 5])
    (block,) = pack(documents, 24)
    batch = collate([block], PAD, 24)
    logits = lm.logits(batch.input_ids, batch.position_ids)[0]
    start = 0
    for segment in block:
        alone = collate([(segment,)], PAD)
        torch.testing.assert_close(
            logits[start : start + len(segment)], lm.logits(alone.input_ids, alone.position_ids)[0]
        )
        start += len(segment)
    assert keeps_documents_apart(lm, torch.device("cpu"))
    lm.takes_positions = False  # a model without position_ids sees one long document
    assert not keeps_documents_apart(lm, torch.device("cpu"))
