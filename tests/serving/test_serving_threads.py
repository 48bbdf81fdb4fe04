"""How many threads an inference gets: more where they pay, one where they do not, as many as told where told."""

from __future__ import annotations

import json
import os
import time

import pytest
from serving_kit import identity, write_model

from millhand.errors import ModelError
from millhand.serving.settings import WorkerDefaults
from millhand.serving.threads import BUDGET_S, choose_threads

CPUS = len(os.sched_getaffinity(0))


class Session:
    """Takes `run_ms` a run; `busy` of it computing, the rest asleep."""

    def __init__(self, run_ms, busy=False):
        self.run_s, self.busy, self.open = run_ms / 1e3, busy, True

    def run(self, inputs):
        end_s = time.perf_counter() + self.run_s
        while self.busy and time.perf_counter() < end_s:
            pass
        time.sleep(max(0.0, end_s - time.perf_counter()))
        return {}

    def close(self):
        self.open = False


def choose(times_ms, cpus=8, **options):
    """The chosen number and the trials; checks that the chosen session alone stays open."""
    loaded = []

    def load(threads):
        loaded.append(Session(times_ms[threads], **options))
        return loaded[-1]

    session, choice = choose_threads(load, lambda _: {}, cpus)
    assert [one for one in loaded if one.open] == [session]
    assert [trial.threads for trial in choice.trials] == [2**power for power in range(len(loaded))]
    return choice.threads, choice.trials


def test_more_threads_are_taken_as_long_as_each_doubling_pays():
    assert choose({1: 16, 2: 8, 4: 4.5, 8: 4})[0] == 4


def test_no_more_threads_than_cpus_are_tried():
    threads, trials = choose({1: 16, 2: 8, 4: 4}, cpus=3)
    assert (threads, len(trials)) == (2, 2)
    assert choose({1: 16}, cpus=1)[0] == 1


def test_a_tiny_model_is_not_tried_twice():
    threads, trials = choose({1: 0.01}, busy=True)
    assert (threads, len(trials)) == (1, 1)
    assert trials[0].run_ms < 0.1


def test_what_a_gain_costs_in_cpu_time_counts():
    """Twice as fast, and each run computes for as long: with other requests waiting, nothing would be gained."""
    sessions = {1: Session(10), 2: Session(5, busy=True)}
    _, choice = choose_threads(sessions.__getitem__, lambda _: {}, 2)
    assert choice.threads == 1
    assert [trial.threads for trial in choice.trials] == [1, 2]


def test_the_trials_of_a_slow_model_end_in_time():
    started_s = time.monotonic()
    threads, trials = choose({1: 600})
    assert (threads, len(trials)) == (1, 1)
    assert time.monotonic() - started_s < 2 * BUDGET_S + 1


def test_a_candidate_that_fails_leaves_nothing_open():
    sessions = {1: Session(4), 2: Session(2)}
    sessions[2].run = lambda inputs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        choose_threads(sessions.__getitem__, lambda _: {}, 2)
    assert not sessions[1].open and not sessions[2].open


def threaded(root, times_ms, extra=""):
    folder = write_model(root, "threaded", backend="threaded", extra=extra)
    (folder / "1").mkdir()
    (folder / "1/model.json").write_text(json.dumps(times_ms))


@pytest.mark.skipif(CPUS < 2, reason="one CPU only")
async def test_the_worker_chooses_and_show_tells(root, make_pool):
    threaded(root, {number: 16 / number for number in range(1, 257)})
    pool = await make_pool()
    choice = pool.metadata("threaded")["threads"]["1"]
    assert choice["threads"] == 2 ** (CPUS.bit_length() - 1)
    assert choice["trials"][0]["run_ms"] >= 16


@pytest.mark.skipif(CPUS < 2, reason="one CPU only")
async def test_a_pinned_worker_counts_its_own_cpus(root, make_pool):
    threaded(root, {number: 16 / number for number in range(1, 257)})
    pool = await make_pool(cpus=(min(os.sched_getaffinity(0)),))
    assert pool.metadata("threaded")["threads"]["1"]["threads"] == 1


@pytest.mark.parametrize(
    ("model", "settings", "profile", "expected"),
    [("threads = 5", 3, 2, 5), ("", 3, 2, 3), ("", 0, 2, 2), ('threads = "auto"', 3, 2, None), ("", "auto", 2, None)],
)
async def test_who_tells_a_number(root, make_pool, model, settings, profile, expected):
    """model.toml, then the owner, then the profile; `auto` measures."""
    threaded(root, dict.fromkeys(range(1, 257), 8), extra=f"[options]\n{model}")
    pool = await make_pool(threads=settings, hosts=[WorkerDefaults(threads=profile)])
    choice = pool.metadata("threaded")["threads"]["1"]
    assert choice["threads"] == (expected or choice["threads"])
    assert bool(choice["trials"]) == (expected is None)


async def test_a_backend_without_threads_needs_to_know_nothing(root, make_pool):
    write = write_model(root, "rows", backend="rows", outputs={"y": ("FP32", 2), "rows": ("INT64", 1)})
    (write / "1").mkdir()
    (write / "1/model.json").write_text("{}")
    pool = await make_pool(threads="auto")
    assert pool.metadata("rows")["threads"] == {}


async def test_onnxruntime_keeps_one_thread_for_a_tiny_model_and_loads_once(root, make_pool):
    identity(write_model(root, "same") / "1/model.onnx")
    pool = await make_pool()
    choice = pool.metadata("same")["threads"]["1"]
    assert (choice["threads"], len(choice["trials"])) == (1, 1)


async def test_a_number_that_is_none_is_refused(root, make_pool):
    threaded(root, {1: 8}, extra='[options]\nthreads = "many"')
    pool = await make_pool()
    with pytest.raises(ModelError, match=r"key 'options.threads' = 'many' is no number"):
        await pool.load("threaded")
