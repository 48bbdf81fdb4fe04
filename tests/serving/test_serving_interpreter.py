"""Workers under a Python that is not the agent's, as on JetPack 6, whose TensorRT comes for Python 3.10 alone.

FOREIGN_PYTHON names one with NumPy, msgspec, pluggy and onnxruntime: `make foreign-python` makes it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest

from millhand.testing import Agent

INTERPRETER = os.environ.get("FOREIGN_PYTHON", "")
TOML = "[http]\nport = 0\n[plugins.rig]\n[models]\nload = ['rig-fault', 'rig-wave']\nload_timeout_s = 120\n"
pytestmark = pytest.mark.skipif(not INTERPRETER, reason="FOREIGN_PYTHON names no other interpreter")


def _asked(agent: Agent, *words: str, text: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "millhand", "--json", "--config", os.fspath(agent.config_path), *words]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, check=True)
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def _answers(agent: Agent) -> list[list[float]]:
    """What both models say, of numbers from a seed."""
    random = np.random.default_rng(5)
    asked = {"rig-fault": ("features", (1, 44)), "rig-wave": ("waveform", (1, 2, 2048))}
    said = []
    for model, (name, shape) in asked.items():
        data = random.normal(size=shape).astype(np.float32)
        tensor = {"name": name, "datatype": "FP32", "shape": shape, "data": data.ravel().tolist()}
        answer = _asked(agent, "predict", model, "--format", "json", text=json.dumps({"inputs": [tensor]}))
        assert answer["predictions"][0]["label"]
        said.append(answer["outputs"][0]["data"])
    return said


def test_shipped_models_answer_as_they_do_under_the_agents_own_python(
    millhand_agent: Callable[..., Agent],
) -> None:
    foreign = millhand_agent(f"{TOML}interpreter = '{INTERPRETER}'\n")
    own = millhand_agent(TOML)
    assert foreign.process is not None
    workers = [
        process.cmdline()
        for process in psutil.Process(foreign.process.pid).children(recursive=True)
        if "millhand.serving.worker" in process.cmdline()
    ]
    assert workers and all(words[0] == INTERPRETER for words in workers)
    for here, there in zip(_answers(own), _answers(foreign), strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-4)
    assert foreign.stop() == 0
