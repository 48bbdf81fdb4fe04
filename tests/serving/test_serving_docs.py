"""The HTTP part of docs/serving.md against the code: its table of paths, and its examples on a node."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import helper, numpy_helper
from serving_kit import save_onnx, value

from millhand.serving.http.messages import _STATUSES
from millhand.serving.http.openapi import document

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/serving.md").read_text()
HTTP = PAGE[PAGE.index("## HTTP") : PAGE.index("## gRPC")]
MODEL = (ROOT / "docs/models.md").read_text()


def blocks(language):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", HTTP, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def test_the_table_names_every_path():
    rows = re.findall(r"^\| `(/\S+)` \| (\w+) \|", HTTP, re.MULTILINE)
    paths = {
        (path, method.upper())
        for path, operations in document({})["paths"].items()
        for method in operations
        if method != "parameters"
    }
    assert set(rows) == paths


def test_the_table_names_every_status_code():
    rows = {int(code) for code in re.findall(r"^\| (\d{3}) \|", HTTP, re.MULTILINE)}
    described = {int(code) for path in document({})["paths"].values() for code in _responses(path)}
    assert {status for _, status in _STATUSES} | described <= rows


def _responses(path):
    return [code for key, operation in path.items() if key != "parameters" for code in operation["responses"]]


@pytest.fixture
async def node(root, served, tmp_path):
    """(URL, folder with a token): a node with the model of docs/models.md, whose logits are sums of its input."""
    folder = root / "press-health"
    folder.mkdir()
    manifest = next(block for block in re.findall(r"```toml\n(.*?)```", MODEL, re.DOTALL) if "press-health" in block)
    (folder / "model.toml").write_text(manifest)
    weight = numpy_helper.from_array(np.tile(np.array([[1, 0.5, -0.5]], np.float32), (120, 1)), "w")
    nodes = [helper.make_node("Flatten", ["input"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["logits"])]
    save_onnx(folder / "1/model.onnx", nodes, [value("input", ["n", 2, 60])], [value("logits", ["n", 3])], [weight])
    (tmp_path / "token").write_text("secret\n")
    _, client, _ = await served({"admin_token_file": tmp_path / "token"})
    return str(client.base_url), tmp_path


def run(command, cwd):
    done = subprocess.run(command, cwd=cwd, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


async def test_the_python_example(node):
    url, folder = node
    (code,) = blocks("python")
    printed = await asyncio.to_thread(run, [sys.executable, "-c", code.replace("http://localhost:8080", url)], folder)
    assert printed == b"[[120.  60. -60.]]\n"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_the_shell_examples(node):
    url, folder = node
    answers = []
    for block in blocks(""):
        for command in re.split(r"\n(?=curl|python3)", block):
            script = command.replace("localhost:8080", url).replace("python3 ", f"{sys.executable} ")
            answers.append(await asyncio.to_thread(run, ["bash", "-c", script], folder))
    assert json.loads(answers[0]) == json.loads(blocks("json")[0])
    binary = (folder / "answer.bin").read_bytes()
    assert np.frombuffer(binary[-12:], np.float32).tolist() == [7140, 3570, -3570]
    loaded, version, index = (json.loads(answer) for answer in answers[-3:])
    assert loaded == version == {}
    assert [(entry["name"], entry["state"]) for entry in index] == [("press-health", "READY")]
