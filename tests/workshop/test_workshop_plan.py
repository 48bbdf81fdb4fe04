"""Which recipes are tried, in which order, and what is said of the others."""

from __future__ import annotations

from typing import Any

import pytest

from millhand.errors import InputError
from millhand.workshop.judge import PluginRef
from millhand.workshop.plan import Offer, Plan, make_plan
from millhand.workshop.recipe import Recipe, Target

GPU = Target(name="sm80", accelerator="", precisions=("fp16", "int8", "bf16", "fp32"))


def offer(name: str, precision: str, source: str = "", minutes: float = 1.0, maker: str = "m") -> Offer:
    recipe = Recipe(name=name, precision=precision, description="", source=source, minutes=minutes)
    return Offer(recipe, maker, PluginRef(module="m"))


OFFERS = [
    offer("int4", "int4"),
    offer("engine-int8", "int8", source="int8", minutes=3),
    offer("int8", "int8", minutes=2),
    offer("engine-fp16", "fp16", minutes=1),
    offer("engine-fp32", "fp32"),
]


def planned(plan: Plan) -> list[str]:
    return [offer.name for offer in plan.offers]


def left_out(plan: Plan) -> dict[str, str]:
    return {left.name: left.why for left in plan.left_out}


def make(offers: list[Offer] = OFFERS, **options: Any) -> Plan:
    return make_plan(offers, GPU, **options)


def test_the_profiles_precisions_order_and_sources_come_first() -> None:
    plan = make()
    assert planned(plan) == ["engine-fp16", "int8", "engine-int8", "engine-fp32", "int4"]
    assert not plan.left_out


def test_a_budget_leaves_out_what_does_not_fit_and_what_begins_from_it() -> None:
    plan = make(budget_minutes=2.5)
    assert planned(plan) == ["engine-fp16", "engine-fp32"]
    why = left_out(plan)
    assert why["int8"] == "it takes about 2 min, and of the budget's 2.5 are 1.5 left"
    assert why["engine-int8"] == "it begins from 'int8', which is not tried"
    assert set(why) == {"int8", "engine-int8", "int4"}


def test_what_lies_on_the_shelf_costs_nothing() -> None:
    assert planned(make(budget_minutes=3.5, ready={"int8", "engine-fp16"})) == ["engine-fp16", "int8", "engine-int8"]


def test_only_takes_what_it_begins_from_along() -> None:
    assert planned(make(only=["engine-int8"])) == ["int8", "engine-int8"]
    with pytest.raises(InputError, match=r"recipe 'int-8' is not known for sm80; did you mean 'int8'\?") as error:
        make(only=["int-8"])
    assert "engine-fp16" in error.value.hint


def test_circles_orphans_and_taken_names_are_told() -> None:
    plan = make([
        offer("hen", "int8", source="egg"),
        offer("egg", "int8", source="hen"),
        offer("orphan", "int8", source="nothing"),
        offer("twin", "fp16"),
        offer("twin", "int8", maker="other"),
    ])  # fmt: skip
    assert planned(plan) == ["twin"]
    why = left_out(plan)
    assert why["orphan"] == "it begins from 'nothing', which no maker has for this target"
    assert why["twin of other"] == "maker 'm' has a recipe of this name, too"
    assert why["hen"] == "it begins from itself, by way of others"
    assert why["egg"] == "it begins from 'hen', which is not tried"


def test_what_is_barred_bars_what_begins_from_it() -> None:
    plan = make(barred={"int8": "there are no rows"})
    assert left_out(plan) == {
        "int8": "there are no rows",
        "engine-int8": "it begins from 'int8', which is not tried",
    }
