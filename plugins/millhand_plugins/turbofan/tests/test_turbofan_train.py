"""Training sees the train files alone, and gives a model that the extractor can feed."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from millhand_plugins.turbofan import cmapss
from millhand_plugins.turbofan.fleet import SENSORS, Fleet

TRAIN = Path(cmapss.__file__).parent / "train.py"
# Records every file that Python opens, then runs what follows.
WATCH = """
import runpy, sys
from pathlib import Path
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
"""
LOAD = """
from millhand_plugins.turbofan import train
train.read_samples(Path(sys.argv[1]), seed=1)
"""
RUN = """
script, data, out = sys.argv[1:]
sys.argv[1:] = ["--data", data, "--out", out, "--epochs", "1"]
runpy.run_path(script, run_name="__main__")
"""
TELL = """
print()
print(*sorted({path for path in opened if "FD00" in path}), sep="\\n")
"""


@pytest.fixture
def folder(tmp_path):
    """Engines that wear from a real fleet's levels; beside the train files lie test files that must stay shut."""
    fleet, generator = Fleet.read(), np.random.default_rng(0)
    data = tmp_path / "data"
    data.mkdir()
    for subset in cmapss.SUBSETS:
        rows = []
        for unit in range(1, 8):
            life = int(generator.integers(60, 90))
            for cycle in range(1, life + 1):
                regime = cycle % len(fleet.centres)
                wear = 6 * (cycle / life) ** 3 + generator.normal(size=len(SENSORS))
                named = dict(zip(cmapss.COLUMNS[2:5], fleet.centres[regime], strict=True))
                named |= dict(zip(SENSORS, fleet.level[regime] + wear * fleet.spread[regime], strict=True))
                rows.append([unit, cycle, *(named.get(name, 0.0) for name in cmapss.COLUMNS[2:])])
        np.savetxt(data / f"train_{subset}.txt", rows)
        (data / f"test_{subset}.txt").write_text("not for training")
        (data / f"RUL_{subset}.txt").write_text("not for training")
    return data


def opened_by(code: str, *arguments: object) -> list[str]:
    command = [sys.executable, "-c", WATCH + code + TELL, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n\n")[-1].split()


def train_files(folder: Path) -> list[str]:
    return [str(folder / f"train_{subset}.txt") for subset in cmapss.SUBSETS]


def test_loading_opens_the_train_files_alone(folder):
    assert opened_by(LOAD, folder) == train_files(folder)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch comes with the extra 'train'")
def test_training_opens_the_train_files_alone(folder, tmp_path):
    assert opened_by(RUN, TRAIN, folder, tmp_path / "out") == train_files(folder)
    model = tmp_path / "out" / "models" / "turbofan-rul" / "1" / "model.onnx"
    assert 100_000 < model.stat().st_size < 1_000_000
    assert Fleet.read(tmp_path / "out" / "fleet.json").level.shape == (6, 14)
