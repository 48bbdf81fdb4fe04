"""One candidate at a time: taken from the shelf where it lies there as it would be made, else made; then proved."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from millhand.errors import MillhandError, ModelError
from millhand.proof.document import Proof
from millhand.workshop.keys import Keys
from millhand.workshop.plan import Offer
from millhand.workshop.proving import Prover
from millhand.workshop.shelf import Candidate, Record

MAKING = 0.7
"""Share of a candidate's progress that is its making; the rest is its proof."""

Told = Callable[[str, float, str], None]
"""A candidate's name, a share of 0 to 1, and the step's name."""


@dataclass
class Crafter:
    """Makes and proves the candidates of one build."""

    prover: Prover
    told: Told
    fresh: bool = False
    """Make anew what lies on the shelf."""
    ends_s: float | None = None
    """When the budget is used up, on time.monotonic()."""

    def __post_init__(self) -> None:
        self._work = self.prover.work
        self._shelf = self._work.site.shelf
        self._where = self._work.name, self._work.version, self._work.target.name
        self._stale: dict[tuple[str, frozenset[tuple[str, str]]], bool] = {}

    def candidates(self) -> list[Candidate]:
        """What lies on the shelf, made from the model's artifact as it is now."""
        found = self._shelf.candidates(*self._where)
        return [candidate for candidate in found if candidate.record.source_sha256 == self._work.source_sha256]

    def on_shelf(self, offer: Offer) -> Candidate | None:
        """The candidate that making this would give again, whole and tied to nothing that has changed; else None."""
        found = {candidate.name: candidate for candidate in self.candidates()}
        candidate, source = found.get(offer.name), found.get(offer.recipe.source)
        if candidate is None or self.fresh:
            return None
        record = candidate.record
        same = (
            record.maker == offer.maker
            and record.options_sha256 == offer.options_sha256
            and (record.recipe.precision, record.recipe.source) == (offer.recipe.precision, offer.recipe.source)
            and record.began_sha256 == (source.record.sha256 if source else "")
        )
        return candidate if same and self._is_whole(candidate) and not self.is_stale(candidate) else None

    def is_stale(self, candidate: Candidate) -> bool:
        """Whether it is tied to another library, driver or GPU than this machine's; of hardware that is not here that
        cannot always be told, and then it is not."""
        record = candidate.record
        tie = record.maker, frozenset(record.made.key.items())
        if tie not in self._stale:  # makers answer in processes of their own
            self._stale[tie] = self._differs(record)
        return self._stale[tie]

    def craft(self, offer: Offer) -> tuple[Proof, bool]:
        """Returns (proof, whether it was made now). Raises MillhandError or OSError where it fails."""
        candidate = self.on_shelf(offer)
        if candidate is not None:
            return self.prove(candidate), False
        candidate, proof = self._make(offer)
        return proof or self._prove(candidate, MAKING), True

    def prove(self, candidate: Candidate) -> Proof:
        """The proof that it has, where that still holds, or a new one. Raises MillhandError or OSError."""
        return self.prover.holds(candidate) or self._prove(candidate, 0.0)

    def _make(self, offer: Offer) -> tuple[Candidate, Proof | None]:
        """Have it made. What serves now is replaced together with its proof; anything else comes onto the shelf before
        it is proved, so that it need not be made again where that is cut off."""
        source = self._shelf.find(*self._where, offer.recipe.source) if offer.recipe.source else None
        choice = self._shelf.choice(*self._where)
        proof = None
        with self._shelf.staged(*self._where, offer.name) as folder:
            record = self._work.make(
                offer,
                source,
                self.prover.rows,
                self.prover.scratch,
                folder,
                self.deadline_s(),
                lambda share, step: self.told(offer.name, MAKING * share, step),
            )
            if choice is not None and choice.candidate == offer.name:
                proof = self._prove(Candidate(name=offer.name, folder=folder, record=record), MAKING)
        return self._shelf.find(*self._where, offer.name), proof

    def _prove(self, candidate: Candidate, begun: float) -> Proof:
        def progress(share: float, step: str) -> None:
            self.told(candidate.name, begun + (1 - begun) * share, step)

        return self.prover.prove(candidate, self.deadline_s(), progress)

    def _differs(self, record: Record) -> bool:
        site, target = self._work.site, self._work.target
        try:
            keys = Keys(site.registry, site.runner(target, 1, 0).interpreter)
            return bool(asyncio.run(keys.differences(record.maker, record.made, target)))
        except MillhandError:
            return target.runs_here

    def _is_whole(self, candidate: Candidate) -> bool:
        try:
            return self._shelf.subject(*self._where, candidate).digest() == candidate.record.sha256
        except ModelError:
            return False

    def deadline_s(self) -> float:
        """For the next step: the owner's, within what is left of the budget. Raises ModelError where nothing is."""
        deadline_s = self._work.site.config.workshop.deadline_s
        if self.ends_s is None:
            return deadline_s
        left_s = self.ends_s - time.monotonic()
        if left_s <= 0:
            raise ModelError("the budget was used up before it was done", hint="give it a larger --budget")
        return min(deadline_s, left_s)
