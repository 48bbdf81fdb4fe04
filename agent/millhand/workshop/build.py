"""One build: plans, has candidates made and proved, and chooses."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from millhand.errors import InputError, MillhandError, ModelError
from millhand.proof.document import ORIGINAL, Proof
from millhand.proof.keys import node_key
from millhand.workshop.crafting import Crafter
from millhand.workshop.gate import choose
from millhand.workshop.gathering import gather
from millhand.workshop.listener import Listener
from millhand.workshop.offers import Offers, ask_makers
from millhand.workshop.original import OriginalProver
from millhand.workshop.plan import Offer, Plan, make_plan
from millhand.workshop.proving import Prover
from millhand.workshop.recipe import Target
from millhand.workshop.report import BuildReport, Outcome, State, write_report
from millhand.workshop.rows import Rows
from millhand.workshop.shelf import Candidate, Choice
from millhand.workshop.site import Site
from millhand.workshop.work import Work, now, open_work, told


@dataclass(frozen=True)
class Order:
    """What the owner wants built."""

    model: str
    target: Target
    version: int | None = None
    """None takes the newest that the model's policy serves."""
    budget_minutes: float | None = None
    data: Path | None = None
    only: tuple[str, ...] = ()
    fresh: bool = False
    """Make anew what lies on the shelf."""
    engines: bool = True
    """False: only files of lower precisions."""
    typical_batch: int = 1


def build(site: Site, order: Order, listener: Listener) -> BuildReport:
    """Carry out an order. A candidate that fails is an outcome of the report.

    Raises MillhandError where nothing can be built at all: the model or the target, no maker, no rows, or another
    build of the model under way.
    """
    try:
        return _carry_out(site, order, listener)
    except OSError as error:
        raise site.shelf.unwritable(error) from error


def _carry_out(site: Site, order: Order, listener: Listener) -> BuildReport:
    ends_s = None if order.budget_minutes is None else time.monotonic() + 60 * order.budget_minutes
    work = open_work(site, order.model, order.version, order.target, order.typical_batch)
    with site.shelf.claimed(work.name), site.shelf.scratch(work.name, work.version, work.target.name) as scratch:
        offers = ask_makers(site, order.target, order.engines, lambda step: listener.progress(work.name, 0, step))
        rows, missing = _rows(work, order, offers, scratch, listener)
        key = node_key(site.config.node.data_dir)
        prover = Prover(work, rows, scratch, key, offers.versions)
        crafter = Crafter(prover, listener.progress, order.fresh, ends_s)
        _check_offers(work, offers, crafter)
        original = (
            OriginalProver(work, rows, scratch, key) if rows and site.serves_on(work.folder, work.target) else None
        )
        return _Build(work, order, listener, crafter, offers, missing, original).run()


@dataclass
class _Build:
    """A build whose parts are there."""

    work: Work
    order: Order
    listener: Listener
    crafter: Crafter
    offers: Offers
    missing_rows: str
    """Why there are no rows; empty where there are, or where none are needed."""
    original: OriginalProver | None
    """None where the model does not serve on the target."""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    proofs: dict[str, Proof] = field(default_factory=dict)

    def run(self) -> BuildReport:
        plan = self._plan()
        brought = self._brought(plan)
        self.listener.planned([*(offer.name for offer in plan.offers), *(candidate.name for candidate in brought)])
        for name, error in self.offers.failures.items():
            self._tell(Outcome(name=name, precision="", state="failed", why=error.message, hint=error.hint))
        for left in plan.left_out:
            self._tell(Outcome(name=left.name, precision=left.precision, state="not tried", why=left.why))
        original = self._prove_original()
        for offer in plan.offers:
            self._try(offer)
        for candidate in brought:
            self._prove(candidate)
        return self._finish(original)

    def _plan(self) -> Plan:
        order, offers = self.order, self.offers.offers
        why = f"it needs rows to calibrate with: {self.missing_rows}"
        return make_plan(
            offers,
            order.target,
            only=order.only,
            budget_minutes=order.budget_minutes,
            ready={offer.name for offer in offers if self.crafter.on_shelf(offer)},
            barred={offer.name: why for offer in offers if offer.recipe.calibrated} if self.missing_rows else {},
        )

    def _brought(self, plan: Plan) -> list[Candidate]:
        """What was brought onto the shelf and no maker here has a recipe for: it can be proved all the same."""
        if self.order.only or not self.order.target.runs_here:
            return []
        known = {*(offer.name for offer in self.offers.offers), *(left.name for left in plan.left_out)}
        return [
            candidate
            for candidate in self.crafter.candidates()
            if candidate.name not in known and (self.order.engines or not candidate.record.recipe.engine)
        ]

    def _prove_original(self) -> Outcome | None:
        """So that it may serve where no candidate does, under `require_proof` too."""
        if self.original is None:
            return None
        started_s = time.monotonic()
        try:
            proof = self.original.holds(self.offers.versions)
            made = proof is None
            proof = proof or self.original.prove(
                self.crafter.deadline_s(), lambda share, step: self.listener.progress(ORIGINAL, share, step)
            )
        except (MillhandError, OSError) as error:
            outcome = _failed(ORIGINAL, "", error, started_s)
        else:
            why, minutes = " ".join(proof.reasons), _minutes(started_s)
            outcome = Outcome(name=ORIGINAL, precision="", state="passed", why=why, made=made, minutes=minutes)
        self.listener.outcome(outcome)
        return outcome

    def _try(self, offer: Offer) -> None:
        """Make and prove, or take from the shelf; whatever fails is the candidate's own failure."""
        started_s, source = time.monotonic(), offer.recipe.source
        try:
            if source and self.outcomes[source].state == "failed":
                raise ModelError(f"it begins from '{source}', which failed")
            proof, made = self.crafter.craft(offer)
        except (MillhandError, OSError) as error:
            self._tell(_failed(offer.name, offer.recipe.precision, error, started_s))
        else:
            self._keep(proof, made, started_s)

    def _prove(self, candidate: Candidate) -> None:
        started_s = time.monotonic()
        try:
            if self.crafter.is_stale(candidate):
                raise ModelError("it is tied to another library, driver or GPU, and no maker here can make it anew")
            proof = self.crafter.prove(candidate)
        except (MillhandError, OSError) as error:
            self._tell(_failed(candidate.name, candidate.record.recipe.precision, error, started_s))
        else:
            self._keep(proof, False, started_s)

    def _keep(self, proof: Proof, made: bool, started_s: float) -> None:
        self.proofs[proof.candidate] = proof
        state: State = ("passed" if proof.passed else "refused") if proof.executed else "built"
        self._tell(
            Outcome(
                name=proof.candidate,
                precision=proof.precision,
                state=state,
                why=" ".join(proof.reasons),
                made=made,
                minutes=_minutes(started_s),
            )
        )

    def _tell(self, outcome: Outcome) -> None:
        self.outcomes[outcome.name] = outcome
        self.listener.outcome(outcome)

    def _finish(self, original: Outcome | None) -> BuildReport:
        """Choose, and write down what became of all."""
        work, prover = self.work, self.crafter.prover
        chosen = why = ""
        if work.target.runs_here:
            settings = work.site.config.workshop
            chosen, why = choose(self._competing(), work.source_bytes, work.typical_batch, settings)
            choice = Choice(candidate=chosen, source_sha256=work.source_sha256, why=why, date=now())
            work.site.shelf.choose(work.name, work.version, work.target.name, choice)
        report = BuildReport(
            model=work.name,
            version=work.version,
            target=work.target.name,
            executed=work.target.runs_here,
            source_sha256=work.source_sha256,
            source_bytes=work.source_bytes,
            typical_batch=work.typical_batch,
            data=prover.rows.source if prover.rows else "",
            data_path="" if self.order.data is None else str(self.order.data.absolute()),
            original=original,
            outcomes=tuple(self.outcomes.values()),
            chosen=chosen,
            why=why,
            date=now(),
        )
        write_report(work.place, report)
        return report

    def _competing(self) -> dict[str, Proof]:
        """What was proved now, and what was proved on this node before and is as it was then."""
        proofs = dict(self.proofs)
        for candidate in self.crafter.candidates():
            outcome = self.outcomes.get(candidate.name)
            if candidate.name in proofs or (outcome is not None and outcome.state == "failed"):
                continue
            proof = self.crafter.prover.holds(candidate, same_rows=False)
            if proof is not None and not self.crafter.is_stale(candidate):
                proofs[candidate.name] = proof
        return proofs


def _rows(work: Work, order: Order, offers: Offers, scratch: Path, listener: Listener) -> tuple[Rows | None, str]:
    """The rows to calibrate with and to judge by, or why there are none. Raises InputError where nothing goes without
    them: what runs here must be judged, and what the owner names must be read."""
    here = order.target.runs_here
    if not here and order.data is None and not any(offer.recipe.calibrated for offer in offers.offers):
        return None, ""
    on_line = told(lambda share, step: listener.progress(work.name, share, step))
    try:
        return gather(work.site, work.folder.manifest, order.data, scratch, on_line), ""
    except InputError as error:
        if here or order.data is not None:
            raise
        return None, f"{error.message}; {error.hint}"


def _check_offers(work: Work, offers: Offers, crafter: Crafter) -> None:
    """Raises ModelError where there is nothing to do."""
    if offers.offers or crafter.candidates():
        return
    failures = "".join(f"; plugin '{name}': {error.message}" for name, error in offers.failures.items())
    raise ModelError(
        f"no maker has a recipe for '{work.name}' on {work.target.name}{failures}",
        hint="name a plugin that brings makers, such as [plugins.quantize], and install what it needs",
    )


def _failed(name: str, precision: str, error: Exception, started_s: float) -> Outcome:
    why, hint = (
        (error.message, error.hint)
        if isinstance(error, MillhandError)
        else (f"the shelf cannot be written: {error}", "make room, or mend its permissions")
    )
    return Outcome(
        name=name, precision=precision, state="failed", why=why, hint=hint, made=True, minutes=_minutes(started_s)
    )


def _minutes(started_s: float) -> float:
    return (time.monotonic() - started_s) / 60
