"""What a person may change in an order, and what is said of what does not fit."""

from __future__ import annotations

import pytest

from millhand.errors import InputError
from millhand.language.form import MINUTES_CAP, edited
from millhand.records import WorkOrder

ORDER = WorkOrder("o", "a", "pump-3", "It hums.", "Wear.", ("Look.",), 2, 1)


@pytest.mark.parametrize("minutes", [-5, MINUTES_CAP + 1])
def test_minutes_that_cannot_be_are_named(minutes: int) -> None:
    with pytest.raises(InputError, match=f"minutes = {minutes} is not 0 to {MINUTES_CAP}"):
        edited(ORDER, {"minutes": minutes})


def test_other_faults_name_their_field() -> None:
    with pytest.raises(InputError, match="symptom"):
        edited(ORDER, {"symptom": "x" * 5000})
    assert edited(ORDER, {"minutes": 0}).minutes == 0
