"""What turbofan-rul is judged by: test units for the truth, training units for calibration."""

import gzip
import os
import shutil

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from millhand.errors import InputError
from millhand_plugins.turbofan import cmapss, folds, millhand_evaluations
from millhand_plugins.turbofan.extractor import FEATURE_COUNT, WINDOW_CYCLES, TurbofanExtractor

DATA = os.environ.get("MILLHAND_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="MILLHAND_DATA names no folder of data sets")
FOLDER = Path(DATA) / "cmapss"
[JUDGE] = millhand_evaluations()
TEST_CYCLES, TRAIN_CYCLES = (30, 45), (150, 200, 210)
RUL = (20.0, 140.0)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A small C-MAPSS folder of all subsets but FD003; FD002 packed. Sensors hover about a new engine's level."""
    random = np.random.default_rng(3)
    level = TurbofanExtractor()._fleet
    places = [cmapss.COLUMNS.index(f"s{n}") for n in (2, 3, 4, 7, 8, 9, 11, 12, 13, 14, 15, 17, 20, 21)]

    def write(name: str, lives: tuple[int, ...]) -> None:
        rows = []
        for unit, life in enumerate(lives, 1):
            table = np.zeros((life, 26))
            table[:, 0], table[:, 1] = unit, np.arange(1, life + 1)
            table[:, 2:5] = level.centres[0]
            table[:, places] = level.level[0] + level.spread[0] * random.normal(size=(life, len(places)))
            rows.append(table)
        np.savetxt(tmp_path / name, np.concatenate(rows), fmt="%.8g")

    for subset in ("FD001", "FD002", "FD004"):
        write(f"test_{subset}.txt", TEST_CYCLES)
        write(f"train_{subset}.txt", TRAIN_CYCLES)
        np.savetxt(tmp_path / f"RUL_{subset}.txt", RUL, fmt="%g")
    for part in ("train", "test", "RUL"):
        plain = tmp_path / f"{part}_FD002.txt"
        plain.with_name(plain.name + ".gz").write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    return tmp_path


def test_rows_and_truth(folder):
    examples = JUDGE.examples(folder)
    assert (JUDGE.model, JUDGE.metric) == ("turbofan-rul", "rmse")
    assert examples.held["features"].shape == (6, FEATURE_COUNT)
    assert examples.calibration["features"].shape == (9, FEATURE_COUNT)
    assert examples.held["features"].dtype == examples.calibration["features"].dtype == np.float32
    assert examples.truth.dtype == np.float64
    assert examples.truth.tolist() == [20.0, 125.0] * 3
    assert "6 test units (FD001, FD002, FD004)" in examples.source
    again = JUDGE.examples(folder)
    assert np.array_equal(again.calibration["features"], examples.calibration["features"])


def test_held_rows_are_the_last_cycles_of_test_units_and_calibration_is_of_training_units(folder):
    examples = JUDGE.examples(folder)
    extract = TurbofanExtractor().extract
    held, training = [], []
    for subset in ("FD001", "FD002", "FD004"):
        windows = [
            engine.window(len(engine.table), WINDOW_CYCLES) for engine in cmapss.read_engines(folder, "test", subset)
        ]
        held += [extract(window).tensors["features"] for window in windows]
        for engine in cmapss.read_engines(folder, "train", subset):
            life = len(engine.table)
            cuts = range(max(19, life - 195), life - 5)
            training.append([extract(engine.window(cut, WINDOW_CYCLES)).tensors["features"] for cut in cuts])
    assert np.array_equal(np.stack(held), examples.held["features"])
    for row, rows in zip(examples.calibration["features"], training, strict=True):
        assert (np.stack(rows) == row).all(axis=1).sum() == 1


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(InputError, match="no data is named") as caught:
        JUDGE.examples(None)
    assert "FD001, FD002 and FD004" in (caught.value.hint or "")
    (folder / "test_FD001.txt").unlink()
    (folder / "RUL_FD002.txt.gz").unlink()
    with pytest.raises(InputError, match=r"lacks test_FD001.txt, RUL_FD002.txt$"):
        JUDGE.examples(folder)
    with pytest.raises(InputError, match=r"lacks train_FD001.txt, "):
        JUDGE.examples(tmp_path / "nowhere")


def test_files_that_do_not_belong_together_are_refused(folder):
    (folder / "RUL_FD004.txt").write_text("20\n")
    with pytest.raises(InputError, match=r"test_FD004.txt has 2 units, RUL_FD004.txt has 1 lines"):
        JUDGE.examples(folder)


def test_fd003_counts_where_its_test_part_is_there(folder):
    for part in ("train", "test", "RUL"):
        shutil.copy(folder / f"{part}_FD001.txt", folder / f"{part}_FD003.txt")
    examples = JUDGE.examples(folder)
    assert len(examples.truth) == 8
    assert "FD001, FD002, FD003, FD004" in examples.source


@needs_data
def test_the_official_sets_give_the_figure_of_the_card():
    examples = JUDGE.examples(FOLDER)
    assert examples.held["features"].shape == (607, FEATURE_COUNT)
    assert examples.calibration["features"].shape == (609, FEATURE_COUNT)
    assert not {row.tobytes() for row in examples.held["features"]} & {
        row.tobytes() for row in examples.calibration["features"]
    }
    session = onnxruntime.InferenceSession(folds.MODEL_FOLDER / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    (rul,) = session.run(["rul"], dict(examples.held))
    # 9.38, 9.76 and 10.44 over 100, 259 and 248 units, of CARD.md.
    expected = np.sqrt((100 * 9.38**2 + 259 * 9.76**2 + 248 * 10.44**2) / 607)
    assert float(np.sqrt(np.mean((rul[:, 0] - examples.truth) ** 2))) == pytest.approx(expected, abs=0.01)
