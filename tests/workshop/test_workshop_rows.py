"""Rows: how they are split, and what is refused, by file, array, value and remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millhand.errors import InputError
from millhand.pipeline.recorded import Recorded, source_of
from millhand.serving.manifest import Manifest
from millhand.workshop.rows import Parts, Rows, checked, owner_parts, recorded_parts

COUNT = 400


def manifest(task: str = "classification", **changes: Any) -> Manifest:
    reading = {"task": task, "output": "y", "labels": ["healthy", "worn", "broken"] if task == "classification" else []}
    table: dict[str, Any] = {
        "name": "pump",
        "description": "of a test",
        "licence": "Apache-2.0",
        "inputs": [{"name": "x", "shape": [-1, 4]}, {"name": "n", "datatype": "INT32", "shape": [-1]}],
        "outputs": [{"name": "y", "shape": [-1, 3]}],
        "prediction": reading,
    }
    return Manifest.model_validate({**table, **changes})


def arrays(count: int = COUNT, **changes: Any) -> dict[str, Any]:
    random = np.random.default_rng(0)
    given = {
        "x": random.normal(size=(count, 4)).astype(np.float32),
        "n": np.arange(count, dtype=np.int32),
        "truth": random.integers(0, 3, count),
    }
    given |= changes
    return {name: array for name, array in given.items() if array is not None}


def owner(tmp_path: Path, model: Manifest | None = None, **changes: Any) -> Rows:
    path = tmp_path / "rows.npz"
    np.savez(path, **arrays(**changes))
    model = model or manifest()
    return checked(model, owner_parts(path, model))


def numbers(part: Any) -> set[int]:
    return set(part["n"].tolist())


def test_no_row_lies_on_two_sides_and_the_truth_goes_with_its_row(tmp_path: Path) -> None:
    given = arrays()
    rows = owner(tmp_path)
    calibration, trial, held = numbers(rows.calibration), numbers(rows.trial), numbers(rows.held)
    assert not calibration & trial
    assert not calibration & held
    assert not trial & held
    assert calibration | trial | held == set(range(COUNT))
    assert len(calibration) == COUNT // 4
    assert rows.truth is not None
    assert rows.truth.tolist() == given["truth"][rows.held["n"]].tolist()
    assert rows.trial_truth is not None
    assert rows.trial_truth.tolist() == given["truth"][rows.trial["n"]].tolist()
    assert (rows.held["x"] == given["x"][rows.held["n"]]).all()


def test_the_split_is_the_same_each_time_and_the_digest_tells_the_data(tmp_path: Path) -> None:
    first, again = owner(tmp_path), owner(tmp_path)
    assert numbers(first.held) == numbers(again.held)
    assert first.source == again.source
    other = arrays()["truth"]
    other[7] = (other[7] + 1) % 3
    assert owner(tmp_path, truth=other).source != first.source
    assert "sha256 " in first.source


def test_one_machines_rows_stay_on_one_side(tmp_path: Path) -> None:
    machines = np.array([f"machine {number % 7}" for number in range(COUNT)])
    rows = owner(tmp_path, group=machines)
    sides = [{machines[n] for n in numbers(part)} for part in (rows.calibration, {"n": rows.held["n"]})]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == set(machines)
    assert "split by group" in rows.source


def test_a_machine_with_most_rows_leaves_some_to_judge_by(tmp_path: Path) -> None:
    machines = np.where(np.arange(COUNT) < 100, "small", "large")
    rows = owner(tmp_path, group=machines)
    assert rows.calibration["n"].size
    assert rows.held["n"].size


def test_a_folder_of_arrays_is_read_too(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for name, array in arrays().items():
        np.save(folder / f"{name}.npy", array)
    assert checked(manifest(), owner_parts(folder, manifest())).source == (
        owner(tmp_path).source.replace("'rows.npz'", "'rows'")
    )


def test_without_truth_the_originals_own_answers_judge(tmp_path: Path) -> None:
    rows = owner(tmp_path, truth=None)
    assert (rows.metric.name, rows.truth) == ("agreement", None)
    bare = owner(tmp_path, manifest(prediction=None), truth=None)
    assert (bare.metric.name, bare.metric.task) == ("agreement", "")


def test_the_metric_reads_as_prediction_says(tmp_path: Path) -> None:
    reading = {"task": "regression", "output": "y", "scale": 125.0, "low": 0.0}
    rows = owner(tmp_path, manifest(prediction=reading), truth=np.linspace(0, 125, COUNT))
    metric = rows.metric
    assert (metric.name, metric.scale, metric.low, metric.high) == ("rmse", 125.0, 0.0, None)
    assert rows.truth is not None
    assert rows.truth.dtype == np.float64


NAN = arrays()["x"]
NAN[3, 2] = np.nan
LATE = arrays()["truth"].copy()
LATE[5] = 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": None}, "array 'x' is missing"),
        ({"z": np.ones(COUNT)}, "array 'z' is no input of model 'pump'"),
        ({"x": arrays()["x"].astype(np.float64)}, "array 'x' is float64, expected float32"),
        ({"x": np.ones((COUNT, 5), np.float32)}, "array 'x' has shape [400, 5], expected [-1, 4]"),
        ({"x": np.ones((10, 4), np.float32)}, "the arrays have {'x': 10, 'n': 400} rows"),
        ({"x": NAN}, "array 'x' is nan at [3, 2]"),
        ({"x": np.full((COUNT, 4), np.inf, np.float32)}, "array 'x' is inf at [0, 0]"),
        ({"truth": arrays()["truth"][:9]}, "array 'truth' has shape [9], expected [400]"),
        ({"truth": LATE}, "in row"),
        ({"truth": np.array(["worn"] * COUNT)}, "expected a whole number from 0 to 2"),
        ({"group": np.zeros(COUNT)}, "array 'group' has one value only"),
        ({"count": 100}, "25 calibration rows, at least 32 are needed"),
        ({"count": 130, "group": np.arange(130) < 70}, "held rows, at least 64 are needed"),
        ({"count": 0}, "0 held rows, at least 64 are needed"),
        ({"x": np.array([{}] * COUNT, dtype=object)}, "is no .npz of plain arrays"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        owner(tmp_path, **changes)
    assert words in error.value.message
    assert "rows.npz" in error.value.message
    assert error.value.hint


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04cut off", b"x,y\n1,2\n"])
def test_files_that_are_no_arrays(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "rows.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"rows\.npz") as error:
        owner_parts(path, manifest())
    assert error.value.hint


def test_truth_needs_a_reading(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no \[prediction\], which 'accuracy' needs"):
        owner(tmp_path, manifest(prediction=None))


def test_texts_cannot_be_calibrated(tmp_path: Path) -> None:
    words = [{"name": "w", "datatype": "BYTES", "shape": [-1]}]
    with pytest.raises(InputError, match="input 'w' is BYTES"):
        owner(tmp_path, manifest(inputs=words), x=None, n=None, w=np.array(["a"] * COUNT))


def test_an_evaluations_rows_are_checked_like_the_owners() -> None:
    given = arrays()
    truth = given.pop("truth")
    half = {name: array[:200] for name, array in given.items()}
    rest = {name: array[200:] for name, array in given.items()}
    rows = checked(manifest(), Parts("plugin 'p'", half, rest, truth[200:], "lives"), "accuracy")
    assert numbers(rows.calibration) == set(range(200))
    with pytest.raises(InputError, match="plugin 'p': held rows: array 'x' is float64"):
        checked(manifest(), Parts("plugin 'p'", half, {**rest, "x": rest["x"].astype(float)}, truth[200:], "lives"))
    with pytest.raises(InputError, match="metric 'rmse' does not go with a classification"):
        checked(manifest(), Parts("plugin 'p'", half, rest, truth[200:], "lives"), "rmse")


def test_of_recorded_rows_the_oldest_calibrate(tmp_path: Path) -> None:
    model, given = manifest(), arrays()
    given.pop("truth")
    given["x"][[10, 20]] = np.nan  # windows with gaps
    order = np.random.default_rng(3).permutation(COUNT)
    recorded = Recorded(
        inputs={name: array[order] for name, array in given.items()},
        window_end_ns=order.astype(np.int64),
        assets=["press"] * COUNT,
        seen=COUNT,
        source=source_of(model),
    )
    path = tmp_path / "pump.npz"
    path.write_bytes(recorded.encode())
    rows = checked(model, recorded_parts(path, model))
    assert max(numbers(rows.calibration)) < min(numbers(rows.held) | numbers(rows.trial))
    assert not {10, 20} & (numbers(rows.calibration) | numbers(rows.held) | numbers(rows.trial))
    assert rows.metric.name == "agreement"
    other = manifest(window={"length": 3, "step": 1, "signals": ["a"]})
    with pytest.raises(InputError, match="had other inputs, window or features"):
        recorded_parts(path, other)
