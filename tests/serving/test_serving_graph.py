"""Random graphs of transforms: the check refuses by name, or what it lets through runs as declared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import event, given, settings
from hypothesis import strategies as st

from millhand.errors import ModelError
from millhand.registry import Registry
from millhand.serving.ensemble import open_session
from millhand.serving.load_request import load_request
from millhand.serving.manifest import Manifest
from millhand.serving.repository import ModelFolder, Repository
from millhand.serving.sessions import Sessions
from millhand.serving.settings import ModelSettings, WorkerDefaults
from millhand.serving.steps import resolve_ensembles
from millhand.validation import validate

TRANSFORMS: list[tuple[str, dict[str, Any]]] = [
    ("softmax", {}),
    ("fill", {"value": 1}),
    ("normalise", {"mean": [1, 2, 3, 4]}),
    ("select", {"indices": [0, 1, 2, 3]}),
    ("slice", {"stop": 4}),
    ("resample", {"length": 4}),
    ("concat", {}),
    ("concat", {}),
    ("argmax", {}),
    ("cast", {"datatype": "INT64"}),
    ("reshape", {"shape": [2, -1]}),
]
NAMES = ("x", "a", "b", "c")


@st.composite
def graphs(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Up to five steps; most take what was made before and give a name of their own, some do not."""
    steps: list[dict[str, Any]] = []
    made = ["x"]
    count = draw(st.integers(1, 5))
    for number in range(count):
        name, options = draw(st.sampled_from(TRANSFORMS))
        sources = st.sampled_from([made[-1], made[-1], *made, *NAMES])
        inputs = {"p": draw(sources), "q": draw(sources)} if name == "concat" else {"x": draw(sources)}
        tensor = "y" if number == count - 1 else draw(st.sampled_from([f"t{number}", f"t{number}", f"t{number}", "a"]))
        made.append(tensor)
        steps.append({"transform": name, "options": options, "inputs": inputs, "outputs": {"y": tensor}})
    return steps


@settings(max_examples=200, deadline=None)
@given(steps=graphs(), rows=st.integers(1, 3))
def test_what_the_check_lets_through_runs_as_declared(steps: list[dict[str, Any]], rows: int) -> None:
    table = {
        "name": "chain",
        "description": "d",
        "licence": "MIT",
        "inputs": [{"name": "x", "shape": [-1, 4]}],
        "outputs": [{"name": "y", "shape": [-1, 4]}],
        "steps": steps,
    }
    folder = ModelFolder(Path("chain"), validate(Manifest, table, "model"), (1,))
    good, refused = resolve_ensembles({"chain": folder}, {})
    if refused:
        event("refused")
        assert isinstance(refused["chain"], ModelError)
        assert "model.toml'" in refused["chain"].message
        assert not good
        return
    event("good")
    request = load_request(folder, 1, Repository([]), Registry(), ModelSettings(), WorkerDefaults())
    x = np.random.default_rng(rows).normal(size=(rows, 4)).astype(np.float32)
    before = x.copy()
    y = open_session(request, Sessions()).run({"x": x})["y"]
    assert (y.shape, y.dtype) == ((rows, 4), np.float32)
    np.testing.assert_array_equal(x, before)
