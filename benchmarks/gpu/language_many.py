"""One 7B shape on several NVIDIA GPUs, served by vLLM through millhand: what replicas add, and what spreading saves.

    python benchmarks/gpu/language_many.py --tokenizer FOLDER --out FILE.jsonl [--cards 4] [--phases replicas 2 4]
    python benchmarks/gpu/language_many.py --tokenizer FOLDER --rehearse      (without a GPU: stand-in servers)

Each phase is a daemon of its own that starts vLLM by its own configuration (`[language] replicas`, `tensor_parallel`),
proves it and watches it; its gateway runs with the default guards. Weights are random (`--load-format dummy`), every
token is a word (shapes.py), prompts differ.

**replicas**: a vLLM on every card. Over all cards the load goes through the daemon's own gateway. Over fewer it goes
through a gateway like it, which is told of the first of the daemon's servers alone: a start for every number would take
the time of the whole run. The cards that are left out hold the model and compute nothing. The load grows with the
cards. `alone` is the first card's vLLM, asked at its own port. Rounds alternate; a ratio is the median of the rounds'
ratios. Then one stream, alone and through the gateway, in turns.

**2, 4, 8**: one vLLM spread over so many cards; one stream, alone and through the daemon's gateway, in turns.

Goals: two replicas >= 1.9 times one, eight >= 7 times, so four >= 3.5 (7/8 of their number); one stream on two cards
>= 1.5 times as fast as on one. A phase that fails or has no time left is told, and the others go on. Prints JSON lines
as it goes, and JSON as its last line.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import rehearsal
from agent import BenchAgent
from card import Card, Cards
from chat import STREAMS_CAP, await_up, gateway, load
from figures import Figure, parser, progress, report
from journal import Journal
from language import peers
from node import environment
from shapes import SHAPES, checkpoint

NAME = "bench"
START_S = 260.0
"""Until every server is proved: 70 to 128 s were seen, of one."""
PHASE_S = {"replicas": 190.0, "spread": 130.0}
"""A phase is not begun with less time left: a start, and one round."""
STOP_S = 15.0
STREAMS_A_CLIENT = 32
FREE_MIB, FREE_S = 2048, 20.0
"""Before a phase: vLLM does not start where the one before has not given the memory back."""
WARM_S = 2.0
CONFIG = """\
[http]
port = 0
[gateway]
port = 0
processes = {processes}
streams_cap = {cap}
queue = {cap}
[language]
model = "bench"
server = "{server}"
context_tokens = 4096
slots = 256
tensor_parallel = {tensor_parallel}
replicas = {replicas}
start_timeout_s = {start_s}
{plugin}
"""
VLLM = """\
[plugins.vllm]
interpreter = "{python}"
dtype = "float16"
arguments = ["--load-format", "dummy"]
"""
REHEARSAL = "[plugins.rehearsal]\n"
# torch's symmetric memory would use NVLink multicast, which is switched off on hosts whose GPUs others share.
VLLM_ENVIRONMENT = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0"}
GOALS = {2: ">= 1.9", 4: ">= 3.5", 8: ">= 7"}
"""Replicas, to one."""
SPREAD_GOALS = {2: ">= 1.5"}


@dataclass
class Served:
    """A daemon whose language servers are ready."""

    agent: BenchAgent
    url: str
    """Of its gateway."""
    route: dict[str, Any]
    """As the daemon tells its gateway: `urls` and their `keys`."""
    shown: dict[str, Any]

    def first(self, count: int) -> dict[str, Any]:
        """The route to so many of its servers."""
        return {**self.route, "urls": self.route["urls"][:count]}

    def straight(self) -> tuple[str, str]:
        """The first server's own URL, and its key."""
        url = self.route["urls"][0]
        return url, self.route["keys"][url]


class Bench:
    def __init__(self, arguments: Any, cards: Cards, journal: Journal, folder: Path) -> None:
        self.arguments = arguments
        self.cards = cards
        self.journal = journal
        self.runs: dict[str, list[dict[str, Any]]] = {}
        """What was measured -> one entry for each round."""
        self._folder = folder
        self._environment = {**environment(folder / "points"), **VLLM_ENVIRONMENT}
        os.environ.update(self._environment)  # for gateways that are started here
        if arguments.rehearse:
            self._environment |= rehearsal.environment(folder / "rehearsal", len(cards.uuids))
        elif arguments.cards:
            self._environment["CUDA_VISIBLE_DEVICES"] = ",".join(cards.uuids)

    # ---- the daemon -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def serving(self, tensor_parallel: int, replicas: int) -> Iterator[Served]:
        """A daemon with this layout. Raises SystemExit with the ends of the logs where it does not come to serve."""
        given = self.arguments
        agent = BenchAgent(
            CONFIG.format(
                processes=given.processes,
                cap=STREAMS_CAP,
                server="rehearsal" if given.rehearse else "vllm",
                tensor_parallel=tensor_parallel,
                replicas=replicas,
                start_s=START_S,
                plugin=REHEARSAL if given.rehearse else VLLM.format(python=sys.executable),
            ),
            environment=self._environment,
        )
        model = agent.folder / "data" / "language" / NAME
        checkpoint(model, given.shape, given.tokenizer)
        if not self.cards.await_free(FREE_MIB, FREE_S):
            self.journal.write("memory", taken_mib=self.cards.used_mib())
        (model / "language.toml").write_text('format = "huggingface"\nfile = "."\ncontext_tokens = 32768\n')
        try:
            with agent:
                yield self._ready(agent, replicas)
        finally:
            if agent.process is not None:
                agent.end(signal.SIGKILL)  # its servers end with it

    def _ready(self, agent: BenchAgent, replicas: int) -> Served:
        """Wait until all serve; at the end of the time those that do are enough."""
        began = time.monotonic()
        until = began + min(START_S, self.journal.left_s - STOP_S)
        while True:
            shown = agent.call("language.show")
            ready = [one for one in shown["replicas"] if one["state"] == "ready"]
            failed = [one for one in shown["replicas"] if one["state"] == "failed"]
            late = time.monotonic() > until
            if (ready and len(ready) == replicas) or (ready and late):
                break
            lost = shown["replicas"] and len(failed) == len(shown["replicas"]) and failed[0]["restarts"] > 1
            if late or lost or (shown["state"] == "failed" and not shown["replicas"]):
                raise SystemExit(f"no server serves: {shown['reason']}\n{_tails(shown, agent)}")
            time.sleep(0.5)
        seconds = round(time.monotonic() - began, 1)
        cards, reasons = [one["accelerators"] for one in ready], [one["reason"] for one in failed]
        self.journal.write(
            "ready", seconds=seconds, ready=len(ready), of=replicas, cards=cards, reasons=reasons, why=shown["why"]
        )
        route = next(iter(agent.client.stream("language.routes")))["models"][0]
        return Served(agent, agent.call("state")["gateway"], route, shown)

    def on_their_cards(self, served: Served) -> int | None:
        """How many servers compute, by NVML, on the cards that they were given and on no others."""
        listed = self.cards.pids()
        if listed is None:
            return None
        right = 0
        for replica in served.shown["replicas"]:
            on = {uuid for uuid, pids in listed.items() if any(_session(pid) == replica["pid"] for pid in pids)}
            right += on == set(replica["accelerators"])
        self.journal.write("placement", right=right, of=len(served.shown["replicas"]))
        return right

    # ---- runs -------------------------------------------------------------------------------------------------------

    async def run(self, name: str, url: str, streams: int, seconds: float, turn: int, key: str = "") -> None:
        """One run, kept under `name`; the turn 0 is thrown away."""
        clients = -(-streams // STREAMS_A_CLIENT)
        try:
            found = await load(url, NAME, streams, seconds, turn, clients=clients, key=key)
        except (ValueError, TimeoutError, OSError) as error:
            self.journal.failures[name] = f"{type(error).__name__}: {error}"
            self.journal.write(name, turn=turn, failed=self.journal.failures[name])
            return
        self.journal.write(name, turn=turn, streams=streams, **found)
        if turn:
            self.runs.setdefault(name, []).append({"turn": turn, **found})

    async def one_stream(self, served: Served, cards: int, url: str) -> None:
        """Alone and through the gateway at `url`, in turns."""
        direct, key = served.straight()
        for turn in range(self.arguments.rounds + 1):
            seconds = self.arguments.one_seconds if turn else WARM_S
            if turn and self.journal.left_s < 2 * seconds + STOP_S:
                return
            pair = [(f"one stream, {cards} cards, alone", direct, key), (f"one stream, {cards} cards", url, "")]
            for name, place, shown in pair if turn % 2 else pair[::-1]:
                await self.run(name, place, 1, seconds, turn, shown)

    @contextlib.asynccontextmanager
    async def _before(self, served: Served, count: int) -> AsyncIterator[str]:
        """A gateway before so many of the servers: the daemon's own where that is all of them."""
        if count == len(served.route["urls"]):
            await await_up(served.url)
            yield served.url
        else:
            async with gateway(served.first(count), self.arguments.processes) as url:
                yield url

    async def replicas(self) -> None:
        given, total = self.arguments, len(self.cards.uuids)
        with self.serving(1, total) as served:
            right = self.on_their_cards(served)
            if right is not None:
                self.runs["placement"] = [{"right": right}]
            ready = len(served.route["urls"])
            async with contextlib.AsyncExitStack() as stack:
                counts = [count for count in (1, 2, 4, 8) if count <= ready]
                places = {count: await stack.enter_async_context(self._before(served, count)) for count in counts}
                direct, key = served.straight()
                streams = given.streams
                runs = [
                    partial(self.run, f"replicas, {count} cards", places[count], streams * count) for count in counts
                ]
                runs.append(partial(self.run, "replicas, 1 cards, alone", direct, streams, key=key))
                for turn in range(given.rounds + 1):
                    seconds = given.seconds if turn else WARM_S
                    shift = turn % len(runs)
                    for run in (*runs[shift:], *runs[:shift]):
                        if self.journal.left_s > seconds + STOP_S:
                            await run(seconds=seconds, turn=turn)
                with self.journal.part("one stream"):
                    await self.one_stream(served, 1, places[1])

    async def spread(self, cards: int) -> None:
        with self.serving(cards, 1) as served:
            self.on_their_cards(served)
            await await_up(served.url)
            await self.one_stream(served, cards, served.url)

    # ---- figures ----------------------------------------------------------------------------------------------------

    def median(self, name: str, key: str) -> float | None:
        values = [run[key] for run in self.runs.get(name, ()) if run[key] is not None]
        return statistics.median(values) if values else None

    def ratio(self, name: str, other: str, key: str) -> float | None:
        """The median of the rounds' ratios."""
        under = {run["turn"]: run[key] for run in self.runs.get(other, ())}
        ratios = [run[key] / under[run["turn"]] for run in self.runs.get(name, ()) if under.get(run["turn"])]
        return round(statistics.median(ratios), 3) if ratios else None

    def figures(self) -> list[Figure]:
        made = [*self._replica_figures(), *self._spread_figures()]
        errors = sum(run.get("errors", 0) for runs in self.runs.values() for run in runs)
        return [*made, Figure("errors", errors, "", "== 0")]

    def _replica_figures(self) -> Iterator[Figure]:
        one = "replicas, 1 cards"
        streams = self.arguments.streams
        if "placement" in self.runs:
            cards = len(self.cards.uuids)
            yield Figure("servers on their own card, by NVML", self.runs["placement"][0]["right"], "", f"== {cards}")
        for count in (1, 2, 4, 8):
            name = f"replicas, {count} cards"
            if name in self.runs:
                rate = self.median(name, "tokens_per_s")
                yield Figure(f"{count} cards, {streams * count} streams", rate and round(rate), "tok/s")
                if count > 1:
                    yield Figure(f"{count} cards to one, throughput", self.ratio(name, one, "tokens_per_s"), "x",
                                 GOALS[count])  # fmt: skip
        if f"{one}, alone" in self.runs:
            rate = self.median(f"{one}, alone", "tokens_per_s") or 0.0
            share = self.ratio(one, f"{one}, alone", "tokens_per_s")
            yield Figure(f"1 card, {streams} streams: to vLLM alone", share, "x", ">= 0.95", f"{rate:.0f} tok/s")

    def _spread_figures(self) -> Iterator[Figure]:
        one_ms = self.median("one stream, 1 cards", "token_ms")
        for cards in (1, 2, 4, 8):
            name = f"one stream, {cards} cards"
            through, alone = self.median(name, "token_ms"), self.median(f"{name}, alone", "token_ms")
            if through is None or alone is None:
                continue
            yield Figure(f"one stream on {cards}: a token", round(through, 3), "ms", "", f"{alone:.3f} ms alone")
            yield Figure(f"one stream on {cards}: to vLLM alone", self.ratio(name, f"{name}, alone", "token_ms"), "x",
                         "<= 1.05")  # fmt: skip
            first, direct = self.median(name, "first_ms"), self.median(f"{name}, alone", "first_ms")
            assert first is not None and direct is not None
            yield Figure(f"one stream on {cards}: first token", round(first, 2), "ms", "", f"{direct:.2f} ms alone")
            yield Figure(f"one stream on {cards}: added to the first token", round(first - direct, 2), "ms", "<= 5")
            if cards > 1 and one_ms:
                yield Figure(f"one stream: {cards} cards to one, speed", round(one_ms / through, 3), "x",
                             SPREAD_GOALS.get(cards, ""))  # fmt: skip


def _session(pid: int) -> int:
    """The leader of a process's session; 0 where it is gone."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def _tails(shown: dict[str, Any], agent: BenchAgent) -> str:
    """The ends of the servers' logs and the agent's."""
    logs = [Path(one["log"]) for one in shown["replicas"][:2]] + [agent.log_path]
    return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-2500:]}" for log in logs if log.exists())


def phases(chosen: list[str], cards: int) -> list[str]:
    """Those that so many cards can do."""
    return [name for name in chosen if name == "replicas" or int(name) <= cards]


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--tokenizer", type=Path, required=True)
    options.add_argument("--out", type=Path, help="a file for the JSON lines")
    options.add_argument("--cards", type=int, default=0, help="at most so many; 0: all")
    options.add_argument("--phases", nargs="*", default=["replicas", "2", "4"], choices=["replicas", "2", "4", "8"])
    options.add_argument("--shape", choices=sorted(SHAPES), default="7B")
    options.add_argument("--streams", type=int, default=128, help="for each card")
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--seconds", type=float, default=5.0, help="of one run of many streams")
    options.add_argument("--one-seconds", type=float, default=4.0, help="of one run of one stream")
    options.add_argument("--processes", type=int, default=16, help="of a gateway")
    options.add_argument("--deadline", type=float, default=560.0, help="seconds for everything")
    options.add_argument("--rehearse", action="store_true", help="without a GPU")
    given = options.parse_args()
    gpu, card = not given.rehearse, Card(not given.rehearse)
    journal, cards = Journal(given.out, given.deadline), Cards(gpu)
    if given.rehearse:
        cards.uuids = [f"GPU-{index}{index}" for index in range(given.cards or 2)]
    elif given.cards:
        cards.keep(given.cards)
    with tempfile.TemporaryDirectory(prefix="mhl-") as name:
        bench = Bench(given, cards, journal, Path(name))
        journal.write("begun", cards=cards.uuids, device=card.facts, cpus=os.cpu_count())
        for phase in phases(given.phases, len(cards.uuids)):
            if journal.fits(phase, PHASE_S["replicas" if phase == "replicas" else "spread"] if gpu else 0):
                progress(phase)
                with journal.part(phase):
                    asyncio.run(bench.replicas() if phase == "replicas" else bench.spread(int(phase)))
    document = {
        "device": card.facts,
        "cards": len(cards.uuids),
        "shape": given.shape,
        "weights": "random",
        "streams_a_card": given.streams,
        "gateway_processes": given.processes,
        "guards": ["guard"],
        "runs": bench.runs,
        "failures": journal.failures,
        "peers": peers(),
    }
    journal.write("found", figures=[figure.line() for figure in bench.figures()], **document)
    return report("gpu_language_many", bench.figures(), **document)


if __name__ == "__main__":
    sys.exit(main())
