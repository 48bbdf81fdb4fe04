"""The reviser: a small model chooses and phrases, a large one writes whole; both languages; wrong answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import pytest

from millhand.errors import LanguageError
from millhand.language.grounding import ground
from millhand.language.pack import PackSettings, find_pack
from millhand.language.passages import Passage
from millhand.language.revision import fault_texts
from millhand.records import Alert, Citation, Severity, WorkOrder
from millhand_plugins.orders.reviser import PHRASES, ModelReviser
from millhand_plugins.orders.writer import DeterministicWriter, read_knowledge

PACK = find_pack(PackSettings())
ALERT = Alert(
    id="7c9e6679-7425-40de-944b-e07fc1f90ae7",
    asset="pump-3",
    model="rig-fault",
    rule="fault",
    kind="bearing_outer",
    severity=Severity.WARNING,
    message="pump-3: bearing outer, certainty 0.97",
    raised_ns=1_700_000_000_000_000_000,
    evidence={"facts": {"velocity_rms_mm_s": 4.237}},
)
MANUAL = Passage(
    id="p1",
    source="pump.pdf",
    page=3,
    text="The bearing.\n1. Open the drain of the housing.\n2) Weigh the old grease.\n",
)


class Script:
    """A scripted model: answers in order, or by a function; scores by a preference."""

    def __init__(self, parameters: int, answers: Sequence[str] = (), prefer: str = "", scores: bool = True) -> None:
        self.parameters = parameters
        self.asked: list[tuple[Sequence[Mapping[str, str]], Any]] = []
        self._answers, self._prefer, self._scores = list(answers), prefer, scores

    async def __call__(
        self, messages: Sequence[Mapping[str, str]], *, schema: Any = None, max_tokens: int = 256, **_: Any
    ) -> str:
        self.asked.append((messages, schema))
        return self._answers.pop(0)

    async def score(self, messages: Sequence[Mapping[str, str]], candidates: Sequence[str]) -> Sequence[float]:
        if not self._scores:
            raise LanguageError("no likelihoods here", retriable=False)
        self.asked.append((messages, tuple(candidates)))
        return [float(self._prefer in candidate) for candidate in candidates]


def draft(language: Any = "en") -> WorkOrder:
    return DeterministicWriter(read_knowledge(language=language), language).write(ALERT, [])


Revise = Callable[..., Any]


async def revised(script: Script, language: str = "en", passages: Sequence[Passage] = (MANUAL,)) -> WorkOrder:
    return await ModelReviser().revise(draft(language), ALERT, [ALERT], passages, PACK, script)


async def test_a_small_model_chooses_cause_and_step_and_phrases_one_sentence() -> None:
    script = Script(135_000_000, ["The bearing knocks. It has"], prefer="Weigh")
    order = await revised(script)
    first = PACK.faults["bearing_outer"].causes[0].text["en"]
    assert order.likely_cause == f"{draft().likely_cause} Most likely: {first}"
    assert order.action == (*draft().action, "Weigh the old grease.")
    assert order.citations == (Citation("p1", "pump.pdf, page 3"),)
    assert order.symptom == f"{draft().symptom} The bearing knocks."
    assert order.priority == draft().priority
    assert [asked for _, asked in script.asked] == [
        tuple(cause.text["en"] for cause in PACK.faults["bearing_outer"].causes),
        ("Open the drain of the housing.", "Weigh the old grease.", "none"),
        None,
    ]
    system, user = script.asked[0][0]
    assert system["content"] == PACK.prompt("policy", "en")
    assert "facts.velocity_rms_mm_s = 4.237" in user["content"]


async def test_none_of_the_steps_may_fit_and_a_cut_sentence_is_left_out() -> None:
    order = await revised(Script(0, ["The bearing knocks and"], prefer="none"))
    assert (order.action, order.citations, order.symptom) == (draft().action, (), draft().symptom)


async def test_without_likelihoods_it_chooses_by_an_enumeration() -> None:
    causes = [cause.text["en"] for cause in PACK.faults["bearing_outer"].causes]
    script = Script(1, [json.dumps({"text": causes[2]}), "A sentence."], scores=False)
    order = await revised(script, passages=())
    assert order.likely_cause.endswith(causes[2])
    assert script.asked[0][1]["properties"]["text"]["enum"] == causes


async def test_a_small_model_in_chinese_writes_nothing_of_its_own() -> None:
    script = Script(135_000_000, prefer="润滑")
    order = await revised(script, "zh", passages=())
    assert order.language == "zh"
    assert (
        order.likely_cause
        == "轴承外圈剥落或磨损：疲劳、润滑不足、污染或安装倾斜。最可能的原因："
        + (PACK.faults["bearing_outer"].causes[1].text["zh"])
    )
    assert (order.symptom, order.action) == (draft("zh").symptom, draft("zh").action)
    assert script.asked[0][0][0]["content"] == PACK.prompt("policy", "zh")


async def test_a_kind_that_the_pack_does_not_know_keeps_its_cause() -> None:
    alert = msgspec.structs.replace(ALERT, kind="belt_slip")
    script = Script(1, ["It slips."])
    order = await ModelReviser().revise(draft(), alert, [], (), PACK, script)
    assert (order.likely_cause, len(script.asked)) == (draft().likely_cause, 1)


@pytest.mark.parametrize("language", ["en", "zh"])
async def test_what_the_table_does_not_know_comes_from_the_pack_and_holds(language: str) -> None:
    """An owner's table may lack a kind that the pack has: then the draft is a general one."""
    kinds = {name: kind for name, kind in read_knowledge(language=language).items() if name != "cavitation"}
    alert = msgspec.structs.replace(ALERT, kind="cavitation", message="pump-3: cavitation, certainty 0.9")
    general = DeterministicWriter(kinds, language).write(alert, [])
    script = Script(1, ["And so on"], prefer="strainer" if language == "en" else "过滤器")
    version = await ModelReviser().revise(general, alert, [], (), PACK, script)
    order = ground(version, general, [], fault_texts(PACK, "cavitation", language))
    assert order.struck == ()
    assert order.action[:3] == tuple(PACK.steps("cavitation", language))
    assert (order.minutes, order.skill) == (60, PACK.term("mechanic", language))
    assert order.parts == (PACK.term("filter", language),)
    assert PACK.faults["cavitation"].causes[0].text[language] in order.likely_cause
    assert (PACK.faults["cavitation"].symptom["zh"] in order.symptom) == (language == "zh")


WRITTEN = {
    "symptom": "pump-3: impacts at the bearing.",
    "likely_cause": "Lack of lubrication of the outer race.",
    "action": ["Check lubrication."],
    "priority": 1,
    "parts": ["drive-end bearing"],
    "tools": [],
    "skill": "mechanical fitter",
    "minutes": 45,
    "evidence_ids": ["facts.velocity_rms_mm_s"],
    "citations": ["p1"],
}


@pytest.mark.parametrize("language", ["en", "zh"])
async def test_a_large_model_writes_whole(language: str) -> None:
    script = Script(1_500_000_000, [json.dumps(WRITTEN)])
    order = await revised(script, language)
    assert (order.symptom, order.action, order.minutes, order.priority) == (
        WRITTEN["symptom"], ("Check lubrication.",), 45, 1,
    )  # fmt: skip
    assert order.citations == (Citation("p1", "pump.pdf, page 3"),)
    assert (order.id, order.evidence, order.language) == (draft().id, draft().evidence, language)
    ((messages, schema),) = script.asked
    assert schema["properties"]["citations"]["items"]["enum"] == ["p1"]
    assert "facts.velocity_rms_mm_s" in schema["properties"]["evidence_ids"]["items"]["enum"]
    for part in ("[p1] The bearing.", draft(language).symptom, "4.237", "bearing_outer: pump-3"):
        assert part in messages[1]["content"], part


@pytest.mark.parametrize(
    "answer",
    [
        "no JSON",
        "[]",
        json.dumps({**WRITTEN, "priority": 9}),
        json.dumps({**WRITTEN, "action": []}),
        json.dumps({**WRITTEN, "action": ["x"] * 99}),
        json.dumps({**WRITTEN, "extra": 1}),
        json.dumps({**WRITTEN, "minutes": "45"}),
        "{" * 100_000,
        '{"a":' * 5_000,
    ],
    ids=["text", "list", "priority", "no-steps", "many-steps", "extra", "type", "long", "deep"],
)
async def test_what_is_not_of_the_form_is_an_error(answer: str) -> None:
    with pytest.raises(LanguageError, match="form"):
        await revised(Script(7_000_000_000, [answer]))


async def test_a_choice_that_was_no_candidate_is_an_error() -> None:
    for answer in ('{"text": "another"}', "no JSON", "[]"):
        with pytest.raises(LanguageError):
            await revised(Script(1, [answer], scores=False))


def test_both_languages_have_every_phrase() -> None:
    assert {len(phrases) for phrases in PHRASES.values()} == {len(PHRASES["en"])}
    assert set(read_knowledge(language="zh")) == set(read_knowledge())
