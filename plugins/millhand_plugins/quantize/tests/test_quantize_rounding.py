"""The rounding core alone: grids, and learned rounding against rounding to nearest and against every other choice."""

import itertools

import numpy as np
import pytest

from millhand_plugins.quantize.grid import Grid, affine, asymmetric, fitted, symmetric
from millhand_plugins.quantize.rounding import Annealing, Moments, anneal, output_loss

MAKERS = {"symmetric": symmetric, "asymmetric": asymmetric, "affine": affine}


def correlated(rows: int, inputs: int, seed: int) -> np.ndarray:
    """Inputs as layers see them: a few common causes, some noise, a mean that is not 0."""
    random = np.random.default_rng(seed)
    causes = random.standard_normal((rows, max(2, inputs // 4))) @ random.standard_normal((max(2, inputs // 4), inputs))
    return (causes + 0.3 * random.standard_normal((rows, inputs)) + 0.5).astype(np.float32)


def weights(outputs: int, inputs: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((outputs, inputs)).astype(np.float32)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(("inputs", "block"), [(64, 32), (70, 32), (7, 16)])
def test_no_weight_moves_further_than_its_grid_allows(make, inputs, block):
    matrix = weights(5, inputs, seed=1)
    grid = make(matrix, 4, block)
    integers = grid.nearest(matrix)
    assert integers.shape == matrix.shape
    assert grid.scale.shape == grid.offset.shape == (5, -(-inputs // block))
    assert integers.min() >= grid.low and integers.max() <= grid.high and (integers == np.round(integers)).all()
    step = np.abs(grid.steps(inputs))
    # One end of a symmetric grid is a level short; a whole zero point moves both ends by half a level.
    most = {"symmetric": 1.0, "asymmetric": 1.0, "affine": 0.5}[make.__name__]
    assert (np.abs(grid.values(integers) - matrix) <= most * step + 1e-6).all()


def test_what_lies_on_the_grid_stays_as_it_is():
    random = np.random.default_rng(2)
    levels = random.integers(0, 16, (3, 64)).astype(np.float32)
    levels[:, ::32], levels[:, 1::32] = 0, 15  # both ends of each block are used
    matrix = levels * 0.25 - 1.5
    grid = affine(matrix, 4, 32)
    assert np.allclose(grid.values(grid.nearest(matrix)), matrix, atol=1e-6)
    assert (anneal(matrix, grid, Moments.of(correlated(200, 64, 2))) == levels).all()


def test_zero_points_are_whole_and_zero_stays_zero():
    matrix = np.abs(weights(4, 64, seed=3))
    matrix[:, 5] = 0
    grid = asymmetric(matrix, 4, 32)
    assert (grid.zero_points == np.round(-grid.offset / grid.scale)).all() and (grid.zero_points == 0).all()
    assert np.abs(grid.values(grid.nearest(matrix))[:, 5]).max() < 1e-6


def test_blocks_of_zeros_and_of_one_value_are_kept():
    for value in (0.0, 0.7, -0.7):
        matrix = np.full((2, 32), value, np.float32)
        for make in MAKERS.values():
            grid = make(matrix, 4, 32)
            assert np.isfinite(grid.scale).all() and (grid.scale != 0).all()
            assert np.allclose(grid.values(grid.nearest(matrix)), value, atol=1e-6), make.__name__


def test_positive_scales_leave_the_lowest_level_unused():
    matrix = weights(4, 64, seed=4)
    grid = symmetric(matrix, 4, 32, positive=True)
    assert (grid.scale > 0).all() and grid.nearest(matrix).min() >= 1


def test_half_scales_are_float16_numbers():
    grid = affine(weights(4, 64, seed=5), 4, 32, half=True)
    for values in (grid.scale, grid.offset):
        assert values.dtype == np.float32 and (values.astype(np.float16) == values).all()


def test_fitted_scales_lose_less_where_one_weight_stands_out():
    matrix = weights(8, 128, seed=6)
    matrix[:, ::32] *= 3
    importance = np.ones(128, np.float32)
    importance[::32] = 1e-3

    def loss(grid: Grid) -> float:
        return float(((grid.values(grid.nearest(matrix)) - matrix) ** 2 * importance).sum())

    assert loss(fitted(lambda shrink: symmetric(matrix, 4, 32, shrink=shrink), matrix, importance)) < 0.7 * loss(
        symmetric(matrix, 4, 32)
    )


@pytest.mark.parametrize("seed", range(5))
def test_learned_rounding_is_near_the_best_of_all_choices(seed):
    """Ten weights: all 1,024 choices between neighbours are tried."""
    matrix = weights(1, 10, seed)
    moments = Moments.of(correlated(500, 10, seed))
    grid = symmetric(matrix, 3, 16)
    base = np.clip(np.floor(grid.places(matrix)), grid.low, grid.high - 1)
    choices = np.array(list(itertools.product((0, 1), repeat=10)), np.float32)
    best = min(output_loss(matrix, grid.values(base + choice[None]), moments) for choice in choices)
    plain = output_loss(matrix, grid.values(grid.nearest(matrix)), moments)
    learned = output_loss(matrix, grid.values(anneal(matrix, grid, moments)), moments)
    assert best <= learned * (1 + 1e-4)
    assert plain - learned >= 0.75 * (plain - best)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_learned_rounding_loses_less_on_rows_that_it_never_saw(make):
    matrix = weights(16, 64, seed=8)
    rows = correlated(2000, 64, seed=8)
    seen, unseen = Moments.of(rows[:1000]), Moments.of(rows[1000:])
    grid = make(matrix, 4, 32)
    plain = output_loss(matrix, grid.values(grid.nearest(matrix)), unseen)
    learned = output_loss(matrix, grid.values(anneal(matrix, grid, seen)), unseen)
    assert learned < 0.5 * plain


def test_damping_holds_against_few_rows():
    """Twenty rows say nothing about most directions of 64 inputs."""
    matrix = weights(16, 64, seed=1)
    rows = correlated(3000, 64, seed=1) + 2 * np.random.default_rng(1).standard_normal((3000, 64)).astype(np.float32)
    few, unseen = Moments.of(rows[:20]), Moments.of(rows[20:])
    grid = symmetric(matrix, 4, 32)
    bare, damped = (
        output_loss(matrix, grid.values(anneal(matrix, grid, seen)), unseen) for seen in (few, few.damped())
    )
    assert damped < 0.95 * bare
    assert bare < output_loss(matrix, grid.values(grid.nearest(matrix)), unseen)


def test_it_makes_up_for_what_was_lost_before_the_layer():
    """The layer gets noisy inputs; `cross` tells what the original's were."""
    matrix = weights(16, 32, seed=9)
    original = correlated(2000, 32, seed=9)
    given = np.round(original)
    grid = symmetric(matrix, 4, 32)

    def error(moments: Moments) -> float:
        answers = given @ grid.values(anneal(matrix, grid, moments)).T
        return float(((answers - original @ matrix.T) ** 2).mean())

    assert error(Moments.of(given, original)) < error(Moments.of(given))


def test_no_row_is_worse_than_rounding_to_nearest():
    matrix = weights(32, 48, seed=10)
    moments = Moments.of(correlated(300, 48, seed=10))
    grid = symmetric(matrix, 4, 16)
    hasty = anneal(matrix, grid, moments, Annealing(steps=3))  # far too few steps
    for row in range(32):
        one = slice(row, row + 1)
        learned = output_loss(matrix[one], grid.values(hasty)[one], moments)
        assert learned <= output_loss(matrix[one], grid.values(grid.nearest(matrix))[one], moments) * (1 + 1e-4)


def test_the_exponent_anneals_from_high_to_low_after_the_warm_up():
    schedule = Annealing(steps=100, warm_up=0.2, beta_high=20, beta_low=2)
    betas = [schedule.beta(step) for step in range(100)]
    assert betas[:20] == [None] * 20
    acting = [beta for beta in betas if beta is not None]
    assert acting[0] == 20 and acting == sorted(acting, reverse=True) and 2 <= acting[-1] < 2.1


def test_progress_is_told_and_may_end_the_work():
    matrix, seen = weights(2, 16, seed=11), []
    grid, moments = symmetric(matrix, 4, 16), Moments.of(correlated(50, 16, seed=11))
    anneal(matrix, grid, moments, Annealing(steps=10), seen.append)
    assert len(seen) == 10 and seen[-1] == 1.0

    def stop(share: float) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        anneal(matrix, grid, moments, Annealing(steps=10), stop)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_torch_gives_what_numpy_gives(make):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    matrix, rows = weights(8, 70, seed=12), correlated(500, 70, seed=12)
    importance = Moments.of(rows).importance

    def run(xp, convert):
        own = convert(matrix)
        moments = Moments.of(convert(rows))
        grid = fitted(lambda shrink: make(own, 4, 32, shrink=shrink, half=True, xp=xp), own, convert(importance))
        return np.asarray(grid.values(anneal(own, grid, moments, Annealing(steps=50))))

    ours, theirs = run(np, lambda array: array), run(torch, torch.from_numpy)
    moments = Moments.of(rows)
    assert (np.abs(ours - theirs) > 1e-4).mean() < 0.02  # a few weights lie on the edge of a decision
    assert output_loss(matrix, theirs, moments) == pytest.approx(output_loss(matrix, ours, moments), rel=0.05)
