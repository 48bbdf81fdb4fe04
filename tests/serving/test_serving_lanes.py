"""The optional abilities of backends and sessions, as a worker uses them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving_kit import action

from millhand.errors import ModelError, WorkerError
from millhand.serving.batcher import Request
from millhand.serving.lanes import LoadedModel, LoadRequest

SECOND_NS = 1_000_000_000


@pytest.fixture
def model(tmp_path: Path) -> LoadedModel:
    """A model whose session waits for a file named `gate` beside its artifact."""
    specs = {"inputs": {"x": ("float32", (-1, 2))}, "outputs": {"y": ("float32", (-1, 2))}}
    artifact = str(tmp_path / "model.json")
    request = LoadRequest(
        model="m", version=1, artifact=artifact, backend="declared", module="millhand_faulty", max_batch=8, **specs
    )
    return LoadedModel(request)


def run(model: LoadedModel, *deadlines_ns: int) -> list[Any]:
    requests = [Request(action(0), 1, deadline_ns) for deadline_ns in deadlines_ns]
    outcomes = []
    for inference in model.run(requests):
        model.count_inference(inference)
        failed = isinstance(inference.outcome, Exception)
        outcomes += [inference.outcome] * len(inference.requests) if failed else [o for _, o in inference.parts()]
    return outcomes


def test_a_model_whose_outside_is_away_loads_and_comes_good(model: LoadedModel, tmp_path: Path) -> None:
    assert model.session.inputs == {"x": ("float32", (-1, 2))}
    (failed,) = run(model, 0)
    assert isinstance(failed, WorkerError)
    assert failed.retriable
    (tmp_path / "gate").touch()
    (answered,) = run(model, 0)
    np.testing.assert_array_equal(answered["y"], [[0, 0]])


def test_a_session_gets_the_latest_deadline_of_its_batch(model: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "gate").touch()
    now_ns = time.monotonic_ns()
    first, second = run(model, now_ns + 10 * SECOND_NS, now_ns + 100 * SECOND_NS)
    assert 90_000 < first["y"][0, 0] <= 100_000
    assert 90_000 < second["y"][0, 0] <= 100_000
    assert all(answer["y"][0, 0] == 0 for answer in run(model, now_ns + 10 * SECOND_NS, 0))


def test_an_outside_that_fails_is_not_asked_again_for_each_request(model: LoadedModel) -> None:
    before = model.stats.session["runs"]
    assert all(isinstance(outcome, WorkerError) for outcome in run(model, 0, 0, 0))
    assert model.stats.session["runs"] == before + 1
    assert model.stats.failed == 3


def proving(artifact: Path) -> LoadRequest:
    x = {"x": ("float32", (-1, 2))}
    y = {"y": ("float32", (-1, 2))}
    return LoadRequest(
        model="m", version=1, artifact=str(artifact), backend="proving", module="millhand_faulty", max_batch=8,
        inputs=x, outputs=y,
    )  # fmt: skip


def test_a_session_proves_its_accelerator_before_anything_runs(tmp_path: Path) -> None:
    artifact = tmp_path / "model.json"
    artifact.write_text("")
    model = LoadedModel(proving(artifact))
    assert model.session._session.runs == ["prove", "run"]
    assert model.session._session.told == (["x"], 8)
    assert model.metadata()["proof"]["provider"] == "Fast"


def test_a_session_that_cannot_prove_its_accelerator_fails_the_load_and_is_closed(tmp_path: Path) -> None:
    artifact = tmp_path / "model.json"
    artifact.write_text("fall back")
    with pytest.raises(ModelError, match="ran on the CPU"):
        LoadedModel(proving(artifact))
    assert (tmp_path / "closed").exists()
