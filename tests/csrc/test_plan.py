"""The tile planner: what it returns can always run, ranks sensibly, and refuses what no kernel has."""

import pytest

_core = pytest.importorskip("fastlora._core", reason="fastlora._core was not built")
hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

SHARED_MEMORY = 232_448  # bytes a CTA may use on sm_90

sizes = st.one_of(st.integers(0, 300), st.integers(0, 2**20), st.integers(0, 2**36))
problems = st.builds(
    _core.Problem,
    m=sizes,
    n=sizes,
    k=sizes,
    rank=st.integers(0, 512),
    dtype=st.sampled_from(["float16", "bfloat16"]),
    num_sms=st.integers(1, 200),
)


def ceil_div(a, b):
    return -(-a // b)


def tiles(problem, config):
    return ceil_div(problem.m, config.block_m) * ceil_div(problem.n, config.block_n)


@hypothesis.given(problems)
def test_every_candidate_can_run(problem):
    configs = _core.candidates(problem)
    assert configs
    assert len(set(configs)) == len(configs)
    for config in configs:
        slabs = config.stages * 64 * 2 * (config.block_m + config.block_n)
        assert slabs + config.block_m * config.block_n < config.shared_memory <= SHARED_MEMORY
        assert 3 <= config.stages <= 8
        assert config.cluster_m * config.cluster_n in (1, 2)
        # A pair of CTAs needs two tiles along its axis, a split needs K steps to share out.
        assert config.cluster_m <= max(1, ceil_div(problem.m, config.block_m))
        assert config.cluster_n <= max(1, ceil_div(problem.n, config.block_n))
        steps = ceil_div(problem.k, 64) + ceil_div(problem.rank, 64)
        assert config.split_k == 1 or steps >= 8 * config.split_k


@hypothesis.given(problems)
def test_best_first_and_the_same_every_time(problem):
    configs = _core.candidates(problem)
    clocks = [_core.estimate(problem, config) for config in configs]
    assert clocks == sorted(clocks)
    assert clocks[0] > 0
    assert _core.plan(problem) == configs[0] == _core.plan(problem)


@hypothesis.given(problems, st.data())
def test_flat_form_round_trips(problem, data):
    config = data.draw(st.sampled_from(_core.candidates(problem)))
    again = _core.TileConfig.from_list(config.to_list())
    assert again == config
    assert hash(again) == hash(config)
    assert repr(again) == repr(config)


@hypothesis.given(problems, st.sampled_from("mnk"), st.data())
def test_more_work_is_never_predicted_faster(problem, axis, data):
    hypothesis.assume(getattr(problem, axis) <= 2**35)
    config = data.draw(st.sampled_from(_core.candidates(problem)))
    sides = {"m": problem.m, "n": problem.n, "k": problem.k}
    sides[axis] *= 2
    larger = _core.Problem(**sides, rank=problem.rank, dtype=problem.dtype, num_sms=problem.num_sms)
    assert _core.estimate(larger, config) >= _core.estimate(problem, config)


@pytest.mark.parametrize("n_k", [(4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192)])
def test_training_shapes_get_big_tiles_in_pairs_and_no_split(n_k):
    problem = _core.Problem(8192, *n_k, rank=16)
    config = _core.plan(problem)
    assert config.block_m * config.block_n >= 128 * 192
    assert config.cluster_m * config.cluster_n == 2
    assert config.split_k == 1


@pytest.mark.parametrize("m", [1, 16, 64])
def test_few_rows_get_short_tiles_and_split_k_until_the_gpu_is_full(m):
    problem = _core.Problem(m, 4096, 4096, rank=16)
    config = _core.plan(problem)
    assert config.block_m == 64
    assert config.split_k > 1
    assert tiles(problem, config) <= problem.num_sms
    assert _core.plan(_core.Problem(m, 8192 * 4, 4096)).split_k == 1  # enough tiles already


def test_predictions_are_of_the_right_size():
    # 8192 x 4096 -> 4096 takes 365 us on an H200 at about 1.75 GHz; the model knows no power limit.
    problem = _core.Problem(8192, 4096, 4096)
    microseconds = _core.estimate(problem, _core.plan(problem)) / 1750
    assert 250 < microseconds < 400


def test_repr_shows_every_field():
    problem = _core.Problem(3, 4, 5, rank=6, dtype="float16", num_sms=7)
    assert repr(problem) == 'Problem(m=3, n=4, k=5, rank=6, dtype="float16", num_sms=7)'
    config = _core.TileConfig.from_list([128, 256, 4, 2, 1, 1, 16])
    assert repr(config) == (
        "TileConfig(block_m=128, block_n=256, stages=4, cluster_m=2, cluster_n=1, split_k=1, group_m=16)"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"m": -1}, r"0\.\.2\^36, got -1"),
        ({"k": 2**36 + 1}, r"0\.\.2\^36"),
        ({"rank": -3}, "got -3"),
        ({"dtype": "float32"}, "bfloat16 or float16, got float32"),
        ({"num_sms": 0}, "num_sms must be at least 1"),
    ],
)
def test_bad_problems_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        _core.Problem(**{"m": 1, "n": 1, "k": 1} | arguments)


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ([128, 256, 4, 2, 1, 1], "has 7 numbers, got 6"),
        ([128, 512, 4, 2, 1, 1, 8], "no kernel has the tile 128x512"),
        ([128, 256, 5, 2, 1, 1, 8], r"stages must be 3\.\.4"),
        ([128, 256, 2, 2, 1, 1, 8], r"stages must be 3\.\.4"),
        ([128, 256, 4, 2, 2, 1, 8], "cluster_m, cluster_n"),
        ([128, 256, 4, 3, 1, 1, 8], "cluster_m, cluster_n"),
        ([128, 256, 4, 1, 1, 3, 8], "split_k must be 1, 2, 4 or 8"),
        ([128, 256, 4, 1, 1, 1, 0], r"1\.\.1024"),
        ([128, 256, 4, 1, 1, 1, 2**40], r"1\.\.1024"),
    ],
)
def test_configurations_no_kernel_can_run_are_refused(flat, message):
    with pytest.raises(ValueError, match=message):
        _core.TileConfig.from_list(flat)


# ---- Who makes the passes of a low-rank linear ---------------------------------------------------------------

passes = st.integers(0, 2**36)
works = st.builds(
    _core.LinearWork,
    clusters=st.integers(1, 100),
    tiles=st.integers(1, 2**24),
    k=st.integers(1, 2**20),
    row_groups=st.integers(1, 2**12),
    down=passes,
    wgrad_b=passes,
    wgrad_a=passes,
)


@hypothesis.settings(deadline=None)  # of milliseconds, where another test has the CPU
@hypothesis.given(works)
def test_the_best_share_can_run_and_none_is_better(work):
    best = _core.share_work(work)
    least = _core.estimate(work, best)
    assert least > 0
    clusters = next(n for n in range(100, 0, -1) if _accepts(work, n))
    assert 1 <= best.helpers <= clusters
    for helpers in {4, 8, 16, 33, clusters} & set(range(1, clusters + 1)):
        for early in ((False, 0), (True, 0), (True, 0.5), (True, 1)):
            assert least <= _core.estimate(work, _core.Share(helpers, *early)) + 0.6


def _accepts(work, helpers):
    try:
        _core.estimate(work, _core.Share(helpers))
    except ValueError:
        return False
    return True


def test_helpers_are_those_that_would_be_idle():
    """4096 x 4096 at 8192 rows: 512 tiles for 66 clusters leave 16 of them a round short."""
    work = dict(clusters=66, tiles=512, k=4160, row_groups=4)
    product = _core.estimate(_core.LinearWork(**work, down=0), _core.Share(8))
    with_h = _core.LinearWork(**work, down=8192 * 4096)
    assert _core.estimate(with_h, _core.Share(8)) < 1.01 * product
    assert _core.estimate(with_h, _core.Share(66)) > 1.04 * product
    # One round of tiles on all clusters: nobody would be idle, so all make h first.
    work = _core.LinearWork(clusters=66, tiles=66, k=4160, row_groups=1, down=1024 * 4096)
    assert _core.share_work(work).helpers == 66


def test_what_rounds_leave_is_filled_with_a_part_of_the_gradient():
    """4096 x 14336 at 8192 rows, backward: 28 rounds leave 56 tiles' time, for g and most of dA."""
    passes = dict(down=8192 * 4096, wgrad_a=8192 * 14336)
    work = _core.LinearWork(clusters=66, tiles=1792, k=4160, row_groups=2, **passes)
    best = _core.share_work(work)
    assert 0 < best.a_early < 1
    for early in (0, 1):
        assert _core.estimate(work, best) < _core.estimate(
            work, _core.Share(best.helpers, True, early)
        )


def test_bad_work_is_refused():
    with pytest.raises(ValueError, match="must be positive"):
        _core.share_work(_core.LinearWork(clusters=66, tiles=0, k=64, row_groups=1, down=0))
    work = _core.LinearWork(clusters=4, tiles=1, k=64, row_groups=1, down=0)
    with pytest.raises(ValueError, match="helpers must be"):
        _core.estimate(work, _core.Share(5))
    with pytest.raises(ValueError, match="a_early must be 0 to 1"):
        _core.estimate(work, _core.Share(4, True, 1.5))


# ---- How a linear of few rows is cut -------------------------------------------------------------------------

few = st.builds(
    _core.FewWork,
    m=st.integers(1, 2048),
    n=st.integers(1, 2**17),
    k=st.integers(1, 2**17),
    rank=st.integers(1, 64),
    num_sms=st.integers(1, 200),
)


@hypothesis.settings(deadline=None)
@hypothesis.given(few)
def test_the_best_cut_of_few_rows_can_run_and_none_is_better(work):
    best = _core.plan_few(work)
    assert best.columns in (64, 128) and best.cluster_m * best.splits <= 8
    least = _core.estimate(work, best)
    assert 0 < least < float("inf")
    for columns in (64, 128):
        for splits in (1, 2, 4, 8):
            assert least <= _core.estimate(work, _core.FewConfig(columns, 1, splits)) + 0.06


def test_few_rows_take_all_sms_and_share_weights():
    def cut(m, n, k):
        best = _core.plan_few(_core.FewWork(m, n, k))
        return best.columns, best.cluster_m, best.splits

    for m in (1, 16, 64):
        columns, cluster_m, splits = cut(m, 4096, 4096)
        assert 100 <= 4096 // columns * splits <= 132 and cluster_m == 1
    assert cut(256, 4096, 4096) == (128, 2, 1)
    assert cut(1, 14336, 4096) == (64, 1, 1)
    with pytest.raises(ValueError, match="must be positive"):
        _core.plan_few(_core.FewWork(0, 8, 8))
    impossible = _core.estimate(_core.FewWork(1, 8, 64), _core.FewConfig(128, 1, 2))
    assert impossible == float("inf")
