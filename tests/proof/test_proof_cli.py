"""`millhand model proof|verify|sign` and `millhand key`, on models and candidates on disk, without a daemon."""

from __future__ import annotations

import json
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cli_kit import Done, run
from proof_kit import proof_of, prove
from serving_kit import identity, scale, write_model

from millhand.cli import EXIT_CODES
from millhand.proof.document import Latency, Layer, Proof
from millhand.proof.file import read_proof
from millhand.proof.keys import new_pair, node_key, public_path
from millhand.proof.verification import Subject
from millhand.serving.repository import Repository
from millhand.workshop.recipe import Made, Recipe
from millhand.workshop.shelf import Choice, Record, Shelf


class Plant:
    """A node with two models and candidates of one, and a plant key kept elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models, self.data = folder / "models", folder / "data"
        self.config = folder / "millhand.toml"
        self.shelf = Shelf(self.data / "built")
        for version in (1, 2):
            scale(write_model(self.models, "press") / f"{version}/model.onnx", version)
        identity(write_model(self.models, "pump") / "1/model.onnx")
        self.configure()

    def configure(self, node: str = "data", **models: Any) -> None:
        lines = [f"{key} = {json.dumps(value)}" for key, value in {"paths": [str(self.models)], **models}.items()]
        places = f'[node]\ndata_dir = "{self.folder / node}"\nrun_dir = "{self.folder}/run"\n'
        self.config.write_text(places + "[models]\n" + "\n".join(lines) + "\n")

    def __call__(self, *words: str | Path) -> Done:
        return run(self.config, *words)

    def own(self, model: str, version: int) -> Subject:
        return Repository([self.models]).find(model).subject(version)

    def candidate(self, name: str, target: str = "cpu", **changes: Any) -> Subject:
        """Put a candidate of version 2 of the press on the shelf, with its proof."""
        recipe = Recipe(name=name, precision="int8", description="eight bits")
        made = Made(artifact=f"{name}.onnx", backend="onnxruntime", options={"threads": 1})
        source = self.own("press", 2).digest()
        record = Record(recipe=recipe, maker="m", made=made, source_sha256=source, sha256="", date="")
        with self.shelf.staged("press", 2, target, name) as folder:
            (folder / made.artifact).write_bytes(name.encode() * 1000)
            (folder / "made.json").write_bytes(msgspec.json.encode(record))
        subject = self.shelf.subject("press", 2, target, self.shelf.find("press", 2, target, name))
        prove(subject, self.data, **changes)
        return subject


@pytest.fixture
def plant() -> Iterator[Plant]:
    with tempfile.TemporaryDirectory(prefix="mh-", dir="/tmp") as folder:  # a path of a length that nodes have
        yield Plant(Path(folder))


def states(done: Done) -> dict[tuple[str, int, str], str]:
    return {(one["model"], one["version"], one["candidate"]): one["state"] for one in done.data}


def test_verify_tells_the_state_of_everything(plant: Plant) -> None:
    prove(plant.own("press", 2), plant.data)
    plant.candidate("int8")
    plant.candidate("int4", passed=False, reasons=("Accuracy fell by 7 %.",))
    done = plant("model", "verify", "--all")
    assert done.code == 0, done.err
    text = done.out + " ".join(done.out.split())
    for words in ("press        1  its own   unproved  there is no proof.json", "press        2  its own   proved",
                  "press        2  cpu/int8  proved", "press        2  cpu/int4  refused",
                  "the gate failed: Accuracy fell by 7 %."):  # fmt: skip
        assert words in text, done.out
    assert states(plant("model", "verify", "press", "--json")) == {
        ("press", 1, ""): "unproved", ("press", 2, ""): "proved", ("press", 2, "int8"): "proved",
        ("press", 2, "int4"): "refused",
    }  # fmt: skip
    plant.configure(require_proof=True)
    done = plant("model", "verify", "press")
    assert done.code == EXIT_CODES["error"]
    assert "model 'press' version 1 is unproved: there is no proof.json" in done.error


def test_verify_fails_where_something_was_tampered_with(plant: Plant) -> None:
    prove(plant.own("press", 1), plant.data)
    scale(plant.models / "press/1/model.onnx", 7)
    candidate = plant.candidate("int8")
    (candidate.folder / "int8.onnx").write_bytes(b"something else")
    done = plant("model", "verify", "--all")
    assert done.code == EXIT_CODES["error"]
    assert "model 'press' version 1 is refused (and 1 more): '" in done.error
    assert "is not what was proved: its SHA-256 is" in done.error and "\nTry: restore it" in done.err
    assert plant("model", "verify", "pump").code == 0


def test_a_candidate_that_failed_counts_only_where_it_serves(plant: Plant) -> None:
    plant.candidate("int4", passed=False)
    assert plant("model", "verify", "press").code == 0
    choice = Choice(candidate="int4", source_sha256="", why="", date="")
    plant.shelf.choose("press", 2, "cpu", choice)
    done = plant("model", "verify", "press")
    assert done.code == EXIT_CODES["error"] and "candidate 'int4' for cpu is refused" in done.error


def test_verify_names_folders_that_hold_no_model(plant: Plant) -> None:
    (plant.models / "pump/model.toml").write_text("name = [")
    done = plant("model", "verify", "--all")
    assert done.code == 0 and re.search(r"pump .*bad .*model.toml", done.out), done.out
    assert plant("model", "verify", "--all", "--json").data[-1]["state"] == "bad"


@pytest.mark.parametrize("words", [[], ["press", "--all"], ["pres"], ["press", "extra"]])
def test_verify_wants_one_model_or_all(plant: Plant, words: list[str]) -> None:
    done = plant("model", "verify", *words)
    assert done.code in (EXIT_CODES["usage"], EXIT_CODES["error"]) and done.err


def full(plant: Plant) -> Proof:
    layers = tuple(
        Layer(name=f"/model/encoder/layers.{i}/attention/q_proj/MatMul", operator="MatMul", precision="int8",
              error=10.0**-i) for i in range(1, 6)
    )  # fmt: skip
    latency = tuple(
        Latency(batch=batch, p50_ms=0.5, p99_ms=0.75, original_p50_ms=1.0, original_p99_ms=1.5) for batch in (1, 32)
    )
    return proof_of(
        plant.candidate("int8"),
        layers=layers, latency=latency, energy_mj=1.5, notes=tuple(f"note {i} " + "n " * 40 for i in range(5)),
        reasons=("Accuracy fell by 0.20 %, the limit is 1.2 %.", "2.00 times as quick as the original at batch 1."),
        node={"name": "press-7", "cpu": {"model": "EPYC", "instructions": ["avx2"] * 40}},
    )  # fmt: skip


def test_a_proof_fits_one_screen(plant: Plant) -> None:
    prove(plant.candidate("int8"), plant.data, **{
        key: getattr(full(plant), key) for key in ("layers", "latency", "energy_mj", "notes", "reasons", "node")
    })  # fmt: skip
    done = plant("model", "proof", "press", "--candidate", "int8")
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) <= 24, done.out
    for words in ("Passed: int8 of press, version 2, for cpu", "2.00 times as quick", "0.20 % worse, cap 1.2 %",
                  "1 ms, p99 1.5 ms  0.5 ms, p99 0.75 ms", "3.0 MiB", "1.5 mJ", "loses 10 %", "3 more notes", "press-7",
                  "Proved: signed by a key that this node trusts",
                  f"signed by node {node_key(plant.data).public.id}", "proof.json"):  # fmt: skip
        assert words in done.out, f"{words}\n{done.out}"
    data = plant("model", "proof", "press", "--candidate", "int8", "--json").data
    assert data["state"] == "proved" and data["proof"]["layers"][4]["error"] == 1e-5


def test_the_page_goes_where_it_is_asked_to(plant: Plant) -> None:
    prove(plant.own("press", 2), plant.data)
    page = plant.folder / "page.html"
    done = plant("model", "proof", "press", "--html", page)
    assert "The page is" in done.out and page.read_text().startswith("<!doctype html>")
    done = plant("model", "proof", "press", "--html", plant.folder / "nowhere/page.html")
    assert done.code == EXIT_CODES["error"] and "cannot be written: No such file" in done.error


def test_what_was_chosen_to_serve_is_shown_and_the_original_where_it_is_named(plant: Plant) -> None:
    for name in ("int4", "int8"):
        plant.candidate(name)
    source = plant.own("press", 2).digest()
    plant.shelf.choose("press", 2, "cpu", Choice(candidate="int8", source_sha256=source, why="", date=""))
    assert "int8 of press, version 2, for cpu" in plant("model", "proof", "press").out
    prove(plant.own("press", 2), plant.data)
    assert plant("model", "proof", "press", "--json").data["candidate"] == "int8"
    assert plant("model", "proof", "press", "--candidate", "original", "--json").data["candidate"] == ""
    plant.shelf.choose("press", 2, "cpu", Choice(candidate="", source_sha256=source, why="", date=""))
    assert plant("model", "proof", "press", "--json").data["candidate"] == ""


def test_what_cannot_be_shown_is_named(plant: Plant) -> None:
    plant.candidate("int8")
    plant.candidate("int8", "sm80", executed=False, reasons=("Built for sm80, which is not here.",))
    plant.candidate("int4")
    cases = {
        ("press",): ("version 2: there is no proof.json", "--candidate: int4, int8"),
        ("press", "--version", "3"): ("model 'press' has no version 3", "its folder holds 1, 2"),
        ("press", "--candidate", "int2"): ("has no candidate 'int2'", "there are: cpu/int4, cpu/int8, sm80/int8"),
        ("press", "--candidate", "int8"): ("several candidates are called 'int8'", "one of cpu, sm80"),
        ("press", "--candidate", "int4", "--target", "sm80"): ("no candidate 'int4' for sm80", "there are"),
        ("press", "--target", "cpu"): ("--target without --candidate", "name the candidate"),
        ("pres",): ("model 'pres' is not known; did you mean 'press'", "the repository has"),
    }
    for words, (message, hint) in cases.items():
        done = plant("model", "proof", *words)
        assert done.code == EXIT_CODES["error"] and message in done.error and hint in done.error, done.err
    done = plant("model", "proof", "press", "--candidate", "int8", "--target", "sm80")
    assert done.out.startswith("Refused: ") and "it was never run" in " ".join(done.out.split())
    assert "\nNever run: int8 of press, version 2, for sm80\n" in done.out
    (plant.shelf.place("press", 2, "cpu") / "int4/proof.json").write_text("{")
    done = plant("model", "proof", "press", "--candidate", "int4")
    assert done.code == EXIT_CODES["error"] and "cannot be read as a proof" in done.error


def test_a_plants_signature_lets_a_spare_node_take_over(plant: Plant) -> None:
    away = plant.folder / "drive"
    made = plant("key", "new", away)
    assert made.code == 0 and str(away / "plant.public.pem") in made.out.replace("\n", "")
    prove(plant.own("press", 2), plant.data)
    candidate = plant.candidate("int8")
    for words in ([], ["--candidate", "int8"]):
        done = plant("model", "sign", "press", "--key", away / "plant.pem", *words)
        assert done.code == 0 and "Signed by plant key" in done.out, done.err
    assert [one.role for one in read_proof(candidate.folder / "proof.json").signatures] == ["node", "plant"]
    assert "plant" in (candidate.folder / "proof.html").read_text()

    plant.configure("spare", built_dir=str(plant.shelf.root), require_proof=True)
    done = plant("model", "verify", "press")
    assert done.code == EXIT_CODES["error"]
    assert "signed only by keys that this node does not trust" in " ".join(done.out.split())
    plant.configure("spare", built_dir=str(plant.shelf.root), trusted_keys=[str(away / "plant.public.pem")])
    found = states(plant("model", "verify", "press", "--json"))
    assert (found["press", 2, ""], found["press", 2, "int8"]) == ("proved", "proved")


def test_only_what_is_proved_is_signed_and_never_with_the_nodes_own_key(plant: Plant) -> None:
    key = new_pair(plant.folder / "drive", "plant").path
    done = plant("model", "sign", "press", "--key", key)
    assert done.code == EXIT_CODES["error"] and "is unproved, and is not signed: there is no proof.json" in done.error
    prove(plant.own("press", 2), None)
    assert (
        "is unproved, and is not signed: its proof.json is not signed"
        in plant("model", "sign", "press", "--key", key).error
    )
    prove(plant.own("press", 2), plant.data)
    before = (plant.models / "press/2/proof.json").read_bytes()
    done = plant("model", "sign", "press", "--key", plant.data / "keys/node.pem")
    assert "is this node's own key" in done.error and "millhand key new" in done.error
    scale(plant.models / "press/2/model.onnx", 9)
    assert "is refused, and is not signed" in plant("model", "sign", "press", "--key", key).error
    key.chmod(0o644)
    assert "can be used by others" in plant("model", "sign", "press", "--key", key).error
    assert (plant.models / "press/2/proof.json").read_bytes() == before


def test_keys_are_shown_and_exported(plant: Plant) -> None:
    assert "none yet: the first proof makes it" in plant("key", "show").out
    exported = plant("key", "export")
    key = node_key(plant.data).public
    assert exported.out.encode() == key.pem() and exported.code == 0
    assert plant("key", "export", "--out", plant.folder / "node.pem").code == 0
    assert (plant.folder / "node.pem").read_bytes() == key.pem()
    new_pair(plant.folder / "drive", "plant")
    trusted = public_path(plant.folder / "drive", "plant")
    plant.configure(trusted_keys=[str(trusted)])
    rows = plant("key", "show", "--json").data
    assert [row["role"] for row in rows] == ["node", "trusted"] and rows[0]["key"] == key.id and rows[1]["key"]
    trusted.write_text("damaged")
    done = plant("key", "show")
    assert done.code == EXIT_CODES["error"] and "holds no readable public key" in done.error and key.id in done.out
    done = plant("model", "verify", "--all")
    assert done.code == EXIT_CODES["error"] and "holds no readable public key" in done.error
    (plant.data / "keys/node.pem").chmod(0o640)
    assert "can be used by others" in plant("key", "show").error


def test_the_plants_key_is_never_made_on_the_node(plant: Plant) -> None:
    for folder in (plant.data, plant.data / "keys", plant.folder / "drive" / ".." / "data" / "x"):
        done = plant("key", "new", folder)
        assert done.code == EXIT_CODES["error"] and "this node's own place" in done.error
    assert "no name for a file" in plant("key", "new", plant.folder / "drive", "--name", "../plant").error
    done = plant("key", "new", plant.folder / "drive", "--name", "north", "--json")
    private = Path(done.data["private"])
    assert private.name == "north.pem" and stat.S_IMODE(private.stat().st_mode) == 0o600
    assert "is there already" in plant("key", "new", plant.folder / "drive", "--name", "north").error


def test_a_lost_private_key_is_told(plant: Plant) -> None:
    node_key(plant.data)
    (plant.data / "keys/node.pem").unlink()
    done = plant("key", "show")
    assert done.code == EXIT_CODES["error"] and "node.pem' cannot be read" in done.error
    assert plant("key", "export").code == 0, "the public one is there"
    (plant.data / "keys/node.public.pem").unlink()
    assert plant("key", "export").code == 0
