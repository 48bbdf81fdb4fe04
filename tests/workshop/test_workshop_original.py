"""Proofs of models as they are: on the shelf, signed, believed by the repository, and taken up under require_proof."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from millhand_workbench import weights, write
from workshop_kit import CLASSES, Node

from millhand.config import load_config
from millhand.control import ControlClient
from millhand.errors import ControlError, InputError
from millhand.proof.digest import digest
from millhand.proof.file import read_proof
from millhand.proof.page import page
from millhand.serving.repository import Repository
from millhand.testing import wait_until
from millhand.workshop.background import Task, carry_out
from millhand.workshop.boards import target_named
from millhand.workshop.report import read_report
from millhand.workshop.site import open_site

CHAIN = """
[[steps]]
model = "pump"
outputs = { y = "scores" }

[[steps]]
transform = "softmax"
inputs = { x = "scores" }
outputs = { y = "y" }
"""


def repository(node: Node) -> Repository:
    return Repository.from_config(load_config(node.config_path), [])


def state(node: Node, model: str = "pump") -> tuple[str, str]:
    models = repository(node)
    verdict = models.verdict(models.find(model), 1)
    return verdict.state, verdict.reason


def strict(node: Node, *recipes: str, **options: Any) -> None:
    node.configure(*recipes, **options)
    node.config_path.write_text(node.config_path.read_text().replace("[models]\n", "[models]\nrequire_proof = true\n"))


def prove(node: Node, *words: str | Path, model: str = "pump") -> Any:
    return node.millhand("model", "prove", model, *words)


def test_where_every_candidate_fails_the_original_is_proved_and_serves_under_require_proof(node: Node) -> None:
    strict(node, "damaged", "crash")
    node.start("run")
    control = ControlClient(node.run_dir / "control.sock")
    wait_until(lambda: "unproved" in reason(control), "the refusal", 60)
    done = node.millhand("model", "build", "pump", "--data", node.rows())
    assert done.code == 0, done.err
    assert "original ...\noriginal           passed" in done.out
    assert "millhand model load pump serves it" in " ".join(done.out.split())
    assert node.millhand("model", "verify", "pump").code == 0
    assert state(node) == ("proved", "")
    assert control.call("model.load", model="pump")["versions"] == [1]
    before = (node.built / "pump/1/original/proof.json").read_bytes()
    report = node.build("--data", node.rows()).data
    assert (report["original"]["state"], report["original"]["made"]) == ("passed", False), "it held"
    assert (node.built / "pump/1/original/proof.json").read_bytes() == before
    compared = node.millhand("model", "compare", "pump").out
    assert "(original)" in compared and "0.99" in compared

    node.model(seed=7)  # another artifact in its place
    node.millhand("model", "load", "pump")
    assert "is refused" in reason(control) and "is not what was proved" in reason(control)
    assert control.call("model.show", model="pump")["versions"] == [1], "what was loaded serves on"
    refused = node.millhand("model", "verify", "pump")
    assert refused.code == 1
    assert "restore it; where the change was meant, millhand model prove pump" in refused.error
    assert prove(node, "--data", node.rows()).code == 0
    assert node.millhand("model", "load", "pump").code == 0


def reason(control: ControlClient) -> str:
    try:
        found = control.call("model.show", model="pump")
    except ControlError:
        return ""
    return " ".join([found["reason"], *(detail["reason"] for detail in found["details"])])


def test_the_proof_says_what_was_measured_and_nothing_of_a_candidate(node: Node) -> None:
    strict(node)
    done = prove(node, "--data", node.rows())
    assert done.code == 0, done.err
    text = " ".join(done.out.split())
    for part in (
        "Proved: signed by a key", "Measured: the original of pump, version 1, for cpu", "99.00 %", "batch 16",
        "its accuracy is 0.99", "pump/1/original/proof.json", "millhand model load pump",
    ):  # fmt: skip
        assert part in text, part
    assert "candidate" not in text.lower() and "worse" not in text
    proof = read_proof(node.built / "pump/1/original/proof.json")
    assert proof.sha256 == digest({"model.onnx": node.folder / "models/pump/1/model.onnx"})
    assert [found.batch for found in proof.latency] == [1, 16]
    assert proof.memory_bytes == proof.original_memory_bytes and proof.executed and proof.passed
    assert proof.score is not None and (proof.score.rows, proof.score.candidate) == (200, 0.99)
    assert (node.built / "pump/1/original/proof.html").read_text() == page(proof)
    for word in (">Candidate</", "beside the original", "faster", "slower", "How large"):
        assert word not in page(proof).replace(">Candidate</th><td>none", ""), word
    assert node.millhand("model", "proof", "pump").code == 0
    assert sorted(path.name for path in (node.folder / "models/pump/1").iterdir()) == ["model.onnx"], "left as it was"


def test_a_plants_key_signs_it_where_it_lies(node: Node) -> None:
    prove(node, "--data", node.rows())
    node.millhand("key", "new", node.folder / "plant")
    done = node.millhand("model", "sign", "pump", "--key", node.folder / "plant/plant.pem")
    assert done.code == 0, done.err
    signed = read_proof(node.built / "pump/1/original/proof.json").signatures
    assert [signature.role for signature in signed] == ["node", "plant"]
    assert not (node.folder / "models/pump/1/proof.json").exists()


def test_without_a_truth_it_does_not_say_how_right_it_is(node: Node) -> None:
    rows = node.folder / "plain.npz"
    with np.load(node.rows()) as file:
        np.savez(rows, x=file["x"])
    done = prove(node, "--data", rows, "--json")
    proof = done.data["proof"]
    assert (done.data["state"], proof["score"]) == ("proved", None)
    assert "how right they are is not known without a truth" in proof["reasons"][0]
    assert "'plain.npz' of the owner; sha256 " in proof["notes"][0]


@pytest.mark.parametrize("what", ["not finite", "no rows", "no such hardware", "damaged"])
def test_what_cannot_be_measured_gets_no_proof(node: Node, what: str) -> None:
    artifact = node.folder / "models/pump/1/model.onnx"
    words: list[str | Path] = [] if what == "no rows" else ["--data", node.rows()]
    if what == "not finite":
        write(artifact, [np.full_like(matrix, np.nan) for matrix in weights(artifact).values()])
    elif what == "damaged":
        artifact.write_bytes(b"not a graph")
    elif what == "no such hardware":
        words += ["--target", "a100"]
    done = prove(node, *words)
    assert done.code != 0
    expected = {
        "not finite": "output 'y' of the original holds numbers that are not finite in 200 of 200 rows",
        "no rows": "there are no rows to judge candidates of 'pump' by",
        "no such hardware": "target 'sm80' is not in this machine",
        "damaged": "model.onnx",
    }
    assert expected[what] in done.error
    assert state(node)[0] == "unproved"


def test_an_ensemble_is_proved_when_it_and_all_that_it_uses_are(node: Node) -> None:
    strict(node)
    folder = node.folder / "models/chain"
    folder.mkdir()
    head = (node.folder / "models/pump/model.toml").read_text().replace('"pump"', '"chain"')
    folder.joinpath("model.toml").write_text(head.replace(CLASSES, CHAIN + CLASSES))
    rows = node.rows()
    first = prove(node, "--data", rows, model="chain")
    assert first.code != 0
    assert "model 'pump', which 'chain' uses, is not proved: there are no rows" in first.error
    assert "millhand model prove pump --data FILE" in first.error
    assert prove(node, "--data", rows).code == 0
    done = prove(node, "--data", rows, "--json", model="chain")
    assert done.code == 0, done.err
    assert done.data["proof"]["score"]["candidate"] == 0.99
    assert done.data["proof"]["notes"][0].startswith("Measured with the own artifacts of: pump version 1, ")
    assert state(node, "chain") == ("proved", "")
    assert node.millhand("model", "verify", "--all").code == 0
    node.model(seed=7)
    assert state(node, "chain")[0] == "unproved"
    assert "it uses model 'pump' version 1, which is refused" in state(node, "chain")[1]
    with (folder / "model.toml").open("a") as file:
        file.write("\n")
    assert state(node, "chain")[0] == "refused"


# ---- what a build remembers, and what it takes of other boards -----------------------------------------------------


def test_what_is_made_anew_in_the_background_is_judged_by_the_owners_rows(node: Node) -> None:
    node.configure("folded", key="library 1")
    rows = node.rows()
    data = node.build("--data", rows).data["data"]
    node.configure("folded", key="library 2")
    task = Task(agent=0, config=str(node.config_path), model="pump", version=1, target="cpu", recipe="folded")
    report = carry_out(task)
    assert (report.data, report.data_path) == (data, str(rows))
    assert read_report(node.place(), "pump") == report
    assert json.loads((node.place() / "folded/made.json").read_text())["made"]["key"] == {"library": "library 2"}
    rows.unlink()
    with pytest.raises(InputError, match=r"'.*rows.npz' does not exist"):
        carry_out(task)


def test_a_build_for_another_board_takes_the_batches_of_its_profile(node: Node) -> None:
    toml = node.folder / "models/pump/model.toml"
    toml.write_text(toml.read_text().replace("max_batch = 16", "max_batch = 1000"))
    site = open_site(load_config(node.config_path))
    folder = site.repository.find("pump")
    batches = {
        word: site.request(folder, 1, target_named(word, site.targets, site.profiles)).max_batch
        for word in ("cpu", "a30", "a100", "sm80")
    }
    named = {profile.name: profile.worker.max_batch for profile in site.profiles}
    assert batches == {
        "cpu": named["generic-cpu"], "a30": named["a30"], "a100": named["a100-40gb"],
        "sm80": 1000,  # a chip is no board: the model's own word
    }  # fmt: skip
    assert len(set(batches.values())) == 4
