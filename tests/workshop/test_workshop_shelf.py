"""The shelf: whole folders or none, one builder at a time, a choice that survives damage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from millhand.errors import ModelError
from millhand.testing import wait_until
from millhand.workshop.shelf import Shelf

HOLD = """
import sys, time
from pathlib import Path
from millhand.workshop.shelf import Shelf
with Shelf(Path(sys.argv[1])).claimed("pump"):
    with Shelf(Path(sys.argv[1])).staged("pump", 1, "cpu", "int8") as folder:
        (folder / "half.onnx").write_bytes(b"half")
        print("held", flush=True)
        time.sleep(60)
"""


def test_one_process_holds_a_model_and_a_killed_one_leaves_nothing(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(ModelError, match=rf"'pump' is being built already, by process {holder.pid}"),
        shelf.claimed("pump"),
    ):
        pass
    with shelf.claimed("fan"):  # another model is free
        pass
    assert len(list(tmp_path.glob("pump/1/cpu/.making-*"))) == 1
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    wait_until(lambda: not _held(shelf), "the lock of a dead process")
    assert not list(tmp_path.glob("pump/1/cpu/.making-*"))
    assert shelf.candidates("pump", 1, "cpu") == []


def _held(shelf: Shelf) -> bool:
    try:
        with shelf.claimed("pump"):
            return False
    except ModelError:
        return True
