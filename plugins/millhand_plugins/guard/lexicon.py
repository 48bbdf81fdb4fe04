"""Finds concepts in a text by a dictionary, and rules in the concepts.

One look-up a word: the dictionary keeps for each word what it means as it stands, with digits for letters, with a slip
of the pen, backwards, and under letter ciphers. So a text is read once, in linear time, however it is hidden.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from millhand.validation import read_toml

ENTRY = re.compile(r"`([^`]+)`|(\S+)")
CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_LETTERS = rf"[^\W_{CJK}]+"
_SIGNED = rf"{_LETTERS}(?:[@$€!|]{{1,3}}{_LETTERS})*(?:[@!|]?\$|!(?= ?[a-z0-9@$]))?"
TOKEN = re.compile(rf"[{CJK}]+|[@$!|]{{0,3}}{_SIGNED}|[!|]\$|[.?!;。？！；\n]+")
WORD = re.compile(rf"[^\W_{CJK}]+")
LEET = str.maketrans("0134578@$!|€+9l", "oieastbasiieegi".replace("eegi", "etgi"))
"""Digits and signs for letters; i, l, 1, ! and | become one letter, in texts and in the dictionary."""
SENTENCE_WORDS, LINE_WORDS = 4, 8
"""The end of a sentence, and of a line, parts words as so many words between them."""
NEAR_WORDS = 3
"""What speaks against a rule must stand among its words, or so near."""
MARKS = ".?!;。？！；\n"
CHANNELS = 6
PLAIN, LEETED, SLIPPED, BACKWARDS, ROTATED, MIRRORED = range(CHANNELS)
OWN_WORDS = (0, 1, 1, 2, 2, 2)
"""So many words must mean something in a channel alone, before it is believed."""
HOST = re.compile(
    r"(?<![\w.-])(?:[\w-]{1,63}\.){1,4}(?:com|org|net|io|info|biz|ru|cn|xyz|top|example|dev|app|me|to|de)\b"
    r"|(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}\b",
    re.IGNORECASE,
)
"""Hosts and addresses, for rules that ask where something shall be sent."""
CACHED_WORDS = 60_000
LONG_WORD = 12
"""From this length on a word is searched for words that were glued together."""
LONGEST_WORD = 160


class Hit(NamedTuple):
    """A word or phrase that means something."""

    place: float
    """In words from the text's beginning."""
    concepts: int
    """A bit for each concept."""
    start: int
    end: int


@dataclass(frozen=True)
class Rule:
    name: str
    wanted: tuple[int, ...]
    """One mask for each concept that is wanted; any bit of it will do."""
    span: float
    unless: int
    """Concepts that speak against it where they stand among its words."""


class Reading(NamedTuple):
    rule: str
    """Its name; empty where none holds."""
    telling: bool
    """Whether any word speaks of what attacks are made of."""


class _Meaning(NamedTuple):
    """What one word may mean, by channel."""

    concepts: tuple[int, ...]
    heads: tuple[bool, ...]
    """Whether a phrase may begin with it."""
    forms: tuple[str, ...]
    own: tuple[int, ...]
    """Channels in which alone it means something."""


class _Token(NamedTuple):
    meaning: _Meaning
    place: int
    start: int
    end: int


def fold(word: str) -> str:
    """Lower case without accents."""
    lowered = word.casefold()
    if lowered.isascii():
        return lowered
    return "".join(c for c in unicodedata.normalize("NFKD", lowered) if not unicodedata.combining(c))


class Lexicon:
    """The dictionary and the rules of lexicon.toml, with the owner's terms."""

    def __init__(self, table: Mapping[str, Any], terms: Iterable[str] = (), harmless: Iterable[str] = ()) -> None:
        self._bits = {name: 1 << index for index, name in enumerate(table["concepts"])}
        self._words: dict[str, int] = {}
        self._stems: dict[str, int] = {}
        self._phrases: dict[tuple[str, str], list[tuple[tuple[str, ...], int]]] = {}
        self._heads: set[str] = set()
        self._glyphs: dict[str, int] = {}
        for name, text in table["concepts"].items():
            for phrase, word in ENTRY.findall(text):
                self._add(phrase or word, self._bits[name])
        self._exact = frozenset(table["exact"])
        self._telling = sum(self._bits[name] for name in table["telling"])
        self.rules = [self._rule(rule) for rule in table["rules"]]
        for index, term in enumerate(terms):
            bit = 1 << (len(table["concepts"]) + index)
            self._add(term, bit)
            self.rules.append(Rule("terms.own", (bit,), 1, 0))
        self._harmless = 1 << (len(table["concepts"]) + len(self.rules))
        for phrase in harmless:
            self._add(phrase, self._harmless)
        self._finish()
        self._cache: dict[str, _Meaning] = {}

    @classmethod
    def shipped(cls, terms: Iterable[str] = (), harmless: Iterable[str] = ()) -> Lexicon:
        return cls(read_toml(Path(__file__).with_name("lexicon.toml")), terms, harmless)

    def read(self, text: str) -> Reading:
        """The first rule that holds somewhere, channel after channel; and whether the text is telling at all."""
        if "." in text:
            text = HOST.sub(" www ", text)
        tokens, glyphs, own = self._tokens(text)
        telling = False
        for channel in range(CHANNELS):
            if own[channel] < OWN_WORDS[channel]:
                continue
            hits = self._hits(tokens, channel)
            if glyphs and channel <= SLIPPED:
                hits += glyphs
            if glyphs or channel == BACKWARDS:
                hits.sort(key=_by_place)
            if channel == PLAIN:
                hits = self._without_harmless(hits)
            union = 0
            for hit in hits:
                union |= hit.concepts
            telling = telling or (channel != SLIPPED and bool(union & self._telling))
            for rule in self.rules:
                if union & rule.wanted[0] and all(union & mask for mask in rule.wanted) and _holds(rule, hits):
                    return Reading(rule.name, True)
        return Reading("", telling)

    def _without_harmless(self, hits: list[Hit]) -> list[Hit]:
        """Phrases of the trade mean nothing else: `bypass valve` bypasses nothing."""
        ends = {hit.start: hit.end for hit in hits if hit.concepts & self._harmless}
        if not ends:
            return hits
        left, reach = [], -1
        for hit in sorted(hits, key=_by_start):
            reach = max(reach, ends.get(hit.start, -1))
            if hit.end > reach:
                left.append(hit)
        return left

    # ---- reading ----------------------------------------------------------------------------------------------------

    def _tokens(self, text: str) -> tuple[list[_Token], list[Hit], list[int]]:
        """Words, what is found in scripts without spaces, and how many words mean something in each channel alone."""
        tokens: list[_Token] = []
        glyphs: list[Hit] = []
        own = [0] * CHANNELS
        place, fence = 0, 0
        known = self._cache
        for match in TOKEN.finditer(text):
            token = match[0]
            first = token[0]
            if first in MARKS and token[-1] in MARKS:
                # Marks after each word or two part nothing: they are there to be in the way.
                if place - fence > SENTENCE_WORDS // 2:
                    place += LINE_WORDS if "\n" in token else SENTENCE_WORDS
                fence = place
                continue
            if first >= "\u3040" and ("\u3040" <= first <= "\u9fff" or "\uac00" <= first <= "\ud7af"):
                self._read_glyphs(token, place, match.start(), glyphs)
                place += max(1, len(token) // 2)
                continue
            meaning = known.get(token) or self._learn(token)
            for channel in meaning.own:
                own[channel] += 1
            tokens.append(_Token(meaning, place, match.start(), match.end()))
            place += 1
        return tokens, glyphs, own

    def _hits(self, tokens: Sequence[_Token], channel: int) -> list[Hit]:
        hits = []
        for index, (meaning, place, start, end) in enumerate(tokens):
            if meaning is _NOTHING:
                continue
            concepts = meaning.concepts[channel]
            if concepts:
                hits.append(Hit(place, concepts, start, end))
            if meaning.heads[channel] and index + 1 < len(tokens):
                hits += self._phrases_at(tokens, index, channel, 1)
            if channel == BACKWARDS and meaning.heads[channel] and index:
                # Phrases that were written from right to left as a whole.
                hits += self._phrases_at(tokens, index, channel, -1)
        return hits

    def _phrases_at(self, tokens: Sequence[_Token], index: int, channel: int, step: int) -> Iterator[Hit]:
        """Phrases that begin with a word and go on in one direction."""
        begin = tokens[index]
        first, second = begin.meaning.forms[channel], tokens[index + step].meaning.forms[channel]
        for rest, concepts in self._phrases.get((first, second), ()):
            last = index + step * (len(rest) + 1)
            if not 0 <= last < len(tokens):
                continue
            found = (tokens[index + step * (2 + offset)].meaning.forms[channel] for offset in range(len(rest)))
            if all(form == wanted for form, wanted in zip(found, rest, strict=True)):
                left, right = (begin, tokens[last]) if step > 0 else (tokens[last], begin)
                yield Hit(left.place, concepts, left.start, right.end)

    def _read_glyphs(self, run: str, place: int, start: int, hits: list[Hit]) -> None:
        for match in self._glyph_pattern.finditer(run):
            word = match[1]
            at = start + match.start()
            hits.append(Hit(place + match.start() / 2, self._glyphs[word], at, at + len(word)))

    # ---- learning a word --------------------------------------------------------------------------------------------

    def _learn(self, token: str) -> _Meaning:
        """What a word means in each channel, kept for the next time."""
        folded = fold(token)
        word = folded.strip("!|@$")
        if len(self._cache) >= CACHED_WORDS:
            self._cache.clear()
        meaning = _NOTHING
        if len(word) <= LONGEST_WORD and not (word.isdigit() and word.translate(LEET) not in self._leet_forms):
            letters = word.isalpha()
            signs = folded.rstrip("!|")
            leeted = signs.translate(LEET)
            backwards = word[::-1]
            rotated, mirrored = word.translate(_ROT13), word.translate(_ATBASH)
            plain = self._concepts(word)
            if leeted not in self._leet_forms:
                leeted = folded.translate(LEET)
            leet = 0 if signs.isalpha() else self._leet.get(leeted, 0)
            meant = word if plain or not letters or word in self._tails or word in self._heads else self._meant(word)
            slipped = self._words.get(meant, 0) if meant != word else 0
            glued = self._glued(word) if not plain and len(word) >= LONG_WORD else 0
            concepts = (
                plain | glued,
                plain | leet,
                plain | slipped,
                self._concepts(backwards) if len(word) > 2 else 0,
                self._words.get(rotated, 0) if len(word) > 2 else 0,
                self._words.get(mirrored, 0) if len(word) > 2 else 0,
            )
            forms = (
                word,
                self._leet_forms.get(leeted, word),
                meant,
                backwards,
                rotated,
                mirrored,
            )
            heads = tuple(form in self._heads for form in forms)
            if any(concepts) or any(heads) or any(form in self._tails for form in forms):
                own = tuple(channel for channel in range(1, CHANNELS) if self._own(channel, concepts, forms))
                meaning = _Meaning(concepts, heads, forms, own)
        self._cache[token] = meaning
        return meaning

    def _own(self, channel: int, concepts: Sequence[int], forms: Sequence[str]) -> bool:
        """Whether a word speaks for a channel. Short words mean something backwards and in ciphers by chance."""
        word, form = forms[PLAIN], forms[channel]
        if channel <= SLIPPED:
            return not word.isdigit() and (form != word or concepts[channel] != concepts[PLAIN])
        in_phrase = form in self._tails or form in self._heads
        return (len(word) > 3 and bool(concepts[channel])) or (len(word) > 2 and in_phrase and form != word)

    def _concepts(self, word: str) -> int:
        found = self._words.get(word, 0)
        for length in self._stem_lengths:
            if length < len(word):
                found |= self._stems.get(word[:length], 0)
        return found

    def _meant(self, word: str) -> str:
        """The dictionary's word that this one may have been meant to be: one letter more, less, other, or swapped."""
        if 5 <= len(word) <= 20:
            for key in (word, *(_without(word, index) for index in range(len(word)))):
                for meant in self._slips.get(key, ()):
                    if _one_slip(word, meant):
                        return meant
        return word

    def _glued(self, word: str) -> int:
        """Concepts of all dictionary words of four letters and more inside a long word."""
        found = 0
        for start in range(len(word) - 3):
            for length in range(4, min(15, len(word) - start) + 1):
                found |= self._words.get(word[start : start + length], 0)
        return found

    # ---- building ---------------------------------------------------------------------------------------------------

    def _add(self, entry: str, bit: int) -> None:
        if re.search(f"[{CJK}]", entry):
            self._glyphs[entry] = self._glyphs.get(entry, 0) | bit
            return
        words = tuple(fold(word) for word in WORD.findall(entry))
        if len(words) > 1:
            self._heads.add(words[0])
            self._phrases.setdefault((words[0], words[1]), []).append((words[2:], bit))
        elif entry.endswith("*"):
            self._stems[words[0]] = self._stems.get(words[0], 0) | bit
        elif words:
            self._words[words[0]] = self._words.get(words[0], 0) | bit

    def _finish(self) -> None:
        self._stem_lengths = sorted({len(stem) for stem in self._stems})
        self._tails = {second for _, second in self._phrases}
        self._tails |= {word for phrases in self._phrases.values() for rest, _ in phrases for word in rest}
        known = {*self._words, *self._tails, *self._heads}
        self._leet = {word.translate(LEET): concepts for word, concepts in self._words.items()}
        self._leet_forms = {word.translate(LEET): word for word in known}
        self._slips: dict[str, list[str]] = {}
        for word in sorted(known):
            if len(word) >= 6 and word.isalpha() and word not in self._exact:
                for key in {word, *(_without(word, index) for index in range(len(word)))}:
                    self._slips.setdefault(key, []).append(word)
        glyphs = sorted(self._glyphs, key=len, reverse=True)
        # Longest first at each place, and places may overlap: a look-ahead matches nothing itself.
        self._glyph_pattern = re.compile(f"(?=({'|'.join(map(re.escape, glyphs)) or '(?!)'}))")

    def _rule(self, table: Mapping[str, Any]) -> Rule:
        wanted = tuple(self._mask(names) for names in table["all"])
        unless = sum(self._bits[name] for name in table.get("none", ()))
        return Rule(table["name"], wanted, table["span"], unless)

    def _mask(self, names: str) -> int:
        return sum(self._bits[name] for name in names.split("|"))


def _without(word: str, index: int) -> str:
    return word[:index] + word[index + 1 :]


def _one_slip(word: str, meant: str) -> bool:
    """Whether one letter was added, left out, replaced or swapped with its neighbour."""
    if len(word) != len(meant):
        longer, shorter = (word, meant) if len(word) > len(meant) else (meant, word)
        return any(_without(longer, index) == shorter for index in range(len(longer)))
    differing = [index for index in range(len(word)) if word[index] != meant[index]]
    if len(differing) == 2:
        first, second = differing
        return second == first + 1 and word[first] == meant[second] and word[second] == meant[first]
    return len(differing) == 1


def _by_place(hit: Hit) -> float:
    return hit.place


def _by_start(hit: Hit) -> tuple[int, int]:
    return hit.start, -hit.end


def _holds(rule: Rule, hits: Sequence[Hit]) -> bool:
    """Whether all that the rule wants stands somewhere within its span. Linear."""
    last: list[float | None] = [None] * len(rule.wanted)
    against = [hit.place for hit in hits if hit.concepts & rule.unless] if rule.unless else []
    for hit in hits:
        touched = False
        for index, mask in enumerate(rule.wanted):
            if hit.concepts & mask:
                last[index] = hit.place
                touched = True
        if not touched:
            continue
        places = [place for place in last if place is not None]
        first = min(places)
        if len(places) < len(last) or hit.place - first > rule.span:
            continue
        after = bisect_left(against, first - NEAR_WORDS)
        if after == len(against) or against[after] > hit.place + NEAR_WORDS:
            return True
    return False


_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
_ROT13 = str.maketrans(_ALPHABET, _ALPHABET[13:] + _ALPHABET[:13])
_ATBASH = str.maketrans(_ALPHABET, _ALPHABET[::-1])
_NOTHING = _Meaning((0,) * CHANNELS, (False,) * CHANNELS, ("",) * CHANNELS, ())
