"""The soak of benchmarks/, half a minute of it: every count that must be zero."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak_serving.py"
ZERO = (
    "kills and reloads that went wrong",
    "wrong answers",
    "hangs past the deadline",
    "failed requests without a retriable error",
    "processes left over",
    "memfds left over",
    "sockets left over",
)


@pytest.mark.long
@pytest.mark.slow
def test_kills_and_reloads_under_load_give_no_wrong_answer_and_leave_nothing() -> None:
    options = ["--minutes", "0.5", "--kill-every-s", "5", "--reload-every-s", "7"]
    run = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, timeout=110, check=False)
    assert run.stdout, run.stderr
    document = json.loads(run.stdout.splitlines()[-1])
    values = {figure["name"]: figure["value"] for figure in document["figures"]}
    said = {key: document[key] for key in ("load", "left_over", "errors")}
    assert {name: values[name] for name in ZERO} == dict.fromkeys(ZERO, 0), said
    assert values["workers killed"] >= 5
    assert values["reloads"] >= 3
    assert len(document["versions_answering"]) >= 3
    assert document["protocols"] == ["binary", "grpc", "json"]
    assert values["requests"] > 500
    assert values["answered right"] > 50
