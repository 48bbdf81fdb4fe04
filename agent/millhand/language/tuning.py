"""Finds out by measuring which way of serving a language model pays on this node: program, threads, speculation.

One thing is changed at a time. What is the best so far and what challenges it run side by side and are asked in turn,
the best once before and once after: what it differs from itself is the noise. A challenger takes its place where it
is faster by more than the noise and the owner's margin, and every token that it writes greedily is the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from millhand.errors import LanguageError, MillhandError
from millhand.hookspecs import TunableServer
from millhand.language.launch import Launch
from millhand.language.process import free_port
from millhand.language.trial import TrialServer
from millhand.language.way import Way
from millhand.proof.document import Latency

WRITTEN_TOKENS = 48
PASSAGE_CHARACTERS = 500
ROUNDS = 3
HOPELESS = 1.15
"""One that takes so many times as long in the first round is not asked again."""
QUESTIONS = (
    "{passage}\n\nCopy the text above word for word.",
    "{passage}\n\nWrite the steps that the text above names as a list.",
    "{passage}\n\nWhat should a technician look at first? Answer in two sentences.",
    "Why does a bearing run warm? Answer in a few sentences.",
)
"""What orders and people ask: half of the answers can quote, half cannot."""


class Asked(NamedTuple):
    """All questions, asked once."""

    tokens: tuple[tuple[int, ...], ...]
    """Of each answer."""
    seconds: float
    """To read the prompts and write the answers, by the server's own clock."""
    token_ms: float
    """Mean time of a token that was written."""


@dataclass
class Pairs:
    """What was seen of a challenger beside the best so far."""

    shares: list[float] = field(default_factory=list)
    """Its time over the best's, a round each."""
    noises: list[float] = field(default_factory=list)
    """What the best differed from itself, as a share."""
    best_ms: list[float] = field(default_factory=list)
    token_ms: list[float] = field(default_factory=list)

    @property
    def share(self) -> float:
        return statistics.median(self.shares)

    @property
    def noise(self) -> float:
        return max(self.noises)

    @property
    def told(self) -> str:
        best, own = (1e3 / statistics.median(times) for times in (self.best_ms, self.token_ms))
        return f"{self.share:.0%} of the time, {own:.3g} tokens/s written to {best:.3g}, noise {self.noise:.1%}"

    @property
    def latency(self) -> Latency:
        return Latency(
            batch=1,
            p50_ms=statistics.median(self.token_ms),
            p99_ms=max(self.token_ms),
            original_p50_ms=statistics.median(self.best_ms),
            original_p99_ms=max(self.best_ms),
        )


@dataclass
class Tuned:
    """What came of it."""

    way: Way
    why: str
    tried: list[str] = field(default_factory=list)
    """A sentence for each."""
    latency: tuple[Latency, ...] = ()
    """Of the way beside the one before it; nothing where the default stayed."""


@dataclass(frozen=True)
class Tuner:
    """Where ways are tried."""

    server: TunableServer
    launch: Launch
    """What all ways have in common."""
    drafts: Mapping[str, Path]
    """Models that may draft, by name."""
    margin: float
    """By how much a way must be faster, as a share."""
    seconds: float
    """How long a challenger is measured at least."""
    scratch: Path

    def tune(self, base: Way, changes: Sequence[Mapping[str, Any]], text: str, tell: Callable[[str], None]) -> Tuned:
        """Try each change of the best way so far. Raises LanguageError where the default does not come up."""
        tuned = Tuned(base, "")
        left = list(changes)
        while left:
            with self._running(tuned.way) as best:
                prompts = _prompts(best, text)
                answers = _ask(best, prompts).tokens  # warms it too
                if _ask(best, prompts).tokens != answers:
                    tuned.tried.append(
                        f"{tuned.way} writes now one thing, now another: nothing can be compared with it."
                    )
                    break
                while left:
                    way = msgspec.structs.replace(tuned.way, **left.pop(0))
                    if way == tuned.way:
                        continue
                    tell(str(way))
                    if self._challenge(way, best, prompts, answers, tuned):
                        break  # which runs anew as the best
        tuned.why = tuned.why or f"It is served with {base}: nothing that was tried is faster with the same answers."
        return tuned

    def _challenge(
        self,
        way: Way,
        best: TrialServer,
        prompts: Sequence[str],
        answers: tuple[tuple[int, ...], ...],
        tuned: Tuned,
    ) -> bool:
        """Whether a way takes the place of the best; what was seen is told in `tuned`."""
        try:
            with self._running(way) as challenger:
                pairs = self._pairs(best, challenger, prompts, answers)
        except MillhandError as error:
            tuned.tried.append(f"{way}: refused, {error.message}.")
            return False
        gain = 1 - pairs.share
        if gain <= max(self.margin, pairs.noise):
            tuned.tried.append(f"{way}: the same answers, no gain beyond margin and noise: {pairs.told}.")
            return False
        tuned.tried.append(f"{way}: the same answers, faster: {pairs.told}.")
        tuned.why = f"It is served with {way}: {pairs.told}, beside {tuned.way}, and every token was the same."
        tuned.way, tuned.latency = way, (pairs.latency,)
        return True

    def _pairs(
        self,
        best: TrialServer,
        challenger: TrialServer,
        prompts: Sequence[str],
        answers: tuple[tuple[int, ...], ...],
    ) -> Pairs:
        """Raises LanguageError where the challenger answers anything else."""
        _require_same(_ask(challenger, prompts), answers)
        pairs, end_s = Pairs(), time.monotonic() + self.seconds
        while len(pairs.shares) < ROUNDS or time.monotonic() < end_s:
            before, own, after = (_ask(one, prompts) for one in (best, challenger, best))
            _require_same(own, answers)
            mean_s = (before.seconds + after.seconds) / 2
            pairs.shares.append(own.seconds / mean_s)
            pairs.noises.append(abs(before.seconds - after.seconds) / mean_s)
            pairs.best_ms += [before.token_ms, after.token_ms]
            pairs.token_ms.append(own.token_ms)
            if pairs.share > HOPELESS:
                break
        return pairs

    @contextlib.contextmanager
    def _running(self, way: Way) -> Iterator[TrialServer]:
        launch = launched(self.launch, way, self.drafts.get(way.draft), free_port())
        with TrialServer(self.server, launch, self.scratch / f"{time.monotonic_ns()}.log") as server:
            yield server


def launched(launch: Launch, way: Way, draft: Path | None, port: int = 0) -> Launch:
    """A launch in a way."""
    return dataclasses.replace(
        launch, port=port, threads=way.threads, program=way.program, speculation=way.speculation, draft=draft
    )


def changes_of(server: TunableServer, base: Way, drafts: Mapping[str, str], fixed: Mapping[str, Any]) -> list[Any]:
    """What may be tried, in order. drafts: name -> SHA-256; fixed: what the owner and the profile have said."""
    found: list[dict[str, Any]] = []
    if not fixed["threads"]:
        found += [{"threads": count} for count in dict.fromkeys((base.threads - 1, base.threads // 2)) if count > 0]
    programs = server.programs()
    found += [{"program": name, "release": programs[name]} for name in programs if name != base.program]
    if fixed["speculation"] == "none":
        kinds = [kind for kind in server.speculations if kind != "draft"]
        found += [{"speculation": kind, "draft": "", "draft_sha256": ""} for kind in kinds]
        if "draft" in server.speculations:
            found += [{"speculation": "draft", "draft": name, "draft_sha256": sha} for name, sha in drafts.items()]
    return found


def _prompts(server: TrialServer, text: str) -> list[str]:
    """The questions as the model's own template puts them. Raises LanguageError."""
    passage = " ".join(text.split())[:PASSAGE_CHARACTERS]
    found = []
    for question in QUESTIONS:
        said = {"messages": [{"role": "user", "content": question.format(passage=passage)}]}
        found.append(str(server.post("/apply-template", said)["prompt"]))
    return found


def _ask(server: TrialServer, prompts: Sequence[str]) -> Asked:
    tokens, total_ms, written_ms = [], 0.0, 0.0
    for prompt in prompts:
        body = {
            "prompt": prompt,
            "n_predict": WRITTEN_TOKENS,
            "temperature": 0,
            "cache_prompt": False,
            "return_tokens": True,
        }
        answer = server.post("/completion", body)
        timings = answer["timings"]
        tokens.append(tuple(answer["tokens"]))
        written_ms += float(timings["predicted_ms"])
        total_ms += float(timings["prompt_ms"]) + float(timings["predicted_ms"])
    count = sum(map(len, tokens))
    if not count:
        raise LanguageError("it writes nothing greedily")
    return Asked(tuple(tokens), total_ms / 1e3, written_ms / count)


def _require_same(asked: Asked, answers: tuple[tuple[int, ...], ...]) -> None:
    for number, (own, wanted) in enumerate(zip(asked.tokens, answers, strict=True), 1):
        if own != wanted:
            pairs = zip(own, wanted, strict=False)
            first = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(own), len(wanted)))
            raise LanguageError(f"its greedy answer {number} is another from token {first + 1} on")
