"""What turbofan-rul is judged by: the official C-MAPSS test sets, which no training has opened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millhand.errors import InputError
from millhand.hookspecs import Examples
from millhand_plugins.turbofan import cmapss
from millhand_plugins.turbofan.extractor import WINDOW_CYCLES, TurbofanExtractor

RUL_CAP = 125.0
CALIBRATION_SEED = 11

Cut = tuple[cmapss.Engine, int]
"""An engine and the cycle (from 1) after which it is judged."""


class TurbofanEvaluation:
    """RMSE in flight cycles, RUL capped at 125: one answer for each unit of the test sets, after its last cycle."""

    model = "turbofan-rul"
    metric = "rmse"

    def examples(self, data: Path | None) -> Examples:
        """Held rows are test units, calibration rows are training units, each cut once as the test sets are cut.

        data: the folder of the C-MAPSS files. FD003 counts where its test part is there: it is not public everywhere.
        Raises InputError naming the files that are missing.
        """
        folder, subsets = _complete(data)
        held, truth, calibration = [], [], []
        random = np.random.default_rng(CALIBRATION_SEED)
        for subset in subsets:
            engines = cmapss.read_engines(folder, "test", subset)
            rul = cmapss.read_table(folder, f"RUL_{subset}.txt")[:, 0]
            if len(engines) != len(rul):
                raise InputError(
                    f"'{folder}': test_{subset}.txt has {len(engines)} units, RUL_{subset}.txt has {len(rul)} lines",
                    hint="take both files from the same copy of the set",
                )
            held += [(engine, len(engine.table)) for engine in engines]
            truth.append(np.minimum(rul, RUL_CAP))
            calibration += [_random_cut(engine, random) for engine in cmapss.read_engines(folder, "train", subset)]
        return Examples(
            calibration=_rows(calibration),
            held=_rows(held),
            truth=np.concatenate(truth),
            source=f"C-MAPSS, the last cycle of {len(held)} test units ({', '.join(subsets)}), RUL capped at "
            f"{RUL_CAP:g}; calibration from {len(calibration)} training units",
        )


def _complete(data: Path | None) -> tuple[Path, list[str]]:
    """The folder and the subsets that are there as a whole; FD003 may be missing."""
    if data is None:
        raise InputError("model 'turbofan-rul' is judged by the C-MAPSS files, and no data is named", hint=_HINT)
    missing = {subset: _missing(data, subset) for subset in cmapss.SUBSETS}
    wanted = [name for subset, names in missing.items() if subset != "FD003" for name in names]
    if wanted:
        raise InputError(f"'{data}' lacks {', '.join(wanted)}", hint=_HINT)
    return data, [subset for subset, names in missing.items() if not names]


_HINT = "name the folder that holds train_, test_ and RUL_ files of FD001, FD002 and FD004, plain or .gz"


def _missing(folder: Path, subset: str) -> list[str]:
    names = [f"{part}_{subset}.txt" for part in ("train", "test", "RUL")]
    return [name for name in names if not any((folder / (name + end)).is_file() for end in ("", ".gz"))]


def _random_cut(engine: cmapss.Engine, random: np.random.Generator) -> Cut:
    """As long before failure as test units are, with a history as short."""
    life = len(engine.table)
    longest = min(cmapss.LONGEST_RUL_CYCLES[engine.subset], life - cmapss.SHORTEST_HISTORY_CYCLES)
    return engine, life - int(random.integers(cmapss.SHORTEST_RUL_CYCLES, longest + 1))


def _rows(cuts: Sequence[Cut]) -> dict[str, NDArray[Any]]:
    extractor = TurbofanExtractor()
    rows = []
    for engine, cycle in cuts:
        found = extractor.extract(engine.window(cycle, WINDOW_CYCLES))
        if found is None:
            raise InputError(
                f"{engine.subset} unit {engine.unit} cannot be judged after cycle {cycle}",
                hint="the files do not hold what C-MAPSS has; take another copy of the set",
            )
        rows.append(found.tensors["features"])
    return {"features": np.stack(rows)}
