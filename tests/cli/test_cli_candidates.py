"""What `model list` and `model show` say of candidates, against a real agent."""

from __future__ import annotations

import shutil

import pytest
from candidate_kit import Workshop, half
from serving_kit import scale, write_model


@pytest.fixture
def workshop(node):
    """The node's shelf, and a model `grow` that doubles."""
    folder = write_model(node.root, "grow")
    scale(folder / "1/model.onnx", 2)
    found = Workshop(node.root, node.agent.folder / "data")
    yield found
    node.millhand("model", "unload", "grow")
    shutil.rmtree(folder)
    shutil.rmtree(found.shelf.root / "grow", ignore_errors=True)


def says(node):
    done = node.millhand("predict", "grow", "--json", "-f", "csv", stdin=b"1,1\n")
    return done.data["outputs"][0]["data"][0] if done.code == 0 else done.error


def line(text, label):
    return next(line for line in text.splitlines() if line.startswith(label))


def test_list_and_show_name_the_candidate_that_serves(node, workshop):
    workshop.serve("grow", lambda path: half(path, 3))
    assert node.millhand("model", "load", "grow").out == "grow serves version 1.\n"
    assert says(node) == 3
    assert line(node.millhand("model", "list").out, "grow").split()[1:4] == ["ready", "1", "(half)"]
    shown = node.millhand("model", "show", "grow").out
    assert line(shown, "serves") == "serves   1 (half) of 1, policy latest"
    assert line(shown, "choice") == "choice   grow 1 for cpu: half"
    assert node.millhand("model", "show", "grow", "--json").data["choices"][0]["candidate"] == "half"


def test_list_and_show_say_why_it_does_not(node, workshop):
    workshop.serve("grow", lambda path: half(path, 3), signed=False)
    node.millhand("model", "load", "grow")
    assert says(node) == 2
    listed = node.millhand("model", "list").out
    assert line(listed, "grow").split()[:3] == ["grow", "ready", "1"]
    told = "Model grow: candidate 'half' of version 1 does not serve: it is unproved: its proof.json is not signed"
    assert told in " ".join(listed.split())
    checked = [found for found in node.millhand("check", "--json").data["findings"] if found["name"] == "model grow"]
    assert [found["level"] for found in checked] == ["warning"]
    assert checked[0]["hint"].startswith("millhand model build grow")
    shown = " ".join(node.millhand("model", "show", "grow").out.split())
    assert "choice grow 1 for cpu: not half: it is unproved: its proof.json is not signed" in shown


def test_show_says_that_the_original_was_the_best(node, workshop):
    workshop.choose("grow", "", why="no candidate was quicker")
    node.millhand("model", "load", "grow")
    shown = node.millhand("model", "show", "grow").out
    assert line(shown, "choice") == "choice   grow 1 for cpu: the original, no candidate was quicker"
