"""What the makers of this node offer for a target, asked in processes of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from millhand.errors import MillhandError
from millhand.workshop.jobs import RecipesAnswer, RecipesJob
from millhand.workshop.judge import PluginRef
from millhand.workshop.plan import Offer
from millhand.workshop.recipe import Target
from millhand.workshop.site import Site

DEADLINE_S = 60.0
"""Makers list recipes without heavy imports."""


@dataclass(frozen=True)
class Offers:
    """All recipes for a target."""

    offers: tuple[Offer, ...]
    failures: dict[str, MillhandError]
    """Plugin -> why it lists nothing."""
    versions: dict[str, str]
    """Of what jobs run with."""


def ask_makers(site: Site, target: Target, engines: bool, say: Callable[[str], None]) -> Offers:
    """Ask every plugin that has makers. engines: False leaves out what is no file of a lower precision."""
    offers: list[Offer] = []
    failures: dict[str, MillhandError] = {}
    versions: dict[str, str] = {}
    runner = site.runner(target, 1, DEADLINE_S)
    for name, plugin in site.plugins("millhand_makers"):
        say(f"asking plugin {name}")
        try:
            answer = runner.run(RecipesJob(plugin=plugin, target=target), RecipesAnswer)
        except MillhandError as error:
            failures[name] = error
            continue
        versions = answer.versions
        offers += [
            Offer(recipe, maker, plugin, options_digest(plugin))
            for maker, recipes in answer.makers.items()
            for recipe in recipes
            if engines or not (recipe.engine or recipe.precision == "fp32")
        ]
    return Offers(tuple(offers), failures, versions)


def options_digest(plugin: PluginRef) -> str:
    """SHA-256 of a plugin's table."""
    return hashlib.sha256(msgspec.json.encode(plugin.options, order="sorted")).hexdigest()
