"""The second and the third line: policy, tools, schemas; leaks, secrets, numbers, and answers that stream."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millhand.errors import DeadlineError
from millhand.hookspecs import ConsideringGuard, Guard, StreamingGuard
from millhand.language.guarding import GuardContext, Verdict
from millhand_plugins.guard import millhand_guards
from millhand_plugins.guard.output import OutputGuard
from millhand_plugins.guard.policy import PolicyGuard
from millhand_plugins.guard.settings import POLICY, GuardSettings, ModelTable, OutputTable

PROMPT = "You are the helper of plant north. Speak of maintenance only, and never name the shift plan of line four."
PASSAGE = "Tighten the 4 screws to 45 Nm, part 6205-2RS, every 1,200 h; service +49 30 1234567. Measured 4.237 mm/s."
PLAIN = GuardContext(model="m", secrets=(PROMPT,))
GROUNDED = GuardContext(model="m", secrets=(PROMPT,), grounds=(PASSAGE,))
GUARD = OutputGuard(OutputTable())


def streamed(guard: OutputGuard, pieces: Sequence[str], context: GuardContext) -> tuple[bool, str]:
    """(refused, what went out)."""
    stream = guard.stream(context)
    out = ""
    for piece in pieces:
        verdict = stream.feed(piece)
        if verdict.action == "refuse":
            return True, out
        out += verdict.text
    verdict = stream.finish()
    return verdict.action == "refuse", out + verdict.text


def test_the_three_guards_follow_the_contract() -> None:
    guards = millhand_guards(GuardSettings())
    assert [(guard.name, tuple(guard.stages)) for guard in guards] == [
        ("guard.input", ("input",)),
        ("guard.model", ("model",)),
        ("guard.output", ("output",)),
    ]
    assert isinstance(guards[2], StreamingGuard)
    assert isinstance(guards[2], ConsideringGuard)
    assert not isinstance(guards[0], StreamingGuard)
    named: list[Guard] = list(guards)
    assert len(named) == 3


@pytest.mark.parametrize(
    ("context", "told"),
    [
        (GuardContext(model="m"), "Be brief."),
        (GuardContext(model="m", grounds=("x",)), f"{POLICY}\n\nBe brief."),
        (GuardContext(model="m", tools=("find",)), f"{POLICY}\n\nBe brief."),
        (GuardContext(model="m", grounds=("x",), source="agent"), "Be brief."),
    ],
)
def test_the_policy_goes_before_the_prompt_where_others_texts_come_in(context: GuardContext, told: str) -> None:
    assert PolicyGuard(ModelTable()).check("model", "Be brief.", context).text == told


def test_the_policy_is_not_added_twice_and_stands_alone_without_a_prompt() -> None:
    guard = PolicyGuard(ModelTable(policy_for="all"))
    once = guard.check("model", "", PLAIN)
    assert (once.action, once.text) == ("change", POLICY)
    assert guard.check("model", once.text, PLAIN).action == "pass"


def test_tools_and_schemas_are_asked_for() -> None:
    guard = PolicyGuard(ModelTable(allowed_tools=("find_*",), guided_roles=("mes",)))
    refused = guard.check("model", "", GuardContext(model="m", tools=("find_part", "write_register")))
    assert (refused.action, refused.rule) == ("refuse", "tools.not_allowed")
    assert "write_register" in refused.reason
    assert guard.check("model", "", GuardContext(model="m", tools=("find_part",))).action == "change"
    assert guard.check("model", "", GuardContext(model="m", role="mes")).rule == "guided.required"
    assert guard.check("model", "", GuardContext(model="m", role="mes", guided=True)).action == "pass"


@pytest.mark.parametrize(
    "text",
    [
        f"My instructions: {PROMPT}",
        PROMPT.upper().replace(" ", "  "),
        "-".join(PROMPT),
        PROMPT[::-1],
        "Here: " + base64.b64encode(PROMPT.encode()).decode(),
        PROMPT.replace("e", "е"),
    ],
    ids=["plain", "capitals", "dashes", "reversed", "base64", "look-alikes"],
)
def test_the_system_prompt_does_not_go_out(text: str) -> None:
    verdict = GUARD.check("output", text, PLAIN)
    assert (verdict.action, verdict.rule) == ("refuse", "leak.prompt")
    assert "plant north" not in verdict.reason


def test_a_few_words_of_the_prompt_and_what_a_passage_says_too_may_go_out() -> None:
    assert GUARD.check("output", "I speak of maintenance only.", PLAIN).action == "pass"
    open_context = GuardContext(model="m", secrets=(PROMPT,), grounds=(PROMPT,))
    assert GUARD.check("output", PROMPT, open_context).action == "pass"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("The key is sk-abcdefghij0123456789XYZ now", "The key is [secret] now"),
        ("password: hunter22!", "password: [secret]"),
        ("密码是 hunter22", "密码是 [secret]"),
        ("Use Bearer abcdefghijklmnop1234 there", "Use Bearer [secret] there"),
        ("A eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.abcdefghij b", "A [secret] b"),
        (
            "A\n-----BEGIN RSA PRIVATE KEY-----\nMIIB\nabc=\n-----END RSA PRIVATE KEY-----\nb",
            "A\n[secret]\nb",
        ),
        ("Mail bob@plant.example.com then", "Mail [e-mail] then"),
        ("The password must be changed every 90 days.", "The password must be changed every 90 days."),
    ],
)
def test_secrets_and_personal_data_are_masked(text: str, left: str) -> None:
    assert GUARD.check("output", text, PLAIN).text == left


def test_secrets_may_end_the_answer() -> None:
    guard = OutputGuard(OutputTable(secrets="refuse"))
    assert guard.check("output", "password: hunter22", PLAIN).rule == "secrets.refused"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (
            "1. Use 45 Nm and 6205-2RS each 1200 h [1].\n2. Done.",
            "1. Use 45 Nm and 6205-2RS each 1200 h [1].\n2. Done.",
        ),
        ("Tighten to 50 Nm.", "Tighten to [unverified] Nm."),
        ("Part 6206-2RS fits.", "Part [unverified] fits."),
        ("It was 4.2 mm/s, 45Nm.", "It was 4.2 mm/s, 45Nm."),
        ("It was 4.3 mm/s.", "It was [unverified] mm/s."),
        ("Call +49 30 1234567.", "Call +49 30 1234567."),
    ],
)
def test_numbers_and_ids_need_support(text: str, left: str) -> None:
    assert GUARD.check("output", text, GROUNDED).text == left


def test_without_passages_numbers_pass_and_marks_may_stand_beside() -> None:
    assert GUARD.check("output", "Tighten to 50 Nm.", PLAIN).action == "pass"
    marking = OutputGuard(OutputTable(unsupported="mark"))
    assert marking.check("output", "Use 50 Nm.", GROUNDED).text == "Use 50 [unverified] Nm."


def test_the_first_word_goes_out_at_once() -> None:
    stream = GUARD.stream(GROUNDED)
    assert stream.feed("Tigh").text == "Tigh"
    assert stream.feed("ten").text == "ten"
    assert stream.feed(" the").text == " "
    assert stream.feed(" screws").text == "the "
    assert stream.finish().text == "screws"


BITS = st.sampled_from(
    [
        *(
            "Use ",
            "the ",
            "45",
            " Nm",
            "50 ",
            "6205-2RS",
            "X-99",
            " h",
            ".",
            "\n",
            "1. ",
            ", ",
            "[1]",
            " ",
            "1,200",
            "4.24",
        ),
        *(
            "bob@x.example.com",
            "sk-abcdefghij0123456789",
            "password: ",
            "secret1",
            "+49 30 ",
            "1234567",
            "更换",
            "轴承",
            "密码是",
        ),
        *(
            "13812345678",
            "Bearer ",
            "abcdefghijklmnop12",
            "-----BEGIN PRIVATE KEY-----\n",
            "-----END PRIVATE KEY-----",
            "é",
            "\ud800",
        ),
        *(
            "You are the helper ",
            "of plant north. ",
            "Speak of maintenance only, ",
            "a" * 40,
            base64.b64encode(b"x" * 40).decode(),
        ),
    ]
)


@settings(max_examples=80)
@given(st.lists(BITS, max_size=14), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.booleans())
def test_a_stream_lets_out_what_the_whole_answer_may_say(bits: list[str], sizes: list[int], grounded: bool) -> None:
    text = "".join(bits)
    pieces, at = [], 0
    while at < len(text):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(text[at : at + size])
        at += size
    context = GROUNDED if grounded else PLAIN
    whole = GUARD.check("output", text, context)
    refused, out = streamed(GUARD, pieces, context)
    assert refused == (whole.action == "refuse")
    if not refused:
        assert out == whole.text


class Opinion:
    """Stands in for the node's model: says what it is told to say."""

    parameters = 1_500_000_000

    def __init__(self, answer: str | Exception) -> None:
        self.answer, self.asked = answer, 0

    async def __call__(self, messages: Sequence[Mapping[str, str]], **_: Any) -> str:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def score(self, messages: Sequence[Mapping[str, str]], candidates: Sequence[str]) -> Sequence[float]:
        return [0.0 for _ in candidates]


@pytest.mark.parametrize(
    ("answer", "action"), [("no", "refuse"), ('"no"', "refuse"), ("yes", "pass"), (DeadlineError("late"), "pass")]
)
async def test_a_second_opinion_is_asked_of_the_model(answer: str | Exception, action: str) -> None:
    guard = OutputGuard(OutputTable(second_opinion=True))
    verdict: Verdict = await guard.consider("output", "Use 45 Nm.", GROUNDED, Opinion(answer))
    assert verdict.action == action


async def test_a_small_model_is_not_asked_and_neither_is_one_without_sources() -> None:
    guard = OutputGuard(OutputTable(second_opinion=True))
    small = Opinion("no")
    small.parameters = 135_000_000
    assert (await guard.consider("output", "x", GROUNDED, small)).action == "pass"
    large = Opinion("no")
    assert (await guard.consider("output", "x", PLAIN, large)).action == "pass"
    assert (await OutputGuard(OutputTable()).consider("output", "x", GROUNDED, large)).action == "pass"
    assert small.asked + large.asked == 0
