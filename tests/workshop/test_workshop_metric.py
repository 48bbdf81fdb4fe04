"""Metrics of original and candidate, as [prediction] reads the outputs."""

from __future__ import annotations

import numpy as np
import pytest

from millhand.errors import ModelError
from millhand.workshop.metric import ACCURACY, AGREEMENT, RMSE, Metric, measure

CLASSES = Metric(name=ACCURACY, task="classification", output="y", labels=3)
NUMBERS = Metric(name=RMSE, task="regression", output="y", scale=10.0, low=0.0, high=125.0)


def test_accuracy_is_a_share_of_the_originals() -> None:
    truth = np.array([0, 1, 2, 2])
    right = np.eye(3, dtype=np.float32)[truth]
    worse = right.copy()
    worse[0] = [0, 0, 1]
    found = measure(CLASSES, {"y": right}, {"y": worse}, truth)
    assert found == pytest.approx((1.0, 0.75, 25.0))
    assert measure(CLASSES, {"y": worse}, {"y": right}, truth).drop_percent == pytest.approx(-100 / 3)


def test_rmse_scales_and_clips_before_it_compares() -> None:
    truth = np.array([0.0, 125.0, 50.0])
    original = {"y": np.array([[-3.0], [20.0], [6.0]], np.float32)}  # 0, 125, 60 after clipping
    candidate = {"y": np.array([[-1.0], [13.0], [6.1]], np.float32)}  # 0, 125, 61
    found = measure(NUMBERS, original, candidate, truth)
    assert found.original == pytest.approx(10 / 3**0.5)
    assert found.candidate == pytest.approx(11 / 3**0.5, rel=1e-5)
    assert found.drop_percent == pytest.approx(10.0, rel=1e-4)


def test_a_perfect_original_leaves_no_room() -> None:
    truth = np.array([10.0, 20.0])
    exact, off = {"y": np.array([1.0, 2.0])}, {"y": np.array([1.0, 2.1])}
    assert measure(NUMBERS, exact, exact, truth).drop_percent == 0
    assert measure(NUMBERS, exact, off, truth).drop_percent == 100


def test_agreement_of_classes_and_of_numbers() -> None:
    classes = Metric(name=AGREEMENT, task="classification", output="y", labels=2)
    ours, theirs = np.array([[1, 0], [0, 1], [0, 1], [1, 0]]), np.array([[3, 1], [1, 3], [5, 1], [2, 1]])
    assert measure(classes, {"y": ours}, {"y": theirs}, None) == pytest.approx((1.0, 0.75, 25.0))
    numbers = Metric(name=AGREEMENT, task="regression", output="y")
    spread = np.array([-1.0, 1.0] * 50)
    found = measure(numbers, {"y": spread}, {"y": spread + 0.01}, None)
    assert found.candidate == pytest.approx(0.99)
    assert found.drop_percent == pytest.approx(1.0)


def test_without_a_reading_the_worst_output_counts() -> None:
    bare = Metric(name=AGREEMENT)
    near, far = np.arange(10.0), np.arange(10.0) + 2.9
    found = measure(bare, {"a": near, "b": near}, {"a": near, "b": far}, None)
    assert found.candidate == pytest.approx(1 - 2.9 / near.std())
    with pytest.raises(ModelError, match="the candidate has no output 'b'"):
        measure(bare, {"a": near, "b": near}, {"a": near}, None)
    with pytest.raises(ModelError, match=r"shape \[9\], the original's has \[10\]"):
        measure(bare, {"a": near}, {"a": near[:9]}, None)
    constant = np.ones(4)
    assert measure(bare, {"a": constant}, {"a": constant}, None).candidate == 1
    assert measure(bare, {"a": constant}, {"a": constant + 1e-6}, None).candidate == 0


def test_numbers_that_are_not_finite_and_wrong_shapes_are_refused() -> None:
    truth, good = np.array([0, 1]), np.eye(3)[:2]
    broken = good.copy()
    broken[1, 0] = np.nan
    with pytest.raises(ModelError, match="output 'y' of the candidate holds numbers that are not finite in 1 of 2"):
        measure(CLASSES, {"y": good}, {"y": broken}, truth)
    with pytest.raises(ModelError, match=r"shape \[2, 2\], \[prediction\] reads 3"):
        measure(CLASSES, {"y": good}, {"y": good[:, :2]}, truth)
    with pytest.raises(ModelError, match="'y' is not among"):
        measure(CLASSES, {"y": good}, {"z": good}, truth)
