"""One model on several NVIDIA GPUs: what each further card adds, where its workers are, and a card that is taken away.

    python benchmarks/gpu/many.py [--rounds 3] [--seconds 3] [--rows 8] [--cpu]

A real agent serves the rig's classifier with `spread = true`, one worker for each GPU. Client processes keep requests
in flight over the worker protocol, to the workers of 1, 2, 4, ... and all cards, round by round; a ratio is the median
of the rounds' ratios to one card. NVML's lists of processes say on which card each worker is. Then the clients go over
HTTP, one worker is killed (SIGKILL), and its new process is given a GPU that does not exist: the agent must serve on
from the other cards. Every answer is compared with the CPU's, and none may be wrong. Needs onnxruntime-gpu; runs from a
source tree (PYTHONPATH=agent:plugins:profiles:hub) or where millhand is installed. `--cpu` tries the script without a
GPU: two cards of a recording, whose workers compute on the CPU.
"""

from __future__ import annotations

import ast
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from agent import BenchAgent
from card import Card, Cards
from clients import Clients, Run, Tallies
from figures import Figure, parser, progress, report, versions
from node import config, environment
from shipped import Shipped, classifier

NAME = "classifier"
IN_FLIGHT = 48
"""For each card."""
CLIENTS_A_CARD = 6
ROWS = 128
ALONE = ">= {:g}"
TAKEN_AT_S = 2.0
TAKEN_RUN_S = 8.0
MOVED_S = 30.0
ABSENT = "GPU-00000000-0000-0000-0000-000000000000"
WRAPPER = """#!/bin/sh
# The workers' Python; a worker of the card that {gone} names finds that card gone.
if [ -f {gone} ] && [ "$CUDA_VISIBLE_DEVICES" = "$(cat {gone})" ]; then
  {fail}
fi
exec {python} "$@"
"""
RECORDED = """<?xml version="1.0" ?>
<nvidia_smi_log><driver_version>580.0</driver_version><cuda_version>13.0</cuda_version>{cards}</nvidia_smi_log>
"""
RECORDED_CARD = """<gpu id="00000000:0{index}:00.0"><product_name>NVIDIA A30</product_name>
<uuid>GPU-{index}{index}</uuid><mig_mode><current_mig>Disabled</current_mig></mig_mode>
<fb_memory_usage><total>24576 MiB</total></fb_memory_usage></gpu>"""


class Bench:
    """Drives one agent's spread model."""

    def __init__(self, agent: BenchAgent, clients: Clients, folder: Path, model: Shipped, rows: int) -> None:
        self._agent = agent
        self._clients = clients
        self._job = {
            "model": NAME, "folder": str(folder), "input": model.input, "output": model.output, "rows": rows,
        }  # fmt: skip
        self._card = Card(False)
        self._rows = rows
        self.runs: dict[int, list[Run]] = {}

    @property
    def sockets(self) -> list[str]:
        """Of the workers that hold the model, in the order of the cards."""
        routes = next(iter(self._agent.client.stream("model.routes")))
        return list(routes["models"][NAME]["sockets"].get("1", []))

    def rounds(self, cards: int, rounds: int, seconds: float) -> None:
        sockets, counts = self.sockets, card_counts(cards)
        for number in range(rounds):
            turn = number % len(counts)
            for count in (*counts[turn:], *counts[:turn]):
                run = self._clients.run(self._card, IN_FLIGHT * count, seconds, sockets=sockets[:count], **self._job)
                self.runs.setdefault(count, []).append(run)
                progress(f"{count} cards: {run.requests_per_s:.0f} req/s, p99 {run.p99_ms:.2f} ms, "
                         f"{run.batch_rows:.0f} rows a batch")  # fmt: skip

    def over_http(self, url: str, cards: int, seconds: float) -> Run:
        host, _, port = url.rpartition("//")[2].partition(":")
        return self._clients.run(self._card, IN_FLIGHT * cards, seconds, http=(host, int(port)), **self._job)

    def ratio(self, count: int) -> float | None:
        pairs = zip(self.runs.get(count, []), self.runs.get(1, []), strict=True)
        ratios = [many.requests_per_s / one.requests_per_s for many, one in pairs]
        return round(statistics.median(ratios), 3) if ratios else None

    def rows_per_s(self, count: int) -> float:
        return round(statistics.median(run.requests_per_s for run in self.runs[count]) * self._rows)


def card_counts(cards: int) -> list[int]:
    """1, 2, 4, ... and all."""
    return sorted({cards, *(2**power for power in range(cards.bit_length()) if 2**power <= cards)})


def workers(agent: BenchAgent) -> dict[str, int]:
    """Name -> process id, of those that live."""
    return {one["name"]: one["pid"] for one in agent.call("model.stats")["workers"] if one["pid"]}


def told(pid: int) -> str:
    """The accelerator that a worker was given."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(one.partition(b"=")[2].decode() for one in entries if one.startswith(b"CUDA_VISIBLE_DEVICES="))


def pinning(agent: BenchAgent, cards: Cards) -> dict[str, Any]:
    """Whether each worker was given a card of its own, and by NVML computes on that card and on no other."""
    pids = workers(agent).values()
    given = {pid: told(pid) for pid in pids}
    apart = len(set(given.values())) == len(given)
    listed = cards.pids()
    right = None
    if listed is not None:
        right = sum([uuid for uuid in listed if pid in listed[uuid]] == [given[pid]] for pid in given)
    return {"workers": len(given), "cards_given": sorted(given.values()), "apart": apart, "right_by_nvml": right}


def take_away(bench: Bench, agent: BenchAgent, gone: Path, url: str, cards: int, gpu: bool) -> dict[str, Any]:
    """Kill a worker under load and keep its card from coming back; what the clients saw goes into their tallies.

    Without a GPU its process cannot even start, so the model is not said to have left the card.
    """
    name, pid = max(workers(agent).items())
    victim = told(pid)
    seen: dict[str, Any] = {"worker": name, "card": victim}

    def take() -> None:
        time.sleep(TAKEN_AT_S)
        gone.write_text(victim)
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        while time.monotonic() < began + MOVED_S:
            shown = next(model for model in agent.call("model.list") if model["name"] == NAME)
            if shown["state"] == "ready" and (victim in shown["reason"] or not gpu):
                seen.update(reason=shown["reason"], seconds=round(time.monotonic() - began, 2))
                return
            time.sleep(0.05)

    taker = threading.Thread(target=take)
    taker.start()
    run = bench.over_http(url, cards, TAKEN_RUN_S)
    taker.join()
    after = bench.over_http(url, cards, 2.0)
    return {
        **seen,
        "requests_per_s": round(run.requests_per_s),
        "requests_per_s_after": round(after.requests_per_s),
        "workers_after": len(bench.sockets),
    }


def figures(
    bench: Bench, cards: int, pins: dict[str, Any], taken: dict[str, Any], tallies: Tallies, gpu: bool
) -> list[Figure]:
    made = []
    for count in card_counts(cards):
        made.append(Figure(f"{count} cards: rows", bench.rows_per_s(count), "1/s"))
        if count > 1:
            goal = ALONE.format(1.9 if count == 2 else 0.95 * count) if gpu else ""
            made.append(Figure(f"{count} cards to one, ratio", bench.ratio(count), "x", goal))
    if gpu:
        made.append(Figure("workers on their own card, by NVML", pins["right_by_nvml"], "1", f"== {cards}"))
    if taken:
        made += [
            Figure("workers left when a card is gone", taken["workers_after"], "1", f"== {cards - 1}" if gpu else ""),
            Figure("time until the model left the card", taken.get("seconds"), "s", "<= 30" if gpu else ""),
        ]
    return [
        *made,
        Figure("answers checked", tallies.answers, "1"),
        Figure("wrong answers", tallies.wrong, "1", "== 0"),
        Figure("failed requests", tallies.failed, "1"),
        Figure("failed with anything but 503", not_retriable(tallies), "1", "== 0"),
    ]


def not_retriable(tallies: Tallies) -> int:
    """Requests that ended with another status, or other errors than statuses."""
    statuses = [ast.literal_eval(text) for text in tallies.errors if text.startswith("{")]
    others = sum(count for found in statuses for status, count in found.items() if status not in (200, 503))
    return others + sum(not text.startswith("{") for text in tallies.errors)


def write_answers(folder: Path, model: Shipped) -> None:
    """Rows and answers that are far enough apart that a mix-up of two requests would be seen."""
    rows = model.rows(ROWS)
    answers = model.answers(rows)
    apart = np.abs(answers[:, None] - answers[None]).max(axis=2) + np.eye(ROWS) * 1e9
    if apart.min() < 5e-3 * np.abs(answers).max():
        raise SystemExit(f"{model.name}: two answers are only {apart.min():g} apart, which hides a mix-up")
    folder.mkdir(parents=True)
    np.save(folder / "rows.npy", rows)
    np.save(folder / "answers.npy", answers)


def agent_config(folder: Path, cards: Cards, gpu: bool) -> str:
    """The agent's configuration, and the files that it names."""
    wrapper, gone = folder / "python", folder / "gone"
    fail = f"export CUDA_VISIBLE_DEVICES={ABSENT}" if gpu else "exit 1"
    wrapper.write_text(WRAPPER.format(gone=gone, fail=fail, python=sys.executable))
    wrapper.chmod(0o755)
    text = config(folder / "repository").replace("[http]", f'interpreter = "{wrapper}"\n[http]')
    if not gpu:
        cards.uuids = ["GPU-00", "GPU-11"]
        recorded = "".join(RECORDED_CARD.format(index=index) for index in range(2))
        (folder / "nvidia-smi-q.xml").write_text(RECORDED.format(cards=recorded))
    return text


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seconds", type=float, default=3.0, help="of one run, after a second of warm-up")
    options.add_argument("--rows", type=int, default=8, help="of one request")
    options.add_argument("--cpu", action="store_true", help="try the script on the CPU")
    chosen = options.parse_args()
    gpu, began = not chosen.cpu, time.monotonic()
    cards, model = Cards(gpu), classifier()
    with tempfile.TemporaryDirectory(prefix="mhg-") as name:
        folder = Path(name)
        write_answers(folder / "answers", model)
        own = '[options]\nproviders = ["cpu"]' if chosen.cpu else ""
        model.copy(folder / "repository", NAME, f"spread = true\nmax_batch = 256\nmax_delay_us = 500\n{own}")
        written = agent_config(folder, cards, gpu)
        count = len(cards.uuids)
        clients = Clients(CLIENTS_A_CARD * count if gpu else 2)
        recorded = {} if gpu else {"MILLHAND_NODE__HARDWARE_ROOT": str(folder / "nvidia-smi-q.xml")}
        with BenchAgent(written, environment={**environment(folder / "site"), **recorded}) as agent:
            state = agent.call("state")
            progress(f"{time.monotonic() - began:.0f} s: {count} cards serve")
            bench = Bench(agent, clients, folder / "answers", model, chosen.rows)
            bench.rounds(count, chosen.rounds, chosen.seconds)
            pins = pinning(agent, cards)
            progress(f"pinning: {pins}")
            taken = take_away(bench, agent, folder / "gone", state["http"], count, gpu) if count > 1 else {}
            progress(f"taken away: {taken}")
        clients.end()
    if clients.tallies.errors:
        print("errors:", *clients.tallies.errors, sep="\n  ")
    import onnxruntime

    return report(
        "gpu_many",
        figures(bench, count, pins, taken, clients.tallies, gpu),
        device=Card(gpu).facts,
        cards=count,
        model=model.name,
        profile=state["profile"],
        pinning=pins,
        taken_away=taken,
        seconds=round(time.monotonic() - began),
        versions={**versions(), "onnxruntime": onnxruntime.__version__},
    )


if __name__ == "__main__":
    sys.exit(main())
