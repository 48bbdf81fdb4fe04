"""Which recipes are tried for a target, in which order, and which are not, with the reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from millhand.errors import InputError, suggestion
from millhand.workshop.judge import PluginRef
from millhand.workshop.recipe import Recipe, Target


@dataclass(frozen=True)
class Offer:
    """A recipe, and the maker that follows it."""

    recipe: Recipe
    maker: str
    plugin: PluginRef
    options_sha256: str = ""

    @property
    def name(self) -> str:
        return self.recipe.name


@dataclass(frozen=True)
class LeftOut:
    """A recipe that is not tried."""

    name: str
    precision: str
    why: str


@dataclass(frozen=True)
class Plan:
    """What to do, in order."""

    offers: tuple[Offer, ...]
    left_out: tuple[LeftOut, ...] = ()


@dataclass
class _Planner:
    """One plan in the making."""

    known: dict[str, Offer]
    budget_minutes: float | None
    ready: Collection[str]
    barred: Mapping[str, str]
    spent_minutes: float = 0.0
    offers: dict[str, Offer] = field(default_factory=dict)
    left_out: dict[str, LeftOut] = field(default_factory=dict)

    def add(self, offer: Offer, above: tuple[str, ...] = ()) -> bool:
        """Take a recipe in, after the one that it begins from; returns whether it is tried."""
        name = offer.name
        if name not in self.offers and name not in self.left_out:
            why = self._why_not(offer, above)
            if why:
                self.left_out.setdefault(name, LeftOut(name, offer.recipe.precision, why))
            else:
                self.spent_minutes += self._minutes(offer)
                self.offers[name] = offer
        return name in self.offers

    def _why_not(self, offer: Offer, above: tuple[str, ...]) -> str:
        """Empty where the recipe can be tried."""
        name, source, budget = offer.name, offer.recipe.source, self.budget_minutes
        if name in above:
            return "it begins from itself, by way of others"
        if source and source not in self.known:
            return f"it begins from '{source}', which no maker has for this target"
        if source and not self.add(self.known[source], (*above, name)):
            return f"it begins from '{source}', which is not tried"
        if name in self.barred:
            return self.barred[name]
        minutes = self._minutes(offer)
        if budget is not None and minutes and self.spent_minutes + minutes > budget:
            left = budget - self.spent_minutes
            return f"it takes about {minutes:g} min, and of the budget's {budget:g} are {left:g} left"
        return ""

    def _minutes(self, offer: Offer) -> float:
        return 0.0 if offer.name in self.ready else offer.recipe.minutes


def make_plan(
    offers: Sequence[Offer],
    target: Target,
    *,
    only: Sequence[str] = (),
    budget_minutes: float | None = None,
    ready: Collection[str] = (),
    barred: Mapping[str, str] | None = None,
) -> Plan:
    """Order recipes by the precisions that suit the target, each after the one that it begins from.

    only: these, and what they begin from. ready: names of those that lie on the shelf and cost nothing. barred: name ->
    why it cannot be tried. Raises InputError where `only` names one that is not offered.
    """
    known: dict[str, Offer] = {}
    taken = []
    for offer in offers:
        if offer.name in known:
            why = f"maker '{known[offer.name].maker}' has a recipe of this name, too"
            taken.append(LeftOut(f"{offer.name} of {offer.maker}", offer.recipe.precision, why))
        known.setdefault(offer.name, offer)
    for name in only:
        if name not in known:
            raise InputError(
                f"recipe '{name}' is not known for {target.name}{suggestion(name, known)}",
                hint=f"there are: {', '.join(known) or 'none'}",
            )
    planner = _Planner(known, budget_minutes, ready, barred or {})
    for offer in sorted(known.values(), key=lambda offer: _rank(offer, target)):
        if not only or offer.name in only:
            planner.add(offer)
    return Plan(tuple(planner.offers.values()), (*planner.left_out.values(), *taken))


def _rank(offer: Offer, target: Target) -> int:
    """Place in the profile's order; what it does not name comes last."""
    precisions = target.precisions
    return precisions.index(offer.recipe.precision) if offer.recipe.precision in precisions else len(precisions)
