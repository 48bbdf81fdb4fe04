"""Jobs in processes of their own: whatever a maker does, its job ends, nothing of it is left, and the cause is told."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from millhand_workbench import write

from millhand.errors import MillhandError, ModelError
from millhand.testing import wait_until
from millhand.workshop.jobs import MakeJob, RecipesAnswer, RecipesJob
from millhand.workshop.judge import PluginRef
from millhand.workshop.process import JobRunner
from millhand.workshop.recipe import Made, Recipe, Target

KIT = Path(__file__).parent / "kit"
MIB = 1 << 20
CALLER = """
import sys, msgspec
from millhand.workshop.jobs import AnyJob
from millhand.workshop.process import JobRunner
from millhand.workshop.recipe import Made
job = msgspec.json.decode(sys.argv[1], type=AnyJob)
JobRunner(None, "cpu", 1, 100).run(job, Made, on_line=lambda line: print(line, flush=True))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(KIT), os.environ.get("PYTHONPATH", "")]))
    import numpy as np

    write(tmp_path / "source.onnx", [np.eye(4, 8, dtype=np.float32), np.eye(8, 3, dtype=np.float32)])
    (tmp_path / "a/b/c/job").mkdir(parents=True)
    return tmp_path


def job(folder: Path, recipe: str) -> MakeJob:
    return MakeJob(
        plugin=PluginRef(
            module="millhand_workbench", options={"recipes": [recipe], "log": str(folder / "made.log"), "key": ""}
        ),
        maker="workbench",
        recipe=Recipe(name=recipe, precision="int8", description=""),
        model=str(folder / "source.onnx"),
        folder=str(folder / "a/b/c/job"),
        target=Target(),
        inputs={"x": ("float32", (-1, 4))},
        calibration="",
        max_batch=8,
        typical_batch=1,
        cache=str(folder),
        trial=None,
    )


def run(folder: Path, recipe: str, deadline_s: float = 60, **limits: Any) -> Made:
    return JobRunner(None, "cpu", 1, deadline_s, **limits).run(job(folder, recipe), Made)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_progress_comes_and_the_answer(folder: Path) -> None:
    lines: list[dict[str, Any]] = []
    made = JobRunner(None, "cpu", 1, 60).run(job(folder, "folded"), Made, on_line=lines.append)
    assert made == Made(artifact="model.onnx", backend="onnxruntime")
    assert (folder / "a/b/c/job/model.onnx").exists()
    assert [(line["share"], line["step"]) for line in lines if "share" in line] == [(0.1, "reading"), (1.0, "written")]


def test_what_a_library_prints_is_no_answer(folder: Path) -> None:
    assert run(folder, "noisy").artifact == "model.onnx"


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("crash", "its process died of SIGSEGV: about to crash"),
        ("raises", "ValueError: node 'conv1' has 3 inputs"),
        ("no-memory", "it ran out of memory"),
        ("nothing-written", "says that it wrote 'model.onnx', which is not there"),
    ],
)
def test_failures_are_told(folder: Path, recipe: str, words: str) -> None:
    with pytest.raises(ModelError) as error:
        run(folder, recipe)
    assert words in error.value.message
    assert error.value.hint


def test_a_hang_ends_by_deadline_with_all_its_processes(folder: Path) -> None:
    started_s = time.monotonic()
    with pytest.raises(ModelError, match="it was not done within 8 s"):
        run(folder, "hang", deadline_s=8)
    assert time.monotonic() - started_s < 60
    for pid in (folder / "hanging").read_text().split():
        wait_until(lambda pid=int(pid): gone(pid), f"the end of process {pid}")


def test_a_maker_that_looks_is_told_before_it_is_killed(folder: Path) -> None:
    with pytest.raises(ModelError, match="it was not done within 6 s"):
        run(folder, "polite", deadline_s=6)
    assert (folder / "tidied").exists()


def test_memory_beyond_the_cap_ends_it(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"it took \d+ MiB of memory, allowed are 300"):
        run(folder, "hungry", memory_bytes_cap=300 * MIB)


def test_a_table_that_is_wrong_for_the_target_is_told(folder: Path) -> None:
    plugin = PluginRef(module="millhand_workbench", options={"recipes": ["refuses"]})
    with pytest.raises(MillhandError, match="names no library"):
        JobRunner(None, "cpu", 1, 60).run(RecipesJob(plugin=plugin, target=Target()), RecipesAnswer)


def test_a_plugin_that_cannot_be_imported_is_told(folder: Path) -> None:
    with pytest.raises(MillhandError, match=r"plugin 'not_there' failed in millhand_makers: ModuleNotFoundError"):
        JobRunner(None, "cpu", 1, 60).run(
            RecipesJob(plugin=PluginRef(module="not_there"), target=Target()), RecipesAnswer
        )


def test_an_interpreter_that_is_not_there_is_told(folder: Path) -> None:
    with pytest.raises(ModelError, match="cannot be started with '/no/python'") as error:
        JobRunner(Path("/no/python"), "cpu", 1, 60).run(job(folder, "folded"), Made)
    assert "interpreter" in error.value.hint


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_when_the_caller_goes_all_go(folder: Path, number: signal.Signals) -> None:
    """The maker hangs in native code and holds the interpreter; its own child ignores SIGTERM."""
    import msgspec

    caller = subprocess.Popen(
        [sys.executable, "-c", CALLER, msgspec.json.encode(job(folder, "hang")).decode()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    hanging = folder / "hanging"
    wait_until(lambda: hanging.exists() and len(hanging.read_text().split()) == 2, "the hang")
    pids = [int(pid) for pid in hanging.read_text().split()]
    assert not any(gone(pid) for pid in pids)
    caller.send_signal(number)
    caller.wait(60)
    for pid in pids:
        wait_until(lambda pid=pid: gone(pid), f"the end of process {pid}")


def test_what_jobs_import_is_python_3_10() -> None:
    """Each file that a job loads before its maker parses as 3.10 and imports nothing that a lean worker lacks."""
    script = (
        "import sys, json, millhand.workshop.supervisor, millhand.workshop.jobs;"
        "print(json.dumps([[n, getattr(m, '__file__', None)] for n, m in sys.modules.items()]))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    loaded = dict(json.loads(run.stdout))
    own = {name: path for name, path in loaded.items() if name.startswith("millhand") and path}
    assert {"millhand.workshop.judge", "millhand.workshop.metric", "millhand.serving.lanes"} <= set(own)
    assert not {"pydantic", "asyncio", "tomllib", "jinja2", "onnxruntime", "millhand.serving.manifest"} & set(loaded)
    for path in own.values():
        tree = ast.parse(Path(path).read_text(), feature_version=(3, 10))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        assert not names & {"StrEnum", "Self", "override", "assert_never", "UTC"}, path
    light = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, millhand.workshop.supervisor; print('numpy' in sys.modules, 'msgspec' in sys.modules)",
        ],
        capture_output=True,
        check=True,
        text=True,
    )
    assert light.stdout.split() == ["False", "False"]  # it forks
