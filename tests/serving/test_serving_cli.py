"""`model list` and `model show` against a real daemon's calls on a real control socket."""

from __future__ import annotations

import asyncio
import json
import os
import threading

import pytest
from click.testing import CliRunner
from serving_kit import KIT, backends, scale, write_model

from millhand.cli import root as millhand
from millhand.control import ControlClient, ControlServer
from millhand.errors import ControlError, ModelError
from millhand.serving.pool import ModelPool
from millhand.serving.repository import Repository
from millhand.serving.settings import ModelSettings, WorkerDefaults


@pytest.fixture
def config(root, tmp_path):
    scale(write_model(root, "scale") / "1/model.onnx", 2)
    path = tmp_path / "millhand.toml"
    run = tmp_path / "run"
    path.write_text(f'[node]\nrun_dir = "{run}"\ndata_dir = "{tmp_path}"\n[models]\npaths = ["{root}"]\n')
    return path


@pytest.fixture
def daemon(config, root, tmp_path):
    """A pool and its control socket on a loop in a thread of its own, as the CLI's other side."""
    started, stop, loop = threading.Event(), asyncio.Event(), asyncio.new_event_loop()

    async def serve():
        settings = ModelSettings(paths=(root,))
        pool = ModelPool(Repository([root]), settings, [WorkerDefaults()], backends(), tmp_path / "run")
        await pool.start()
        control = ControlServer(tmp_path / "run/control.sock", pool.control_handlers())
        await control.start()
        started.set()
        await stop.wait()
        await control.stop()
        await pool.stop()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert started.wait(60)
    yield
    loop.call_soon_threadsafe(stop.set)
    thread.join(30)
    loop.close()


@pytest.fixture
def accelerated(root, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.fspath(KIT), prepend=os.pathsep)
    artifact = write_model(root, "quick", backend="proving") / "1/model.json"
    artifact.parent.mkdir()
    artifact.write_text("")


def run(config, *words, stdin=None):
    result = CliRunner().invoke(millhand, ["--config", str(config), *words], input=stdin)
    if result.exception is not None:
        raise result.exception
    return result.output


def test_model_list_and_show(config, daemon):
    assert json.loads(run(config, "model", "list", "--json"))[0]["state"] == "ready"
    assert "scale  ready" in run(config, "model", "list")
    text = run(config, "model", "show", "scale")
    assert "serves   1 of 1, policy latest" in text and "inputs   x     FP32      [-1, 2]" in text
    with pytest.raises(ModelError, match="model 'scal' is not known; did you mean 'scale'"):
        run(config, "model", "show", "scal")


def test_without_a_daemon_the_repository_is_read(config):
    text = run(config, "model", "list")
    assert "scale  unloaded" in text and "The daemon does not run" in text
    assert json.loads(run(config, "model", "show", "scale", "--json"))["available"] == [1]
    with pytest.raises(ControlError, match="no daemon answers"):
        run(config, "predict", "scale", "-i", "-", stdin='{"inputs": []}')


STEPS = '[[steps]]\nmodel = "scale"\noutputs = { y = "t" }\n[[steps]]\ntransform = "fill"\ninputs = { x = "t" }\n'


def test_an_ensembles_steps_are_shown(root, config, daemon, tmp_path):
    folder = root / "chain"
    folder.mkdir()
    text = (root / "scale/model.toml").read_text().replace('"scale"', '"chain"')
    lines = [line for line in text.splitlines() if not line.startswith(("backend", "artifact"))]
    (folder / "model.toml").write_text("\n".join(lines) + "\n" + STEPS)
    client = ControlClient(tmp_path / "run/control.sock")
    client.call("model.load", model="chain")
    shown = run(config, "model", "show", "chain")
    assert "STEPS      VERSION  TIME OF A BATCH" in shown
    assert "1 (scale)  1" in shown
    (folder / "model.toml").write_text("\n".join(lines) + "\n" + STEPS.replace('"t" }\n', '"tt" }\n', 1))
    with pytest.raises(ModelError, match=r"step 2 \(fill\): 'x' takes tensor 't'"):
        client.call("model.load", model="chain")
    assert "'x' takes tensor 't'" in " ".join(run(config, "model", "list").split())


def test_show_tells_what_a_load_proved_of_its_accelerator(config, accelerated, daemon):
    text = " ".join(run(config, "model", "show", "quick").split())
    told = "gpu 1: 2 of 3 nodes on Fast, answers within 1e-06 of the CPU's, batches of up to 1, 8 graph"
    assert f"{told} " in text
    proof = json.loads(run(config, "model", "show", "quick", "--json"))["accelerator"]["1"]
    assert proof["gpu_nodes"] == 2 and proof["max_difference"] == 1.25e-6
    assert not any(line.startswith("gpu ") for line in run(config, "model", "show", "scale").splitlines())
