"""`millhand model load|unload|versions` against a real agent."""

from __future__ import annotations

import shutil

import pytest
from serving_kit import scale, write_model

from millhand.cli import EXIT_CODES


@pytest.fixture
def rise(node):
    """A model of three versions (times 1, 2, 3), which serves none."""
    folder = write_model(node.root, "rise")
    for version in (1, 2, 3):
        scale(folder / f"{version}/model.onnx", version)
    yield folder
    if node.agent.call("model.list"):
        node.millhand("model", "unload", "rise")
    shutil.rmtree(folder)


def states(node):
    done = node.millhand("model", "versions", "rise", "--json")
    assert done.code == 0, done.err
    return {version["version"]: version["state"] for version in done.data}


def says(node, *words):
    done = node.millhand("predict", "rise", "--json", "-f", "csv", *words, stdin=b"1,1\n")
    return done.data["outputs"][0]["data"][0] if done.code == 0 else done.error


def test_load_and_unload(node, rise):
    assert "is not loaded" in says(node) or "is not known" in says(node)
    assert node.millhand("model", "load", "rise").out == "rise serves version 3.\n"
    assert says(node) == 3
    assert node.millhand("model", "load", "rise", "--version", "1").out == "rise serves version 1.\n"
    assert (says(node), states(node)) == (1, {1: "ready", 2: "unloaded", 3: "unloaded"})
    assert node.millhand("model", "unload", "rise", "--version", "1").out == "rise is unloaded.\n"
    assert "unloaded" in says(node)
    assert node.millhand("model", "load", "rise", "--json").data["versions"] == [3]
    assert node.millhand("model", "unload", "rise", "--json").data["versions"] == []


def test_versions_say_why_not(node, rise):
    node.millhand("model", "load", "rise")
    text = node.millhand("model", "versions", "rise").out
    assert [line.split()[:3] for line in text.splitlines()[1:]] == [
        ["1", "unloaded", "unproved"],
        ["2", "unloaded", "unproved"],
        ["3", "ready", "unproved"],
    ]
    assert "policy latest: 3 is newer" in text and "KiB" in text
    scale(rise / "4/model.onnx", 4)
    assert "new on disk: millhand model load" in node.millhand("model", "versions", "rise").out
    (found,) = [v for v in node.millhand("model", "versions", "rise", "--json").data if v["version"] == 4]
    assert found["bytes"] == (rise / "4/model.onnx").stat().st_size
    assert found["proof_reason"] == "there is no proof.json"
    node.millhand("model", "load", "rise")
    shutil.rmtree(rise / "4")
    assert "4  ready     gone from disk" in node.millhand("model", "versions", "rise").out


def test_a_load_that_fails_keeps_what_serves(node, rise):
    node.millhand("model", "load", "rise")
    (rise / "5").mkdir()
    (rise / "5/model.onnx").write_text("no model")
    done = node.millhand("model", "load", "rise")
    assert done.code == EXIT_CODES["error"]
    assert "cannot be loaded" in done.error and "; version 3 serves on" in done.error and "\nTry: " in done.error
    assert says(node) == 3
    assert states(node)[5] == "failed"
    text = " ".join(node.millhand("model", "versions", "rise").out.split())
    assert "Version 5: '" in text and "cannot be loaded" in text, "told in full below the table"


def test_what_is_not_there(node, rise):
    assert "did you mean 'rise'?" in node.millhand("model", "load", "rize").error
    done = node.millhand("model", "load", "rise", "--version", "9")
    assert "has no version 9; no version of it serves" in done.error and "holds 1, 2, 3" in done.error
    assert node.millhand("model", "unload", "nosuch").code == EXIT_CODES["error"]
    assert node.millhand("model", "versions", "nosuch").code == EXIT_CODES["error"]
    assert node.millhand("model", "load", "rise", "--version", "0").code == EXIT_CODES["usage"]


def test_folders_that_are_passed_over_are_told(node, rise):
    scale(rise / "4/modle.onnx", 4)
    scale(rise / "v5/model.onnx", 5)
    done = node.millhand("model", "load", "rise")
    reasons = [
        "4/ has no 'model.onnx'; it holds modle.onnx",
        "v5/ is no version: its name must be a number from 1 on, such as 5",
    ]
    text = done.out.replace("\n  ", " ")
    assert text == "rise serves version 3.\n" + "".join(f"Warning: {reason}\n" for reason in reasons)
    assert node.agent.log().count(f"WARNING millhand.serving: model 'rise': {reasons[0]}") == 1
    shown = " ".join(node.millhand("model", "versions", "rise").out.split())
    assert "4 passed over" in shown and reasons[0] in shown
    assert f"Version v5: {reasons[1]}" in shown, "told in full below the table"
    assert reasons[0] in " ".join(node.millhand("model", "list").out.split())
    assert reasons[0] in node.millhand("model", "load", "rise", "--version", "4").error
    checked = " ".join(node.millhand("check").out.split())
    assert f"WARN model rise: {reasons[0]}; {reasons[1]} Try: rename the folder" in checked
    shutil.move(rise / "4/modle.onnx", rise / "4/model.onnx")
    shutil.move(rise / "v5", rise / "5")
    assert "no version" not in node.millhand("model", "versions", "rise").out
    assert node.millhand("model", "load", "rise").out == "rise serves version 5.\n"


def test_a_model_without_model_toml(node):
    folder = node.root / "new"
    scale(folder / "1/model.onnx", 1)
    try:
        done = node.millhand("model", "load", "new")
        assert f"'{folder}' has no model.toml" in done.error and "Try: write one" in done.error
        assert "has no model.toml" in " ".join(node.millhand("model", "list").out.split())
        assert "FAIL model new: " in " ".join(node.millhand("check").out.split())
    finally:
        shutil.rmtree(folder)


def test_rows_that_are_too_many_name_what_rules(node, rise, tmp_path):
    """A CPU's profile allows fewer rows than a model.toml that says nothing; with and without a daemon."""
    node.millhand("model", "load", "rise")
    key = "[worker] max_batch in profile 'generic-cpu', see docs/hardware.md"
    config = tmp_path / "millhand.toml"
    config.write_text(f'[node]\nrun_dir = "{tmp_path}"\n[models]\npaths = ["{node.root}"]\n')
    for words in ((), ("--config", config)):
        shown = node.millhand(*words, "model", "show", "rise").out
        assert f"at most 16 rows a batch, by {key}" in " ".join(shown.split())
    done = node.millhand("model", "bench", "rise", "--rows", "17")
    assert f"takes at once, 16 Try: ask for fewer rows, or raise {key}" in done.error.replace("\n", " ")
    (rise / "model.toml").write_text("max_batch = 4\n" + (rise / "model.toml").read_text())
    assert node.millhand("model", "load", "rise").code == 0
    assert "at most 4 rows a batch, by max_batch in model.toml" in node.millhand("model", "show", "rise").out


def test_without_a_daemon(node, rise, tmp_path):
    config = tmp_path / "millhand.toml"
    config.write_text(f'[node]\nrun_dir = "{tmp_path}"\n[models]\npaths = ["{node.root}"]\n')
    text = node.millhand("--config", config, "model", "versions", "rise").out
    assert text.count("the daemon does not run") == 3
    assert "no daemon answers" in node.millhand("--config", config, "model", "load", "rise").error
    assert "no daemon answers" in node.millhand("--config", config, "model", "bench", "rise").error
