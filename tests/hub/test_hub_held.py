"""`Held` is a plain set of row numbers, told by its first hole."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from millhand_hub.held import Held

SPANS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 8)), max_size=30)


@given(st.integers(0, 10), SPANS)
def test_held_equals_a_set(base, spans):
    held, model = Held(base), set(range(1, base + 1))
    for first, more in spans:
        last = first + more
        assert held.has(first, last) == (set(range(first, last + 1)) <= model)
        held.add(first, last)
        model |= set(range(first, last + 1))
        assert held.upto == next(number for number in range(1, 100) if number not in model) - 1
        ahead = [number for start, end in held.ahead.items() for number in range(start, end + 1)]
        assert len(ahead) == len(set(ahead)) and set(ahead) == {n for n in model if n > held.upto}
        held = Held(held.upto, held.ahead)  # as it comes back from the file
