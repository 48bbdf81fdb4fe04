"""Builds from the command line to the shelf, with real makers, real ONNX Runtime and real processes."""

from __future__ import annotations

import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
from millhand_workbench import weights
from workshop_kit import CLASSES, SIZE, Node

from millhand.control import ControlClient
from millhand.errors import ControlError
from millhand.pipeline.recorded import Recorded, recorded_path, source_of
from millhand.proof.digest import artifact_files, digest
from millhand.proof.file import read_proof
from millhand.proof.signature import Keyring
from millhand.proof.verification import verify
from millhand.serving.manifest import read_manifest
from millhand.testing import wait_until
from millhand.workshop.shelf import Choice, Record, Shelf

X = np.random.default_rng(9).normal(size=(4, SIZE)).astype(np.float32)


def states(done: Any) -> dict[str, str]:
    return {outcome["name"]: outcome["state"] for outcome in done.data["outcomes"]}


def choice(node: Node, target: str = "cpu") -> str | None:
    found = Shelf(node.built).choice("pump", 1, target)
    return None if found is None else found.candidate


# ---- what a build is for --------------------------------------------------------------------------------------------


def test_a_deliberately_damaged_quantisation_is_refused_and_the_original_keeps_serving(node: Node) -> None:
    node.configure("damaged")
    node.start("run")
    control = ControlClient(node.run_dir / "control.sock")
    wait_until(lambda: _serves(control), "the model", 30)
    before = _ask(control)
    done = node.build("--data", node.rows())
    outcome = done.outcome("damaged")
    assert outcome["state"] == "refused"
    assert re.search(r"The accuracy is worse by \d+ %: 0\.99 to 0\.\d+ on 200 rows; 1\.2 % are allowed", outcome["why"])
    assert done.data["chosen"] == ""
    assert done.data["why"] == "The original serves: no candidate passed."
    assert choice(node) == ""
    assert (_ask(control) == before).all()
    assert control.call("model.show", model="pump")["versions"] == [1]
    shelf = Shelf(node.built)
    (candidate,) = shelf.candidates("pump", 1, "cpu")
    subject = shelf.subject("pump", 1, "cpu", candidate)
    verdict = verify(subject, Keyring(node.folder / "data"))
    assert verdict.state == "refused"
    assert "worse" in verdict.reason


def test_what_is_chosen_serves_at_once_where_a_daemon_runs(node: Node) -> None:
    node.start("run")
    control = ControlClient(node.run_dir / "control.sock")
    wait_until(lambda: _serves(control), "the model", 30)
    before = _ask(control)
    done = node.millhand("model", "build", "pump", "--data", node.rows())
    assert done.code == 0, done.err
    assert "The daemon has loaded pump again and serves folded." in done.out
    assert control.call("model.show", model="pump")["details"][0]["candidates"] == ["folded"]
    after = _ask(control)
    assert not (after == before).all()  # rounded otherwise: it is another net
    assert np.allclose(after, before, rtol=1e-3, atol=1e-2)


def _serves(control: ControlClient) -> bool:
    try:
        return bool(control.call("model.show", model="pump")["versions"])
    except ControlError:
        return False


def _ask(control: ControlClient) -> Any:
    tensor = {"name": "x", "datatype": "FP32", "shape": list(X.shape), "data": X.ravel().tolist()}
    answer = control.call("model.infer", model="pump", request={"inputs": [tensor]})
    return np.array(answer["outputs"][0]["data"], np.float32)


def test_the_fastest_that_passes_is_chosen_and_nothing_is_made_twice(node: Node) -> None:
    rows = node.rows()
    done = node.build("--data", rows)
    assert states(done) == {"folded": "passed", "half": "passed", "damaged": "refused"}
    assert done.data["chosen"] == choice(node) == "folded"
    assert "times as fast as the original at batches of 1" in done.data["why"]
    proof = read_proof(node.place() / "folded/proof.json")
    assert proof.score is not None
    assert (proof.score.rows, proof.score.original, proof.score.drop_percent) == (200, 0.99, 0.0)
    assert [latency.batch for latency in proof.latency] == [1, 16]
    assert all(latency.p50_ms < latency.original_p50_ms for latency in proof.latency)
    assert proof.bytes < proof.source_bytes / 100
    assert proof.memory_bytes is not None
    assert proof.energy_mj is None
    assert proof.node["profile"] == "generic-cpu"
    assert {"millhand", "python", "onnxruntime"} <= set(proof.versions)
    verdict = verify(_subject(node, "folded"), Keyring(node.folder / "data"))
    assert (verdict.state, len(verdict.signers)) == ("proved", 1)

    before = {path: path.stat().st_mtime_ns for path in node.place().glob("*/*")}
    again = node.build("--data", rows)
    assert node.made == ["folded", "damaged", "half"]
    assert [outcome["made"] for outcome in again.data["outcomes"]] == [False] * 3
    assert {path: path.stat().st_mtime_ns for path in node.place().glob("*/*")} == before

    other = node.build("--data", node.rows(360, "others.npz"))  # other rows: judged again, not made again
    assert node.made == ["folded", "damaged", "half"]
    assert other.data["candidates"]["folded"]["score"]["rows"] == 180


def _subject(node: Node, name: str) -> Any:
    shelf = Shelf(node.built)
    return shelf.subject("pump", 1, "cpu", shelf.find("pump", 1, "cpu", name))


def made(node: Node, rows: Path) -> list[str]:
    """What one build more sets makers to."""
    before = len(node.made)
    assert set(states(node.build("--data", rows)).values()) == {"passed"}
    return node.made[before:]


def test_what_was_damaged_or_begins_from_something_new_is_made_anew(node: Node) -> None:
    node.configure("folded", "again")
    rows = node.rows()
    assert made(node, rows) == ["folded", "again"]
    (node.place() / "again/model.onnx").write_bytes(b"tampered with")
    (node.place() / "folded/made.json").unlink()
    assert made(node, rows) == ["folded", "again"]
    node.model(seed=5)
    assert made(node, node.rows()) == ["folded", "again"]


def test_other_options_and_other_keys_make_anew(node: Node) -> None:
    node.configure("folded", key="library 1")
    rows = node.rows()
    assert made(node, rows) == ["folded"]
    assert made(node, rows) == []
    record = msgspec.json.decode((node.place() / "folded/made.json").read_bytes(), type=Record)
    tied = msgspec.structs.replace(record, made=msgspec.structs.replace(record.made, key={"library": "library 0"}))
    (node.place() / "folded/made.json").write_bytes(msgspec.json.encode(tied))
    assert made(node, rows) == ["folded"]
    node.configure("folded", key="library 1", seed=7)
    assert made(node, rows) == ["folded"]


def test_fresh_makes_anew_and_only_keeps_what_was_proved_before(node: Node) -> None:
    rows = node.rows()
    assert node.build("--data", rows, "--only", "half").data["chosen"] == "half"
    assert node.build("--data", rows, "--only", "folded").data["chosen"] == "folded"
    done = node.build("--data", rows, "--only", "half", "--fresh")
    assert node.made == ["half", "folded", "half"]
    assert done.data["chosen"] == "folded"


# ---- what goes wrong is a candidate's own failure -------------------------------------------------------------------


def test_failures_of_candidates_are_told_and_the_rest_goes_on(node: Node) -> None:
    wrong = ("crash", "raises", "no-memory", "nan", "narrow", "nothing-written", "after-crash", "orphan")
    node.configure(*wrong, "folded")
    done = node.build("--data", node.rows())
    assert done.data["chosen"] == "folded"
    why = {outcome["name"]: f"{outcome['state']}: {outcome['why']}" for outcome in done.data["outcomes"]}
    assert why["crash"] == "failed: its process died of SIGSEGV: about to crash"
    assert why["raises"] == "failed: ValueError: node 'conv1' has 3 inputs"
    assert why["no-memory"] == "failed: it ran out of memory"
    assert why["nan"].startswith("failed: output 'y' of the candidate holds numbers that are not finite in 200 of 200")
    assert why["narrow"].startswith("failed: model 'pump': output 'y' has shape")
    assert why["nothing-written"].startswith("failed: the maker says that it wrote")
    assert why["after-crash"] == "failed: it begins from 'crash', which failed"
    assert why["orphan"] == "not tried: it begins from 'nothing', which no maker has for this target"
    assert not list(node.place().glob(".making-*"))


def test_a_hang_fails_by_deadline(node: Node) -> None:
    node.configure("hang", "folded", workshop="deadline_s = 8")
    done = node.build("--data", node.rows())
    assert done.outcome("hang")["why"] == "it was not done within 8 s"
    assert done.data["chosen"] == "folded"


def test_a_maker_may_try_its_work_on_rows_that_are_not_the_proofs(node: Node) -> None:
    node.configure("judged", "fitted")
    rows = node.rows()
    node.build("--data", rows)
    first, second = read_proof(node.place() / "judged/proof.json").notes
    assert re.fullmatch(r"first False \d+\.\d+", first)
    assert second == "second True 0.000"
    (note,) = read_proof(node.place() / "fitted/proof.json").notes
    with np.load(rows) as file:
        from millhand.workshop.rows import owner_parts

        manifest = read_manifest(node.folder / "models/pump")
        calibration = owner_parts(rows, manifest).calibration["x"]
        assert len(file["x"]) == 400
    assert note == f"100 rows, mean {calibration.mean():.6f}, batch 1 of 16"


def test_a_budget_is_kept(node: Node) -> None:
    node.configure("folded", "slow")
    done = node.build("--data", node.rows(), "--budget", "5")
    assert states(done) == {"folded": "passed", "slow": "not tried"}
    assert "it takes about 30 min, and of the budget's 5 are 4.9 left" in done.outcome("slow")["why"]
    node.configure("folded", "half", "polite")
    done = node.build("--data", node.rows(), "--budget", "0.35", "--only", "polite", "--only", "folded")
    assert states(done)["polite"] == "failed"
    assert re.search("not done within|budget was used up", done.outcome("polite")["why"])


def test_jobs_run_with_the_interpreter_of_the_workers(node: Node) -> None:
    """JetPack's TensorRT is for Python 3.10 only; FOREIGN_PYTHON names one with NumPy, msgspec, pluggy and, for this
    test, onnxruntime and onnx."""
    interpreter = os.environ.get("FOREIGN_PYTHON")
    if not interpreter:
        pytest.skip("FOREIGN_PYTHON names no other interpreter")
    node.configure("folded", "judged", "crash")
    text = node.config_path.read_text().replace("[models]\n", f'[models]\ninterpreter = "{interpreter}"\n')
    node.config_path.write_text(text)
    done = node.build("--data", node.rows())
    assert states(done) == {"folded": "passed", "judged": "passed", "crash": "failed"}
    version = subprocess.run([interpreter, "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    assert done.data["candidates"]["folded"]["versions"]["python"] == version


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_rows_of_the_plugin_that_knows_the_model(node: Node) -> None:
    rows = node.rows()
    node.model("known")
    node.configure("folded", examples=str(rows))
    done = node.build(model="known")
    proof = done.data["candidates"]["folded"]
    assert proof["score"]["rows"] == 200
    assert proof["score"]["data"].startswith("rows of the plugin; sha256 ")
    named = node.build("--data", rows, model="known")  # arrays that are named as the inputs are the owner's own
    assert named.data["data"].startswith("'rows.npz' of the owner")


def test_rows_that_this_node_has_recorded(node: Node) -> None:
    manifest = read_manifest(node.folder / "models/pump")
    x = np.random.default_rng(2).normal(size=(300, SIZE)).astype(np.float32)
    path = recorded_path(node.folder / "data", "pump")
    path.parent.mkdir(parents=True)
    ends = np.arange(300, dtype=np.int64)
    path.write_bytes(Recorded({"x": x}, ends, ["press"] * 300, 300, source_of(manifest)).encode())
    done = node.build()
    assert done.data["data"].startswith("recorded on this node; sha256 ")
    assert done.data["chosen"] == "folded"
    score = done.data["candidates"]["folded"]["score"]
    assert (score["metric"], score["original"], score["rows"]) == ("agreement", 1.0, 150)
    assert states(done)["damaged"] == "refused"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model", "build", "pump"), "no plugin brings any, and nothing is recorded on this node"),
        (("model", "build", "pump", "--data", "nothing.npz"), "'nothing.npz' does not exist"),
        (("model", "build", "pumps"), "model 'pumps' is not known; did you mean 'pump'?"),
        (("model", "build", "pump", "--target", "a101"), "target 'a101' is not known"),
        (("model", "build", "pump", "--version", "3"), "model 'pump' has no version 3"),
        (("model", "build", "pump", "--data", "{rows}", "--only", "fold"), "recipe 'fold' is not known for cpu"),
        (("model", "compare", "pump"), "nothing was built of model 'pump' for cpu"),
    ],
)
def test_what_cannot_be_built_says_what_to_do(node: Node, words: tuple[str, ...], message: str) -> None:
    rows = node.rows()
    done = node.millhand(*(str(rows) if word == "{rows}" else word for word in words))
    assert done.code == 1
    assert message in done.error
    assert "Try: " in done.err
    assert max(map(len, done.err.splitlines())) <= 80
    assert not list(node.built.glob("*/*/*/.making-*"))


def test_models_that_makers_cannot_begin_from(node: Node) -> None:
    for name, changes in (("chain", '[[steps]]\nmodel = "pump"\n'), ("lines", 'artifact = "model.txt"\n')):
        folder = node.folder / "models" / name
        (folder / "1").mkdir(parents=True)
        (folder / "1/model.txt").write_text("no net")
        text = (node.folder / "models/pump/model.toml").read_text().replace('"pump"', f'"{name}"')
        at = text.index("inputs =")
        whole = text.replace(CLASSES, "") + changes if name == "chain" else text[:at] + changes + text[at:]
        (folder / "model.toml").write_text(whole)
    chain, lines = (node.millhand("model", "build", name) for name in ("chain", "lines"))
    assert "model 'chain' is an ensemble" in chain.error
    assert "Try: build pump" in chain.error
    assert "makers begin from .onnx files, not from 'model.txt'" in lines.error


def test_without_makers_it_is_said_what_to_install(node: Node) -> None:
    node.configure("refuses")
    done = node.millhand("model", "build", "pump", "--data", node.rows())
    assert done.code == 1
    assert "no maker has a recipe for 'pump' on cpu; plugin 'workbench': the table" in done.error


# ---- hardware that is not here --------------------------------------------------------------------------------------


def test_for_hardware_that_is_not_here_candidates_are_made_and_never_chosen(node: Node) -> None:
    node.configure("folded", "fitted", "engine")
    done = node.build("--target", "a100")
    assert states(done) == {"folded": "built", "engine": "built", "fitted": "not tried"}
    assert "it needs rows to calibrate with: there are no rows" in done.outcome("fitted")["why"]
    assert done.data["target"] == "sm80"
    assert not done.data["executed"]
    assert choice(node, "sm80") is None
    proof = read_proof(node.place(target="sm80") / "folded/proof.json")
    assert (proof.executed, proof.passed, proof.score) == (False, False, None)
    assert "was built for sm80 and has never run" in proof.reasons[0]
    text = node.millhand("model", "compare", "pump", "--target", "sm80").out
    assert "nothing was run, and nothing was chosen" in " ".join(text.split())
    made = list(node.made)

    # The same shelf on a node with that chip (its runtime is the CPU's here): proved, not made again.
    script = NODE_WITH_THE_CHIP.format(config=str(node.config_path), rows=str(node.rows()))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["engine:passed:False", "fitted:passed:True", "folded:passed:False"]
    assert node.made == [*made, "fitted"]
    assert choice(node, "sm80") in ("folded", "engine", "fitted")


NODE_WITH_THE_CHIP = """
from pathlib import Path
from millhand.workshop.listener import Silence
from millhand.config import load_config
from millhand.workshop.build import Order, build
from millhand.workshop.recipe import Target
from millhand.workshop.site import open_site
site = open_site(load_config(Path({config!r})))
target = Target(name="sm80", accelerator="cpu", compute_capability="8.0", precisions=("fp16", "int8"))
report = build(site, Order(model="pump", target=target, data=Path({rows!r})), Silence())
print(*sorted(f"{{o.name}}:{{o.state}}:{{o.made}}" for o in report.outcomes))
"""


def test_what_others_brought_onto_the_shelf_is_proved_without_its_maker(node: Node) -> None:
    rows = node.rows()
    node.build("--data", rows, "--only", "folded")
    for proof in node.place().glob("*/proof.json"):
        proof.unlink()
    node.configure("half")
    done = node.build("--data", rows)
    assert states(done) == {"half": "passed", "folded": "passed"}
    assert done.data["chosen"] == "folded"
    assert node.made == ["folded", "half"]


def test_quantize_makes_no_engines(node: Node) -> None:
    node.configure("engine", "half")
    done = node.millhand("model", "quantize", "pump", "--json", "--data", node.rows())
    assert states(done) == {"half": "passed"}


# ---- two at once, and kill -9 ---------------------------------------------------------------------------------------


def test_a_second_build_of_the_same_model_is_refused(node: Node) -> None:
    node.configure("polite")
    rows = node.rows()
    first = node.start("model", "build", "pump", "--data", rows)
    wait_until(lambda: node.made == ["polite"], "the first build")
    second = node.millhand("model", "build", "pump", "--data", rows)
    assert second.code == 1
    assert f"model 'pump' is being built already, by process {first.pid}" in second.error
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 130
    assert not list(node.place().glob(".making-*"))
    assert not _left_over(node)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_kill_9_at_any_moment_leaves_old_or_new(node: Node, seed: int) -> None:
    """Killed at seeded moments: a first build (even seeds), and one that replaces what serves (odd seeds)."""
    node.configure("folded", "slow", "half", seed=0)
    rows, moments = node.rows(), random.Random(seed)
    started_s = time.monotonic()
    node.start("model", "build", "pump", "--data", rows).communicate()
    whole_s = time.monotonic() - started_s
    assert choice(node)
    if seed % 2:
        node.configure("folded", "slow", "half", seed=seed)  # all is made anew
    else:
        shutil.rmtree(node.built)
    for _ in range(3):
        build = node.start("model", "build", "pump", "--data", rows)
        time.sleep(moments.uniform(0.1, 1.0) * whole_s)  # the moment itself, not a wait for anything
        build.kill()
        build.communicate()
        wait_until(lambda: not _left_over(node), "the end of every process of a killed build")
        _check_shelf(node)
    done = node.build("--data", rows)
    assert states(done) == {"folded": "passed", "slow": "passed", "half": "passed"}
    assert done.data["chosen"] in ("folded", "slow")
    _check_shelf(node)
    assert not list(node.place().glob(".making-*"))


def _left_over(node: Node) -> list[int]:
    """Processes of the workshop that work in this node's folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        if "millhand.workshop" in words and str(node.folder) in words:
            found.append(process.pid)
    return found


def _check_shelf(node: Node) -> None:
    """Everything under its own name is whole; what is chosen is there, proved, and what its proof says."""
    for folder in node.place().glob("[!.]*/"):
        record = msgspec.json.decode((folder / "made.json").read_bytes(), type=Record)
        assert digest(artifact_files(folder)) == record.sha256
        assert weights(folder / record.made.artifact)
        if (folder / "proof.json").exists():
            assert read_proof(folder / "proof.json").sha256 == record.sha256
    path = node.place() / "choice.json"
    if path.exists():
        found = msgspec.json.decode(path.read_bytes(), type=Choice)
        verdict = verify(_subject(node, found.candidate), Keyring(node.folder / "data"))
        assert verdict.state == "proved", verdict.reason


# ---- the screen -----------------------------------------------------------------------------------------------------


def test_one_screen_says_which_won_and_why(node: Node) -> None:
    rows = node.rows()
    node.configure("folded", "damaged", "crash")
    built = node.millhand("model", "build", "pump", "--data", rows)
    assert built.code == 0
    compared = node.millhand("model", "compare", "pump")
    assert compared.out.strip() in built.out
    assert max(map(len, built.out.splitlines())) <= 80
    lines = compared.out.splitlines()
    assert len(lines) < 24
    header = next(line for line in lines if line.startswith("CANDIDATE"))
    assert header.split() == ["CANDIDATE", "TYPE", "SIZE", "METRIC", "DROP", "SPEED", "P50", "P99", "MEM", "VERDICT"]
    verdicts = {line.split()[0]: line.split()[-1] for line in lines[lines.index(header) :][:4]}
    assert verdicts == {
        "CANDIDATE": "VERDICT",
        "(original)": verdicts["(original)"],
        "damaged": "refused",
        "folded": "serves",
    }
    assert "crash failed: its process died of SIGSEGV: about to crash" in compared.out
    assert re.search(r"folded serves: of those that passed it is the fastest", compared.out)
    assert "\r" not in built.out


def test_a_terminal_gets_bars(node: Node) -> None:
    rows = node.rows()
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "millhand", "-c", str(node.config_path), "model", "build", "pump", "--data", rows]
    process = subprocess.Popen(command, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    try:
        while part := os.read(master, 1 << 16):
            shown += part
    except OSError:  # the other end is closed
        pass
    finally:
        os.close(master)
    assert process.wait(60) == 0
    text = shown.decode()
    assert re.search(r"folded +\[#+\.+\] +\d+%  ", text)
    assert "timing batches of 16" in text
    assert "folded serves" in text
