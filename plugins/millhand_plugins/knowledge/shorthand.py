"""Maintenance shorthand in full words: `repl hyd hse` -> `replace hydraulic hose`.

Each word gets candidates (what the lexicon has seen, masks for ids and numbers, its parts, near words of the
vocabulary), and a linear model chooses among them by where they come from, how often they were seen, the form of the
word and its neighbours. The weights are an averaged perceptron's (Collins, EMNLP 2002), trained by train_shorthand.py;
the model card says on what. Pure Python, no more than a few dictionary look-ups a word.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

MASKS = ("<id>", "<num>", "<date>", "<sensitive>")
MODEL = Path(__file__).with_name("shorthand.json.gz")
TEXT_CHARACTERS_CAP = 2000
"""More of a text is not read word by word: notes are short, and a manual's page is prose."""
WORD_CHARACTERS_CAP = 60
EDGE = ""
"""The word before the first and after the last."""
SHARE_NEAR = 0.55
"""Pairs of letters that two near words share at least (Dice)."""
SHORTEST_NEAR = 4
"""A shorter word has too many neighbours."""
TIMES_CERTAIN = 8
INFLECTIONS = ("s", "es", "d", "ed", "ing", "r", "er", "ers", "ly")
PIECES = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)?|\d+(?:\.\d+)?|[^A-Za-z0-9]")
ID_AHEAD = re.compile(r"[A-Za-z]{1,3}\d{2,}")
AND = {"&": "and", "+": "and"}

Counts = dict[str, dict[str, int]]


class Candidate(NamedTuple):
    """One way to write a word in full."""

    text: str
    origins: tuple[str, ...]
    """Where it comes from: `exact` and `lower` (the lexicon), `word`, `kept` (as it is), `mask`, `parts`, `led` (an id
    ahead), `near`, `short`, `two` (words in one), `merge` (one of several)."""
    span: int = 1
    """Words that it stands for; those after the first become empty."""


@dataclass
class Lexicon:
    """What was counted in the training texts."""

    exact: Counts = field(default_factory=dict)
    """Word as written -> full form -> times."""
    lower: Counts = field(default_factory=dict)
    before: Counts = field(default_factory=dict)
    """`previous word`, `word` (lower case, tab between) -> full form -> times; of words with several full forms."""
    after: Counts = field(default_factory=dict)
    merges: Counts = field(default_factory=dict)
    """Two or three words (lower case, spaces between) -> their one full form -> times."""
    words: dict[str, int] = field(default_factory=dict)
    """Words of full texts -> times."""
    pairs: dict[str, int] = field(default_factory=dict)
    """Neighbours in full texts (space between) -> times."""
    common: list[str] = field(default_factory=list)
    """Plain English words of other texts, which are no slips of the pen."""
    weights: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path = MODEL) -> Lexicon:
        """Read a model. Raises OSError, ValueError."""
        return cls(**json.loads(gzip.decompress(path.read_bytes())))


class Shorthand:
    """Writes short texts in full. Thread-safe: it only reads."""

    def __init__(self, lexicon: Lexicon) -> None:
        self.lexicon = lexicon
        self._by_first: dict[str, list[str]] = {}
        self._by_gram: dict[str, list[str]] = {}
        for word in lexicon.words:
            if word.isalpha() and len(word) >= SHORTEST_NEAR:
                self._by_first.setdefault(word[0], []).append(word)
                for gram in set(_grams(word)):
                    self._by_gram.setdefault(gram, []).append(word)
        self._common = frozenset(lexicon.common)
        self._near = lru_cache(maxsize=20_000)(self._find_near)
        self._best = lru_cache(maxsize=20_000)(self._find_best)

    def expand(self, text: str) -> str:
        """The text in full words; what would be masked (ids, numbers, dates, names) stays as it was written."""
        words = text[:TEXT_CHARACTERS_CAP].split()
        shown, masked = [], False
        for word, form in zip(words, self.normalise(words), strict=True):
            masked = any(mask in form for mask in MASKS) if form else masked  # an empty one goes with the one before
            shown.append(word if masked else form)
        return " ".join(form for form in shown if form) + text[TEXT_CHARACTERS_CAP:]

    def normalise(self, words: Sequence[str]) -> list[str]:
        """Word by word: its full form or mask; empty where it was joined to the word before."""
        full: list[str] = []
        while len(full) < len(words):
            place = len(full)
            chosen = self._certain(words, place) or self._choose(words, place, full)
            full += [chosen.text, *[""] * (chosen.span - 1)]
        return full

    def _certain(self, words: Sequence[str], place: int) -> Candidate | None:
        """The one form of a word that was seen often and never otherwise; a word of no trade stays as it is."""
        if len(words[place]) > WORD_CHARACTERS_CAP:
            return Candidate(words[place], ("kept",))
        forms = self.lexicon.exact.get(words[place])
        if not forms or len(forms) > 1 or " ".join(words[place : place + 2]).lower() in self.lexicon.merges:
            return None
        ((text, times),) = forms.items()
        return Candidate(text, ("exact",)) if times >= TIMES_CERTAIN else None

    def _choose(self, words: Sequence[str], place: int, full: Sequence[str]) -> Candidate:
        candidates = self.candidates(words, place)
        return max(candidates, key=lambda candidate: self.score(self.features(words, place, candidate, full)))

    def score(self, features: Iterable[str]) -> float:
        """The sum of the features' weights."""
        weights = self.lexicon.weights
        return sum(weights.get(feature, 0.0) for feature in features)

    # ---- candidates -------------------------------------------------------------------------------------------------

    def candidates(self, words: Sequence[str], place: int, without: str | None = None) -> list[Candidate]:
        """How a word may be written in full. without: its own full form in training, taken off the counts once."""
        word = words[place]
        low = word.lower()
        found: dict[tuple[str, int], list[str]] = {}

        def add(text: str, origin: str, span: int = 1) -> None:
            found.setdefault((text, span), []).append(origin)

        known = False
        for origin, table, key in (("exact", self.lexicon.exact, word), ("lower", self.lexicon.lower, low)):
            for text, times in _top(table.get(key), without):
                add(text, origin)
                known = known or times > 1
        add(low, "word")
        if word != low:
            add(word, "kept")
        for text, origin in self._formed(word):
            add(text, origin)
        if not known and low.isalpha() and not self._times_full(low, without):
            for origin, text in self._near(low):
                if origin == "two" or self._times_full(text, without):
                    add(text, origin)
        for span in range(2, min(3, len(words) - place) + 1):
            joined = " ".join(words[place : place + span]).lower()
            for text, _ in _top(self.lexicon.merges.get(joined), without if span == 2 else None):
                add(text, "merge", span)
        return [Candidate(text, tuple(origins), span) for (text, span), origins in found.items()]

    def _formed(self, word: str) -> Iterator[tuple[str, str]]:
        """(text, origin) by the form of a word alone: masks, and its parts where it is not of letters alone."""
        if word.isalpha():
            masks = (MASKS[0], MASKS[3]) if word.isupper() or word.istitle() else ()
            yield from ((mask, "mask") for mask in masks)
            return
        yield from ((mask, "mask") for mask in MASKS[:3])
        yield self._parts(word), "parts"
        if (led := ID_AHEAD.match(word)) and led.end() < len(word):
            yield f"<id> {self._parts(word[led.end() :])}", "led"

    def _parts(self, word: str) -> str:
        """`REMOVE/RESEAL` -> `remove / reseal`, `75mm` -> `<num> mm`: each part as it is usually meant."""
        parts = PIECES.findall(word)
        return " ".join(AND.get(part) or self._best(part) for part in parts)

    def _find_best(self, part: str) -> str:
        """The usual full form of a word without its neighbours."""
        if part[0].isdigit():
            return "<num>"
        for table, key in ((self.lexicon.exact, part), (self.lexicon.lower, part.lower())):
            if forms := table.get(key):
                return max(forms, key=forms.__getitem__) or part.lower()
        near = [text for origin, text in self._near(part.lower()) if origin == "near"]
        return near[0] if near and part.lower() not in self.lexicon.words else part.lower()

    def _find_near(self, low: str) -> list[tuple[str, str]]:
        """(origin, word): words with nearly the same letters, words that it may abbreviate, and two words in one."""
        found: list[tuple[str, str]] = []
        words = self.lexicon.words
        if len(low) >= SHORTEST_NEAR:
            overlaps: dict[str, int] = {}
            grams = set(_grams(low))
            for gram in grams:
                for word in self._by_gram.get(gram, ()):
                    overlaps[word] = overlaps.get(word, 0) + 1
            near = [(2 * times / (len(grams) + len(word) + 1), word) for word, times in overlaps.items()]
            near = [
                (share, word)
                for share, word in near
                if share >= SHARE_NEAR and abs(len(word) - len(low)) <= 2 and word != low
            ]
            near.sort(key=lambda item: (-item[0], -words[item[1]]))
            found += [("near", word) for _, word in near[:4]]
        short = [word for word in self._by_first.get(low[0], ()) if len(word) > len(low) and _abbreviates(low, word)]
        short.sort(key=lambda word: -words[word])
        found += [("short", word) for word in short[:4]]
        for cut in range(3, len(low) - 2):
            left, right = low[:cut], low[cut:]
            if self._times(left) >= 3 and self._times(right) >= 3:
                found.append(("two", f"{self._best(left)} {self._best(right)}"))
        return found

    def _times_full(self, word: str, without: str | None) -> int:
        return self.lexicon.words.get(word, 0) - (word == without)

    def _is_word(self, low: str) -> int:
        """2 for a word of plain English, 1 for one of the trade or an inflection of a known one, else 0."""
        if low in self._common:
            return 2
        stems = (low.removesuffix(ending) for ending in INFLECTIONS if low.endswith(ending))
        return int(any(stem in self.lexicon.words or stem in self._common for stem in stems))

    def _times(self, low: str) -> int:
        forms = self.lexicon.lower.get(low)
        return sum(forms.values()) if forms else 0

    # ---- features ---------------------------------------------------------------------------------------------------

    def features(
        self,
        words: Sequence[str],
        place: int,
        candidate: Candidate,
        full: Sequence[str],
        without: str | None = None,
    ) -> Iterator[str]:
        """What speaks for or against a candidate, as names of weights. full: the words before, as chosen."""
        word = words[place]
        low = word.lower()
        text, origins, span = candidate
        before = words[place - 1].lower() if place else EDGE
        after = words[place + span].lower() if place + span < len(words) else EDGE
        kind = text if text in MASKS else "word"
        form = _shape(word)
        origin = "+".join(origins)
        yield f"o {origin}"
        yield f"of {origin} {_case(word)} {min(len(word), 6)}"
        yield f"ks {kind} {form}"
        yield f"ksf {kind} {form} {place == 0} {_shape(after)}"
        yield f"kb {kind} {form[:2]} {before}"
        yield f"ka {kind} {form[:2]} {after}"
        if text in MASKS or "<num>" in text:
            yield f"kl {text} {_coarse(word)} {place == 0} {len(words) == 1}"
            yield f"kp {text} {_coarse(word)} {full[-1] if full else EDGE}"
        for name, table, key in (
            ("E", self.lexicon.exact, word),
            ("L", self.lexicon.lower, low),
            ("B", self.lexicon.before, f"{before}\t{low}"),
            ("A", self.lexicon.after, f"{low}\t{after}"),
        ):
            yield f"{name} {_evidence(table.get(key), text, without)} {kind != 'word'}"
        if span > 1 or "merge" in origins:
            joined = " ".join(words[place : place + span]).lower()
            yield f"M {_evidence(self.lexicon.merges.get(joined), text, without)} {span}"
        yield f"x {low}>{text}"
        yield f"xb {low}>{text} {before}"
        yield f"xa {low}>{text} {after}"
        if kind == "word" and text:
            times = self.lexicon.words.get(text, 0) - (text == without)
            yield f"w {origins[0]} {_bin(times)}"
            yield f"c {origins[0]} {self._is_word(low)} {self._is_word(text)}"
            first, last = text.split()[0], text.split()[-1]
            left = full[-1].rpartition(" ")[2] if full and full[-1] else EDGE
            right = self._best(words[place + span]) if place + span < len(words) else EDGE
            pairs, sight = self.lexicon.pairs, text == without
            yield f"pl {origins[0]} {_bin(pairs.get(f'{left} {first}', 0) - sight)}"
            yield f"pr {origins[0]} {_bin(pairs.get(f'{last} {right}', 0) - sight)}"
            if origins[0] in ("near", "short"):
                yield f"s {origins[0]} {len(low)} {len(text)} {low[-1] == text[-1]}"
                yield f"s2 {origins[0]} {text.startswith(low)} {_bin(times)}"
                yield f"s3 {origins[0]} {sorted(low) == sorted(text)} {_edits(low, text)} {min(len(low), 7)}"


def _top(forms: Mapping[str, int] | None, without: str | None) -> list[tuple[str, int]]:
    """The four forms seen most, less one sight of `without`."""
    if not forms:
        return []
    counted = [(text, times - (text == without)) for text, times in forms.items()]
    return sorted(((text, times) for text, times in counted if times > 0), key=lambda item: -item[1])[:4]


def _evidence(forms: Mapping[str, int] | None, text: str, without: str | None) -> str:
    """How strongly a table speaks for a form: its share and how often the key was seen, coarsely."""
    total = sum(forms.values()) - (without is not None) if forms else 0
    if not forms or total <= 0:
        return "-"
    times = forms.get(text, 0) - (text == without)
    return f"{_bin(total)}/{round(5 * times / total)}{'' if 0 < times < total else '!'}"


def _bin(times: int) -> int:
    return min(max(times, 0).bit_length(), 6)


def _case(word: str) -> str:
    if word.isupper():
        return "U"
    if word.islower():
        return "l"
    return "T" if word[:1].isupper() and word[1:].islower() else "m"


@lru_cache(maxsize=20_000)
def _shape(word: str) -> str:
    """`XH531` -> `AA999`; long runs are cut at four."""
    marks = re.sub(r"[a-z]", "a", re.sub(r"[A-Z]", "A", re.sub(r"\d", "9", word)))
    return re.sub(r"(.)\1{4,}", r"\1\1\1\1", marks)[:12]


@lru_cache(maxsize=20_000)
def _coarse(word: str) -> str:
    """`XH531` -> `A9`."""
    return re.sub(r"(.)\1+", r"\1", _shape(word).replace("a", "A"))


def _grams(word: str) -> list[str]:
    padded = f"^{word}$"
    return [padded[at : at + 2] for at in range(len(padded) - 1)]


def _abbreviates(short: str, word: str) -> bool:
    """Whether the letters of `short` stand in `word` in their order, the first at its beginning."""
    letters = iter(word)
    return all(letter in letters for letter in short)


@lru_cache(maxsize=20_000)
def _edits(one: str, other: str) -> int:
    """Damerau-Levenshtein distance with adjacent transpositions (optimal string alignment), at most 4."""
    above: list[int] = []
    row = list(range(len(other) + 1))
    for at, letter in enumerate(one, 1):
        beyond, above, row = above, row, [at]
        for to, target in enumerate(other, 1):
            cost = min(above[to] + 1, row[-1] + 1, above[to - 1] + (letter != target))
            if at > 1 and to > 1 and letter == other[to - 2] and one[at - 2] == target:
                cost = min(cost, beyond[to - 2] + 1)
            row.append(cost)
    return min(row[-1], 4)


def dump(lexicon: Lexicon) -> dict[str, Any]:
    """As `Lexicon.read` takes it."""
    return dict(vars(lexicon))
