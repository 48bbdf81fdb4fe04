"""What the workshop tests share: a node with a wasteful net, rows for it, and the command line to it."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from millhand_workbench import weights, write

from millhand.cli import main

KIT = Path(__file__).parent

SIZE, LABELS = 64, 3
MODEL = """
name = "{name}"
description = "made by a test"
licence = "Apache-2.0"
max_batch = 16
inputs = [{{ name = "x", shape = [-1, 64] }}]
outputs = [{{ name = "y", shape = [-1, 3] }}]
"""
CLASSES = """
[prediction]
task = "classification"
output = "y"
labels = ["healthy", "worn", "broken"]
softmax = true
"""
CONFIG = """
[node]
id = "test-node"
data_dir = "{folder}/data"
run_dir = "{run}"
profile = "generic-cpu"
[models]
paths = ["{folder}/models"]
[workshop]
latency_s = 0.2
{workshop}
[http]
port = 0
[plugins.workbench]
log = "{folder}/made.log"
{options}
"""


@dataclass
class Done:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """What it said on stderr, each message on one line."""
        return " ".join(self.err.split())

    def outcome(self, name: str) -> dict[str, Any]:
        return next(outcome for outcome in self.data["outcomes"] if outcome["name"] == name)


@dataclass
class Node:
    """A node of its own, and the command line to it."""

    folder: Path
    run_dir: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def config_path(self) -> Path:
        return self.folder / "millhand.toml"

    @property
    def built(self) -> Path:
        return self.folder / "data/built"

    @property
    def made(self) -> list[str]:
        """What makers were set to, in order."""
        log = self.folder / "made.log"
        return log.read_text().split() if log.exists() else []

    def configure(self, *recipes: str, workshop: str = "", **options: Any) -> None:
        table = {"recipes": list(recipes), **options}
        lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in table.items())
        text = CONFIG.format(folder=self.folder, run=self.run_dir, workshop=workshop, options=lines)
        self.config_path.write_text(text)

    def place(self, model: str = "pump", target: str = "cpu") -> Path:
        return self.built / model / "1" / target

    def start(self, *words: str | Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "millhand", "--config", str(self.config_path), *map(str, words)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.processes.append(process)
        return process

    def millhand(self, *words: str | Path) -> Done:
        """The command line in this process, which is as real and quicker."""
        out, err = io.StringIO(), io.StringIO()
        code = 0
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main(["--config", str(self.config_path), *map(str, words)])
        except SystemExit as end:
            code = int(end.code or 0)
        return Done(code, out.getvalue(), err.getvalue())

    def build(self, *words: str | Path, model: str = "pump") -> Done:
        """`model build --json`, which must come through."""
        done = self.millhand("model", "build", model, "--json", *words)
        assert done.code == 0, done.err
        return done

    def model(self, name: str = "pump", seed: int = 0, reading: str = CLASSES) -> Path:
        """Write a model whose net is two matrices of which one would do; returns its artifact."""
        folder = self.folder / "models" / name
        (folder / "1").mkdir(parents=True, exist_ok=True)
        (folder / "model.toml").write_text(MODEL.format(name=name) + reading)
        random = np.random.default_rng(seed)
        wide = random.normal(size=(SIZE, 4096)).astype(np.float32)
        write(folder / "1/model.onnx", [wide, random.normal(size=(4096, LABELS)).astype(np.float32)])
        return folder / "1/model.onnx"

    def rows(self, count: int = 400, name: str = "rows.npz", **arrays: Any) -> Path:
        """Rows whose truth is what the original says, but for one in fifty."""
        random = np.random.default_rng(1)
        x = random.normal(size=(count, SIZE)).astype(np.float32)
        first, second = weights(self.folder / "models/pump/1/model.onnx").values()
        truth = (x @ first @ second).argmax(axis=1)
        truth[::50] = (truth[::50] + 1) % LABELS
        path = self.folder / name
        np.savez(path, **{"x": x, "truth": truth, **arrays})
        return path
