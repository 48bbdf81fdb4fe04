"""What of a long conversation the model still sees."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millhand.errors import InputError
from millhand.language.conversation import Turn, fitting, title_of, tokens_of


def turns(*texts: str) -> list[Turn]:
    return [
        Turn(role="assistant" if number % 2 else "user", text=text, at_ns=number) for number, text in enumerate(texts)
    ]


def test_a_short_conversation_goes_whole():
    messages, left_out = fitting("policy", turns("why", "because"), "and now", 1000)
    assert left_out == 0
    assert [(message["role"], message["content"]) for message in messages] == [
        ("system", "policy"),
        ("user", "why"),
        ("assistant", "because"),
        ("user", "and now"),
    ]


def test_the_oldest_pairs_are_left_out():
    earlier = turns("a" * 300, "b" * 300, "c" * 300, "d" * 300)
    messages, left_out = fitting("p", earlier, "q", 4 * 104 - 50)
    assert left_out == 2
    assert [message["content"][0] for message in messages] == ["p", "c", "d", "q"]


def test_a_question_that_is_too_long_is_refused():
    with pytest.raises(InputError, match="100 are left for it"):
        fitting("p", [], "q" * 1000, 100)


@given(
    st.lists(st.text(max_size=200), max_size=12).filter(lambda texts: len(texts) % 2 == 0),
    st.integers(min_value=100, max_value=600),
)
def test_what_goes_is_the_newest_and_fits(texts, tokens_cap):
    earlier = turns(*texts)
    messages, left_out = fitting("policy", earlier, "question", tokens_cap)
    assert left_out % 2 == 0
    assert [message["content"] for message in messages[1:-1]] == texts[left_out:]
    assert sum(tokens_of(message["content"]) for message in messages) <= tokens_cap
    if left_out:  # one pair more would not have fitted
        pair = sum(tokens_of(text) for text in texts[left_out - 2 : left_out])
        assert sum(tokens_of(message["content"]) for message in messages) + pair > tokens_cap


@pytest.mark.parametrize(
    ("question", "title"), [("  why\n does it hum? ", "why does it hum?"), ("x" * 100, "x" * 59 + "…")]
)
def test_a_title_is_the_beginning_of_the_question(question, title):
    assert title_of(question) == title
