"""reference.py against truths it shares no code with: plain-integer Philox, bitsandbytes, torch's own autograd."""

from __future__ import annotations

import math

import pytest
import torch

from fastlora import reference, rng

MASK32 = 0xFFFFFFFF


def philox_by_hand(
    key: tuple[int, int], counter: tuple[int, int, int, int], rounds: int
) -> tuple[int, ...]:
    """Philox4x32 as the paper writes it, in Python integers."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(rounds):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK32, (p0 >> 32) ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def test_the_hand_written_philox_reproduces_the_published_vectors():
    # Random123's known answers for philox4x32 at 10 rounds.
    assert philox_by_hand((0, 0), (0, 0, 0, 0), 10) == (
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    )
    ones = (MASK32,) * 4
    assert philox_by_hand((MASK32, MASK32), ones, 10) == (
        0x408F276D,
        0x41C83B0E,
        0xA20BC7C6,
        0x6D5451FD,
    )


@pytest.mark.parametrize("seed", [0, 1, 2**62 + 12345, 0xDEADBEEF])
@pytest.mark.parametrize("keep", [1, 32768, 62256, 62257, 65536])
def test_mask_follows_its_written_definition(seed, keep):
    offset, rows, cols = 0x123456789, 43, 41
    state = torch.tensor([seed, offset])
    got = reference.unpack_mask(reference.mask(state, rows, cols, keep), rows, cols)
    key = (seed & MASK32, seed >> 32)
    for m in (0, 1, 7, 8, 17, 31, 32, 42):
        for n in range(cols):
            block, i, s = m // 32, m % 32 // 8, m % 8
            c, j = divmod(n, 8)
            number = 0
            for k in range(16):
                counter = (offset & MASK32, offset >> 32, 4 * c + k // 4, 8 * block + s)
                number |= (philox_by_hand(key, counter, 7)[k % 4] >> (8 * i + j) & 1) << k
            assert bool(got[m, n]) == (number + keep >= 65536), (m, n)


@pytest.mark.parametrize("p", [0.01, 0.05, 0.5, 0.9])
def test_mask_drops_the_asked_share_independently(p):
    rows, cols, keep = 512, 1024, rng.keep_threshold(p)
    kept = reference.unpack_mask(
        reference.mask(rng.draw_state("cpu"), rows, cols, keep), rows, cols
    ).double()
    share, sigma = keep / rng.KEEP_ALL, math.sqrt(p * (1 - p))
    assert abs(kept.mean() - share) < 5 * sigma / math.sqrt(kept.numel())
    for axis in (0, 1):  # every row and every column by itself, and neighbours against each other
        length = kept.shape[axis]
        assert (kept.mean(axis) - share).abs().max() < 6 * sigma / math.sqrt(length)
        centred = (kept - share) / sigma
        correlation = (centred * centred.roll(1, axis)).mean()
        assert abs(correlation) < 5 / math.sqrt(kept.numel())


def test_masks_of_different_states_differ():
    keep = rng.keep_threshold(0.5)
    masks = [reference.mask(rng.draw_state("cpu"), 64, 64, keep) for _ in range(3)]
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])


@pytest.mark.parametrize(
    ("p", "keep"), [(0.0, 65536), (1.0, 0), (0.5, 32768), (0.05, 65536 - 205 * 16), (1e-9, 65536)]
)
def test_keep_threshold(p, keep):
    assert rng.keep_threshold(p) == keep


@pytest.mark.parametrize("p", [0.004, 0.01, 0.05, 0.1, 0.3, 0.625, 0.9, 0.996])
def test_keep_threshold_gives_both_sides_to_a_part_in_512(p):
    kept = rng.keep_threshold(p) / rng.KEEP_ALL
    assert 1 - kept == pytest.approx(p, rel=1 / 512) and kept == pytest.approx(1 - p, rel=1 / 512)


@pytest.mark.parametrize(
    ("keep", "calls"),
    [(65536, 1), (0, 1), (32768, 1), (4096, 1), (256, 2), (16, 3), (8, 4), (1, 4), (62256, 3)],
)
def test_short_thresholds_need_fewer_calls(keep, calls):
    assert rng.philox_calls(keep) == calls


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_keep_threshold_refuses_what_is_no_probability(p):
    with pytest.raises(ValueError, match="dropout_p"):
        rng.keep_threshold(p)


def test_keep_scale_restores_the_expectation():
    assert rng.keep_scale(rng.keep_threshold(0.25)) == pytest.approx(4 / 3, rel=1e-4)
    assert rng.keep_scale(0) == 0.0


@pytest.mark.parametrize("block_size", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_equals_bitsandbytes(block_size, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(96, 256).to(dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
    ours, absmax = reference.quantize_nf4(weight, block_size)
    assert torch.equal(absmax, state.absmax.float())
    assert torch.equal(ours, packed.view(-1))
    back = reference.dequantize_nf4(ours, absmax, (96, 256), block_size, dtype)
    assert torch.equal(back, functional.dequantize_4bit(packed, state))


def test_nf4_of_odd_sizes_and_zero_blocks_round_trips():
    weight = torch.randn(3, 71)
    weight[0] = 0
    packed, absmax = reference.quantize_nf4(weight, 64)
    back = reference.dequantize_nf4(packed, absmax, (3, 71), 64, torch.float32)
    assert packed.numel() == (3 * 71 + 1) // 2 and absmax.numel() == math.ceil(3 * 71 / 64)
    assert (back[0, :64] == 0).all()
    widest_gap = 1.0 - 0.6961928009986877
    bound = absmax.repeat_interleave(64)[: weight.numel()].view_as(weight) * widest_gap / 2
    assert ((weight - back).abs() <= bound + 1e-6).all()


def test_reference_lora_linear_is_the_formula_in_fp64():
    x, w, a, b = (torch.randn(s, dtype=torch.float64) for s in ((5, 7), (3, 7), (2, 7), (3, 2)))
    merged = w + 0.5 * b @ a
    torch.testing.assert_close(reference.lora_linear(x, w, a, b, 0.5), x @ merged.t())
