"""fastlora::_dropout_mask against a Philox4x32 written here from the paper (Salmon et al., SC 2011)."""

import numpy as np
import pytest
import torch

from fastlora import _library, reference

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

pytestmark = pytest.mark.skipif(
    not _library.load(), reason=f"no op library: {_library.status().reason}"
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
KEEP_ALL = 65536


def philox(counter, key, rounds=7):
    """Four counter words and two key words, uint64 arrays that hold 32-bit values -> four output words."""
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = (np.asarray(word, np.uint64) for word in key)
    for _ in range(rounds):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> HALF) ^ c1 ^ k0, p1 & LOW, (p0 >> HALF) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & LOW, (k1 + np.uint64(0xBB67AE85)) & LOW
    return c0, c1, c2, c3


def numbers(state, rows, cols, first_row=0, first_col=0):
    """The 16-bit number of every element, from that row and column on: uint64 [rows, cols]."""
    seed, offset = (value % 2**64 for value in state)
    m, n = np.ogrid[first_row : first_row + rows, first_col : first_col + cols]
    m, n = np.broadcast_arrays(m, n)
    unit_row, element = m // 32 * 8 + m % 8, (m % 32 // 8 * 8 + n % 8).astype(np.uint64)
    number = np.zeros((rows, cols), np.uint64)
    for call in range(4):
        low, high = (np.full((rows, cols), half) for half in (offset % 2**32, offset >> 32))
        counter = (low, high, 4 * (n // 8) + call, unit_row)
        for w, plane in enumerate(philox(counter, (seed % 2**32, seed >> 32))):
            number |= (plane >> element & np.uint64(1)) << np.uint64(4 * call + w)
    return number


def expected(state, rows, cols, keep, first_row=0, first_col=0):
    """The words of a mask; those that reach past its edges hold the elements that would be there."""
    blocks, units = (rows + 31) // 32, (cols + 7) // 8
    kept = (
        numbers(state, 32 * blocks, 8 * units, first_row, first_col) + np.uint64(keep) >= KEEP_ALL
    )
    element = kept.reshape(blocks, 4, 8, units, 8).transpose(0, 2, 3, 1, 4)  # R, s, c, i, j
    words = np.packbits(element.reshape(8 * blocks, units, 32), axis=-1, bitorder="little")
    return torch.from_numpy(words.view("<i4").reshape(8 * blocks, units))


def mask(state, rows, cols, keep, device="cpu"):
    rng_state = torch.tensor(state, dtype=torch.int64, device=device)
    return torch.ops.fastlora._dropout_mask(rng_state, rows, cols, keep)


ONES = 0xFFFFFFFF
PI = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "answer"),
    [
        (10, (0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (10, (ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (10, *PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
        (7, (0,) * 4, (0,) * 2, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (7, (ONES,) * 4, (ONES,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (7, *PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    ],
)
def test_the_oracle_gives_random123s_known_answers(rounds, counter, key, answer):
    assert tuple(int(word) for word in philox(counter, key, rounds)) == answer


@pytest.mark.parametrize("device", DEVICES)
def test_the_op_gives_the_known_answer_bit_by_bit(device):
    # State 0, unit (0, 0): the first call's counter is all zeros, Random123's first vector. It gives the four lowest
    # bits of every element's number.
    planes = (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    all_numbers = numbers((0, 0), 32, 8)
    for element in range(32):
        row, column = element // 8 * 8, element % 8
        number = int(all_numbers[row, column])
        assert number % 16 == sum((plane >> element & 1) << i for i, plane in enumerate(planes))
        carries = KEEP_ALL - number
        assert not mask((0, 0), 32, 8, carries - 1, device)[0, 0] >> element & 1
        assert mask((0, 0), 32, 8, carries, device)[0, 0] >> element & 1


@pytest.mark.parametrize("device", DEVICES)
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    state=st.tuples(*[st.integers(-(2**63), 2**63 - 1)] * 2),
    rows=st.integers(0, 40),
    cols=st.integers(0, 200),
    keep=st.integers(0, KEEP_ALL),
)
def test_equal_to_the_oracle_and_to_the_reference(device, state, rows, cols, keep):
    got = mask(state, rows, cols, keep, device)
    assert got.dtype == torch.int32
    assert got.is_contiguous()
    assert torch.equal(got.cpu(), expected(state, rows, cols, keep))
    assert torch.equal(got.cpu(), reference.mask(torch.tensor(state), rows, cols, keep))


# Many threads, several blocks an axis of the CUDA grid, more than one turn of its stride loops.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1_200_011), (300_007, 3), (517, 1003), (512, 1024)])
def test_equal_to_the_oracle_on_large_shapes(device, rows, cols):
    state = (0x0123456789ABCDEF, -7)
    assert torch.equal(
        mask(state, rows, cols, 29491, device).cpu(), expected(state, rows, cols, 29491)
    )


@pytest.mark.parametrize("device", DEVICES)
def test_keep_everything_and_nothing(device):
    assert (mask((3, 4), 100, 100, KEEP_ALL, device) == -1).all()
    assert (mask((3, 4), 100, 100, 0, device) == 0).all()


def test_threads_do_not_change_the_mask():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = mask((11, 12), 333, 40999, 20000)
        torch.set_num_threads(4)
        assert torch.equal(one, mask((11, 12), 333, 40999, 20000))
    finally:
        torch.set_num_threads(before)


def test_a_strided_state_is_read_right():
    state = torch.tensor([5, 99, 6, 99])[::2]
    assert torch.equal(
        torch.ops.fastlora._dropout_mask(state, 3, 20, 20000), mask((5, 6), 3, 20, 20000)
    )


@pytest.mark.parametrize(
    ("state", "rows", "cols", "keep", "named"),
    [
        (torch.zeros(2), 1, 1, 1, "rng_state"),
        (torch.zeros(3, dtype=torch.int64), 1, 1, 1, "rng_state"),
        (torch.zeros(1, 2, dtype=torch.int64), 1, 1, 1, "rng_state"),
        (torch.zeros(2, dtype=torch.int64), -1, 1, 1, "rows"),
        (torch.zeros(2, dtype=torch.int64), 2**32 + 1, 0, 1, "rows"),
        (torch.zeros(2, dtype=torch.int64), 0, 2**33 + 1, 1, "cols"),
        (torch.zeros(2, dtype=torch.int64), 1, 1, KEEP_ALL + 1, "keep"),
        (torch.zeros(2, dtype=torch.int64), 1, 1, -1, "keep"),
    ],
)
def test_bad_arguments_are_named(state, rows, cols, keep, named):
    with pytest.raises((ValueError, RuntimeError), match=f"_dropout_mask: {named} must be"):
        torch.ops.fastlora._dropout_mask(state, rows, cols, keep)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    state = torch.tensor([1, 2], device=device)
    for rows, cols in [(5, 17), (0, 3), (1, 8)]:
        torch.library.opcheck(torch.ops.fastlora._dropout_mask.default, (state, rows, cols, 20000))


@pytest.mark.huge
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "cols"), [(2, 2**33), (2**31 + 5, 1)])
def test_beyond_two_to_the_31_elements(device, rows, cols):
    state, keep = (77, 2**40), 20000
    got = mask(state, rows, cols, keep, device)
    tail = got[-256:, -400:].cpu()
    first_row, first_col = 4 * (got.shape[0] - tail.shape[0]), 8 * (got.shape[1] - tail.shape[1])
    sizes = 4 * tail.shape[0], 8 * tail.shape[1]
    assert torch.equal(tail, expected(state, *sizes, keep, first_row, first_col))


@pytest.mark.gpu
def test_runs_on_the_current_stream_and_in_a_cuda_graph():
    state = torch.tensor([1, 2], device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.fastlora._dropout_mask(state, 64, 100, 20000)
    state.copy_(torch.tensor([3, 4]))
    graph.replay()
    assert torch.equal(captured.cpu(), expected((3, 4), 64, 100, 20000))


@pytest.mark.multigpu
def test_runs_on_the_tensors_device_not_the_current_one():
    with torch.cuda.device(0):
        got = mask((8, 9), 33, 65, 20000, "cuda:1")
    assert got.device == torch.device("cuda:1")
    assert torch.equal(got.cpu(), expected((8, 9), 33, 65, 20000))
