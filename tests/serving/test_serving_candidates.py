"""What was made of a model serves in its place where it may, and whatever goes wrong with it the original serves."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path

import numpy as np
import psutil
import pytest
from candidate_kit import Workshop, half
from serving_kit import action, scale, until, write_faulty, write_model

from millhand import metrics
from millhand.errors import MillhandError, WorkerError
from millhand.serving.settings import WorkerDefaults

SEVENS = np.full((1, 2), 7, dtype=np.float32)
"""The faulty backend gives back what does not tell it to go wrong."""


@pytest.fixture
def workshop(root, tmp_path, monkeypatch):
    """A model `scale` that doubles; candidates that triple tell themselves apart."""
    monkeypatch.setenv("MILLHAND_TEST_KEY", json.dumps({"driver": "550"}))
    scale(write_model(root, "scale") / "1/model.onnx", 2)
    return Workshop(root, tmp_path / "data")


def triple(path: Path) -> None:
    half(path, 3)


def goes_wrong(what: str):
    return lambda path: path.write_text(json.dumps({"load": what}))


FAULTY = {"artifact": "model.json", "backend": "faulty", "name": "wrong"}


async def factor(pool, model="scale", **options):
    outputs, _ = await pool.infer(model, {"x": SEVENS}, deadline_ms=5000, **options)
    return float(outputs["y"][0, 0]) / 7


def shown(pool, model="scale"):
    """(Candidates of version 1 that serve, reason of the index entry, choices)."""
    entry = pool.metadata(model)
    (detail,) = [detail for detail in entry["details"] if detail["version"] == 1]
    return detail["candidates"], entry["reason"], entry["choices"]


class Asking:
    """Clients that ask without pause while something else happens; none of them may ever get an error."""

    def __init__(self, pool, model="scale"):
        self.pool, self.model, self.answers = pool, model, []

    async def __aenter__(self):
        self.going = True
        self.tasks = [asyncio.create_task(self.ask()) for _ in range(3)]
        await until(lambda: self.answers)
        return self

    async def ask(self):
        while self.going:
            self.answers.append(await factor(self.pool, self.model))

    async def __aexit__(self, *error):
        self.going = False
        await asyncio.gather(*self.tasks)


# ---- which one serves -----------------------------------------------------------------------------------------------


async def test_the_chosen_candidate_serves(make_pool, workshop):
    candidate = workshop.serve("scale", triple)
    pool = await make_pool()
    assert await factor(pool) == 3
    candidates, reason, (choice,) = shown(pool)
    assert (candidates, reason) == (["half"], "")
    assert choice == {
        "model": "scale", "version": 1, "target": "cpu", "candidate": "half", "reason": "", "stale": False,
        "hint": "", "rebuild": "",
    }  # fmt: skip
    request = pool._served["scale"].workers[0].wanted["scale", 1]
    assert Path(request.artifact) == candidate.artifact
    assert (
        'millhand_candidate_serves{model="scale",version="1",target="cpu",candidate="half"} 1'
        in metrics.DAEMON.render()
    )


async def test_nothing_on_the_shelf_nothing_said(make_pool, workshop):
    pool = await make_pool()
    assert (await factor(pool), shown(pool)) == (2, ([], "", []))
    workshop.make("scale", triple)
    await pool.load("scale")
    assert (await factor(pool), shown(pool)) == (2, ([], "", [])), "made and not chosen"


async def test_where_the_original_was_the_best_it_serves(make_pool, workshop):
    workshop.choose("scale", "", why="no candidate was quicker")
    pool = await make_pool()
    candidates, reason, (choice,) = shown(pool)
    assert (await factor(pool), candidates, reason) == (2, [], "")
    assert (choice["candidate"], choice["reason"]) == ("", "no candidate was quicker")


@pytest.mark.parametrize(("use_built", "expected"), [(False, 2), (True, 3), (("scale",), 3), (("other",), 2), ((), 2)])
async def test_candidates_can_be_switched_off(make_pool, workshop, use_built, expected):
    workshop.serve("scale", triple)
    pool = await make_pool(use_built=use_built)
    assert await factor(pool) == expected


async def test_options_of_the_model_hold_for_the_same_backend_alone(make_pool, workshop, root):
    folder = write_model(root, "scale", extra="options = { threads = 1, prepacking = false }")
    workshop.serve("scale", triple, options={"prepacking": True})
    pool = await make_pool()
    assert pool._served["scale"].workers[0].wanted["scale", 1].options == {"threads": 1, "prepacking": True}
    workshop.serve("scale", goes_wrong(""), options={"mode": "quick"}, **FAULTY)
    await pool.load("scale")
    assert pool._served["scale"].workers[0].wanted["scale", 1].options == {"mode": "quick"}
    assert folder.exists()


def tamper(candidate):
    data = candidate.artifact.read_bytes()
    candidate.artifact.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


async def test_a_tampered_candidate_does_not_serve(make_pool, workshop):
    tamper(workshop.serve("scale", triple))
    pool = await make_pool()
    candidates, reason, (choice,) = shown(pool)
    assert (await factor(pool), candidates) == (2, [])
    assert (
        "candidate 'half' of version 1 does not serve: it is refused:" in reason and "is not what was proved" in reason
    )
    assert choice["reason"].startswith("it is refused") and not choice["stale"]
    workshop.serve("scale", triple)
    await pool.load("scale")
    assert (await factor(pool), shown(pool)[1]) == (3, "")


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("unsigned", "it is unproved: its proof.json is not signed"),
        ("proof gone", "it is unproved: there is no proof.json"),
        ("gone", "has no candidate 'half' for cpu"),
        ("another source", "it was made of another artifact than this version has now"),
        ("driver", "it is stale: driver was 535, is 550"),
        ("maker", "no loaded plugin brings the maker 'nobody'"),
        ("keyless", "maker 'keyless' does not tell"),
        ("backend", "no loaded plugin brings its backend 'tensorrt'"),
        ("options", "is of options"),
    ],
)
async def test_why_a_candidate_does_not_serve(make_pool, workshop, root, case, why):
    options = {
        "unsigned": {"signed": False},
        "driver": {"key": {"driver": "535"}},
        "maker": {"maker": "nobody", "key": {"driver": "550"}},
        "keyless": {"maker": "keyless", "key": {"driver": "550"}},
        "backend": {"backend": "tensorrt"},
    }.get(case, {})
    candidate = workshop.serve("scale", triple, **options)
    if case == "proof gone":
        (candidate.folder / "proof.json").unlink()
    elif case == "gone":
        (candidate.folder / "made.json").unlink()
    elif case == "another source":
        scale(root / "scale/1/model.onnx", 2)
        (root / "scale/1/weights.bin").write_bytes(b"more")
    elif case == "options":
        record = candidate.folder / "made.json"
        record.write_text(record.read_text().replace('"options":{}', '"options":{"threads":1}'))
    pool = await make_pool()
    candidates, reason, _ = shown(pool)
    assert (await factor(pool), candidates) == (2, [])
    assert why in reason
    assert pool.index()[0]["state"] == "ready"


async def test_a_key_that_fits_serves(make_pool, workshop):
    workshop.serve("scale", triple, key={"driver": "550", "target": "cpu"})
    pool = await make_pool()
    assert await factor(pool) == 3


async def test_each_kind_of_hardware_has_its_own_shelf(make_pool, root, tmp_path, workshop):
    write_faulty(root, "spread", extra="spread = true")
    workshop.serve("spread", goes_wrong(""), target="sm80", **FAULTY)
    hosts = [WorkerDefaults(accelerator=name) for name in ("GPU-a", "GPU-b")]
    pool = await make_pool(hosts=hosts, targets={"GPU-a": "sm80", "GPU-b": "sm87"}, load=("spread",))
    served = pool._served["spread"]
    found = {worker.host.accelerator: worker.wanted["spread", 1].candidate for worker in served.workers}
    assert found == {"GPU-a": "wrong", "GPU-b": ""}
    (choice,) = pool.metadata("spread")["choices"]
    assert (choice["target"], choice["candidate"], choice["reason"]) == ("sm80", "wrong", "")


async def test_required_proofs_are_those_of_what_is_loaded(make_pool, workshop):
    pool = await make_pool(require_proof=True)
    assert "is unproved" in pool.index()[0]["reason"]
    workshop.serve("scale", triple)
    await pool.load("scale")
    assert await factor(pool) == 3


# ---- exchange without a gap -----------------------------------------------------------------------------------------


async def test_a_new_choice_takes_over_without_a_gap(make_pool, workshop):
    pool = await make_pool()
    async with Asking(pool) as asking:
        for number in (3, 4, 5):
            workshop.serve("scale", lambda path, number=number: half(path, number))
            await pool.load("scale")
            await until(lambda number=number: asking.answers[-1] == number)
        workshop.choose("scale", "")
        await pool.load("scale")
        await until(lambda: asking.answers[-1] == 2)
    assert set(asking.answers) == {2, 3, 4, 5}
    assert (await pool.stats())["workers"][0]["restarts"] == 0


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("raise", "the native library said no"),
        ("die", "a worker of its own died of SIGKILL while it loaded it"),
        ("hang", "a worker of its own took over 5 s while it loaded it"),
    ],
)
async def test_a_candidate_that_fails_to_load_costs_nobody_an_answer(make_pool, workshop, what, why):
    pool = await make_pool(load_timeout_s=5)
    process = pool._workers["shared"].process
    workshop.serve("scale", goes_wrong(what), **FAULTY)
    async with Asking(pool) as asking:
        await pool.load("scale")
    assert set(asking.answers) == {2}
    candidates, reason, _ = shown(pool)
    assert candidates == [] and why in reason
    assert pool._workers["shared"].process is process
    assert not [child for child in psutil.Process().children() if "trial of" in " ".join(child.cmdline())]


async def test_what_served_before_a_bad_candidate_was_a_candidate_too(make_pool, workshop):
    workshop.serve("scale", triple)
    pool = await make_pool()
    workshop.serve("scale", goes_wrong("die"), **FAULTY)
    async with Asking(pool) as asking:
        await pool.load("scale")
        await until(lambda: asking.answers[-1] == 2)
    assert set(asking.answers) == {3, 2}


@pytest.mark.parametrize("what", ["raise", "die", "hang"])
async def test_at_the_start_the_original_serves_after_a_bad_candidate(make_pool, workshop, what):
    workshop.serve("scale", goes_wrong(what), **FAULTY)
    pool = await make_pool(load_timeout_s=5)
    assert await factor(pool) == 2
    assert pool.index()[0]["state"] == "ready" and shown(pool)[1]


async def test_a_failed_candidate_is_tried_again_on_command(make_pool, workshop, tmp_path):
    gate = tmp_path / "gate"
    gate.touch()
    workshop.serve("scale", goes_wrong(f"gate raise {gate}"), **FAULTY)
    pool = await make_pool()
    assert await factor(pool) == 2
    gate.unlink()
    await pool.refresh("scale")
    assert await factor(pool) == 2, "nobody has asked for it"
    await pool.load("scale")
    assert (await factor(pool), shown(pool)[0]) == (1, ["wrong"])


async def test_a_refresh_keeps_the_version_that_was_asked_for(make_pool, workshop, root):
    scale(root / "scale/2/model.onnx", 20)
    pool = await make_pool()
    await pool.load("scale", 1)
    workshop.serve("scale", triple)
    await pool.refresh("scale")
    assert (await factor(pool), pool.index()[0]["versions"]) == (3, [1])
    await pool.unload("scale")
    await pool.refresh("scale")
    assert pool.index()[0]["versions"] == []


# ---- restarts and deaths --------------------------------------------------------------------------------------------


async def kill(pool):
    """kill -9 of the worker; returns when the model serves again."""
    worker = pool._workers["shared"]
    restarts = worker.restarts
    psutil.Process(worker.process.pid).kill()
    await until(lambda: worker.restarts > restarts and ("scale", 1) in worker.ready)


async def test_a_candidate_comes_back_after_kill_9(make_pool, workshop):
    workshop.serve("scale", triple)
    pool = await make_pool()
    await kill(pool)
    assert (await factor(pool), shown(pool)[:2]) == (3, (["half"], ""))


async def test_a_candidate_that_was_tampered_with_meanwhile_does_not_come_back(make_pool, workshop):
    candidate = workshop.serve("scale", triple)
    pool = await make_pool()
    tamper(candidate)
    await kill(pool)
    candidates, reason, _ = shown(pool)
    assert (await factor(pool), candidates) == (2, [])
    assert "could not be loaded after a restart" in reason and "is not what was proved" in reason
    await pool.refresh("scale")
    assert await factor(pool) == 2


@pytest.mark.parametrize("what", ["raise", "die"])
async def test_a_candidate_that_cannot_be_loaded_again_makes_way(make_pool, workshop, tmp_path, what):
    gate = tmp_path / "gate"
    workshop.serve("scale", goes_wrong(f"gate {what} {gate}"), **FAULTY)
    pool = await make_pool()
    assert await factor(pool) == 1
    gate.touch()
    await kill(pool)
    candidates, reason, _ = shown(pool)
    assert (await factor(pool), candidates) == (2, []) and "could not be loaded after a restart" in reason
    assert pool._workers["shared"].restarts <= 2, "one that crashes costs one restart more"


async def test_a_candidate_that_kills_its_worker_again_and_again_makes_way(make_pool, workshop):
    workshop.serve("scale", goes_wrong(""), **FAULTY)
    pool = await make_pool(deaths_cap=3)
    assert await factor(pool) == 1
    for death in range(3):
        await until(lambda: pool._workers["shared"].ready)
        with pytest.raises(WorkerError):
            await pool.infer("scale", action(1))
        await until(lambda death=death: pool._workers["shared"].restarts > death)
    await until(lambda: pool._workers["shared"].ready)
    candidates, reason, _ = shown(pool)
    assert (await factor(pool), candidates) == (2, []) and "took its worker down 3 times within 60 s" in reason
    assert pool.index()[0]["versions"] == [1]


async def test_kill_9_in_the_middle_of_an_exchange(make_pool, workshop):
    """Whatever the moment: the old one or the new one serves afterwards, and the other has left nothing."""
    pool = await make_pool(deaths_cap=100)

    async def answered():
        with contextlib.suppress(WorkerError):  # the pool has not seen the kill yet
            return await factor(pool)
        return None

    for number in range(8):
        workshop.serve("scale", lambda path, number=number: half(path, 3 + number))
        load = asyncio.create_task(pool.load("scale"))
        await asyncio.sleep(number * 0.06)
        worker = pool._workers["shared"]
        if worker.process is not None:
            psutil.Process(worker.process.pid).kill()
        await asyncio.gather(load, return_exceptions=True)
        await until(lambda worker=worker: ("scale", 1) in worker.ready)
        found = await until(answered)
        assert found in (2, *(3 + earlier for earlier in range(number + 1)))
        assert found == (2 if not shown(pool)[0] else found)
    await pool.load("scale")
    assert await factor(pool) == 10


async def test_a_candidate_moves_with_its_model_to_another_card(make_pool, workshop, root, tmp_path):
    """A card that is lost fails the original as well: then the candidate is not to blame, and is tried elsewhere."""
    cards = tmp_path / "cards"
    cards.mkdir()
    for name in ("GPU-a", "GPU-b"):
        (cards / name).touch()
    (write_model(root, "card", backend="card") / "1").mkdir()
    (root / "card/1/model.json").write_text(json.dumps({"cards": str(cards)}))
    text = json.dumps({"cards": str(cards), "made": "of it"})
    workshop.serve("card", lambda path: path.write_text(text), target="sm80", artifact="model.json", backend="card")
    hosts = [WorkerDefaults(accelerator=name) for name in ("GPU-a", "GPU-b")]
    pool = await make_pool(hosts=hosts, targets={"GPU-a": "sm80", "GPU-b": "sm80"}, load=("card",))
    assert shown(pool, "card")[0] == ["half"] and pool.metadata("card")["worker"] == "card@0"
    (cards / "GPU-a").unlink()
    with pytest.raises(MillhandError):
        await pool.infer("card", {"x": SEVENS})
    await until(lambda: [worker.name for worker in pool._served["card"].holders(1)] == ["card@1"])
    assert (shown(pool, "card")[0], await factor(pool, "card")) == (["half"], 3)


# ---- ensembles ------------------------------------------------------------------------------------------------------


@pytest.fixture
def chain(root, workshop):
    """An ensemble of `scale` and a transform."""
    folder = root / "chain"
    folder.mkdir()
    (folder / "model.toml").write_text("""
name = "chain"
description = "scale, clipped"
licence = "Apache-2.0"
inputs = [{ name = "x", shape = [-1, 2] }]
outputs = [{ name = "y", shape = [-1, 2] }]
[[steps]]
model = "scale"
outputs = { y = "scaled" }
[[steps]]
transform = "clip"
inputs = { x = "scaled" }
options = { low = 0.0, high = 100.0 }
""")
    return workshop


async def test_the_models_of_an_ensemble_follow_the_same_rule(make_pool, chain):
    candidate = chain.serve("scale", triple)
    pool = await make_pool()
    assert (await factor(pool, "chain"), await factor(pool)) == (3, 3)
    assert shown(pool, "chain")[0] == ["scale: half"]
    tamper(candidate)
    await pool.load("chain")
    candidates, reason, (choice,) = shown(pool, "chain")
    assert (await factor(pool, "chain"), candidates) == (2, []) and "is not what was proved" in reason
    assert (choice["model"], choice["version"]) == ("scale", 1)
    assert await factor(pool) == 3, "the model itself was not loaded again"


async def test_a_refresh_takes_an_ensemble_along_unless_another_version_would_come(make_pool, chain, root):
    pool = await make_pool()
    chain.serve("scale", triple)
    await pool.refresh("scale")
    assert (await factor(pool, "chain"), await factor(pool)) == (3, 3)
    scale(root / "scale/2/model.onnx", 20)
    await pool.load("scale")
    chain.serve("scale", lambda path: half(path, 4))
    await pool.refresh("scale")
    assert (await factor(pool, "chain"), await factor(pool)) == (3, 20)


async def test_what_is_said_of_a_version_goes_with_it(make_pool, workshop, root):
    tamper(workshop.serve("scale", triple))
    pool = await make_pool()
    assert "does not serve" in shown(pool)[1]
    scale(root / "scale/2/model.onnx", 20)
    await pool.load("scale")
    assert shown(pool)[1:] == ("", [])
    await pool.load("scale", 1)
    assert "does not serve" in shown(pool)[1]
    await pool.unload("scale")
    assert shown(pool)[1:] == ("", [])


async def test_an_ensemble_falls_back_for_itself_alone(make_pool, chain, tmp_path):
    gate = tmp_path / "gate"
    chain.serve("scale", goes_wrong(f"gate die {gate}"), **FAULTY)
    pool = await make_pool(load=("scale",))
    gate.touch()
    async with Asking(pool) as asking:
        await pool.load("chain")
    assert set(asking.answers) == {1}
    assert await factor(pool, "chain") == 2
    assert shown(pool, "chain")[0] == [] and shown(pool)[:2] == (["wrong"], "")
