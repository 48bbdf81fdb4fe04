"""Finds concepts in a text by a dictionary, and rules in the concepts.

One look-up a word: the dictionary keeps for each word what it means as it stands, with digits for letters, with a slip
of the pen, backwards, and under letter ciphers. So a text is read once, in linear time, however it is hidden.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from millhand.validation import read_toml

ENTRY = re.compile(r"`([^`]+)`|(\S+)")
CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
TOKEN = re.compile(
    rf"[{CJK}]+|[^\W_{CJK}]+(?:[@$€!|][^\W_{CJK}]+)*|[@$!|][^\W_{CJK}]+(?:[@$€!|][^\W_{CJK}]+)*|[.?!;。？！；\n]+"
)
WORD = re.compile(rf"[^\W_{CJK}]+")
LEET = str.maketrans("0134578@$!|€+9l", "oieastbasiieegi".replace("eegi", "etgi"))
"""Digits and signs for letters; i, l, 1, ! and | become one letter, in texts and in the dictionary."""
SENTENCE_WORDS, LINE_WORDS = 4, 8
"""The end of a sentence, and of a line, parts words as so many words between them."""
NEAR_WORDS = 3
"""What speaks against a rule must stand among its words, or so near."""
CHANNELS = 6
PLAIN, LEETED, SLIPPED, BACKWARDS, ROTATED, MIRRORED = range(CHANNELS)
OWN_HITS = (0, 1, 1, 2, 2, 2)
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
        self._phrases: dict[str, list[tuple[tuple[str, ...], int]]] = {}
        self._glyphs: dict[str, int] = {}
        for name, text in table["concepts"].items():
            for phrase, word in ENTRY.findall(text):
                self._add(phrase or word, self._bits[name])
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
        telling = False
        channels = self._hits(text)
        channels[PLAIN] = self._without_harmless(channels[PLAIN])
        for channel, hits in enumerate(channels):
            if sum(channel_only for *_, channel_only in hits) < OWN_HITS[channel]:
                continue
            union = 0
            for hit, _ in hits:
                union |= hit.concepts
            telling = telling or bool(union & self._telling)
            for rule in self.rules:
                if all(union & mask for mask in rule.wanted) and _holds(rule, [hit for hit, _ in hits]):
                    return Reading(rule.name, True)
        return Reading("", telling)

    def _without_harmless(self, hits: list[tuple[Hit, bool]]) -> list[tuple[Hit, bool]]:
        """Phrases of the trade mean nothing else: `bypass valve` bypasses nothing."""
        spans = [(hit.start, hit.end) for hit, _ in hits if hit.concepts & self._harmless]
        if not spans:
            return hits
        return [
            (hit, only) for hit, only in hits if not any(start <= hit.start and hit.end <= end for start, end in spans)
        ]

    # ---- reading ----------------------------------------------------------------------------------------------------

    def _hits(self, text: str) -> list[list[tuple[Hit, bool]]]:
        """For each channel what the words mean there; True: only in that channel."""
        channels: list[list[tuple[Hit, bool]]] = [[] for _ in range(CHANNELS)]
        tokens: list[tuple[_Meaning, int, int, int]] = []
        place, fence = 0, -SENTENCE_WORDS
        for match in TOKEN.finditer(text):
            token = match[0]
            first = token[0]
            if first in ".?!;。？！；\n" and not token[-1].isalnum():
                # Marks after each word or two part nothing: they are there to be in the way.
                if place - fence > SENTENCE_WORDS // 2:
                    place += LINE_WORDS if "\n" in token else SENTENCE_WORDS
                fence = place
                continue
            if "\u3040" <= first <= "\u9fff" or "\uac00" <= first <= "\ud7af":
                self._read_glyphs(token, place, match.start(), channels)
                place += max(1, len(token) // 2)
                continue
            meaning = self._cache.get(token) or self._learn(token)
            tokens.append((meaning, place, match.start(), match.end()))
            place += 1
        self._read_words(tokens, channels)
        for hits in channels:
            hits.sort(key=_by_place)
        return channels

    def _read_words(
        self, tokens: Sequence[tuple[_Meaning, int, int, int]], channels: list[list[tuple[Hit, bool]]]
    ) -> None:
        for index, (meaning, place, start, end) in enumerate(tokens):
            if meaning is _NOTHING:
                continue
            plain = meaning.concepts[PLAIN]
            for channel, concepts in enumerate(meaning.concepts):
                if concepts:
                    channels[channel].append((Hit(place, concepts, start, end), channel != PLAIN and concepts != plain))
            for channel, head in enumerate(meaning.heads):
                if head:
                    self._read_phrases(tokens, index, channel, channels[channel])

    def _read_phrases(
        self, tokens: Sequence[tuple[_Meaning, int, int, int]], index: int, channel: int, hits: list[tuple[Hit, bool]]
    ) -> None:
        meaning, place, start, _ = tokens[index]
        for rest, concepts in self._phrases[meaning.forms[channel]]:
            stop = index + 1 + len(rest)
            if stop > len(tokens):
                continue
            # Backwards, phrases that were written from right to left stand in the other order too.
            following = [token[0].forms[channel] for token in tokens[index + 1 : stop]]
            if tuple(following) == rest:
                hits.append((Hit(place, concepts, start, tokens[stop - 1][3]), channel != PLAIN))
        if channel == BACKWARDS:
            for rest, concepts in self._phrases[meaning.forms[channel]]:
                begin = index - len(rest)
                if begin >= 0 and tuple(token[0].forms[channel] for token in tokens[begin:index][::-1]) == rest:
                    hits.append((Hit(tokens[begin][1], concepts, tokens[begin][2], tokens[index][3]), True))

    def _read_glyphs(self, run: str, place: int, start: int, channels: list[list[tuple[Hit, bool]]]) -> None:
        for match in self._glyph_pattern.finditer(run):
            word = match[1]
            at = start + match.start()
            hit = Hit(place + match.start() / 2, self._glyphs[word], at, at + len(word))
            for hits in channels[:3]:
                hits.append((hit, False))

    # ---- learning a word --------------------------------------------------------------------------------------------

    def _learn(self, token: str) -> _Meaning:
        """What a word means in each channel, kept for the next time."""
        folded = fold(token)
        word = folded.strip("!|@$")
        if len(self._cache) >= CACHED_WORDS:
            self._cache.clear()
        meaning = _NOTHING
        if not word.isdigit() and len(word) <= LONGEST_WORD:
            letters = word.isalpha()
            signs = folded.rstrip("!|")
            leeted = signs.translate(LEET)
            backwards = word[::-1]
            rotated, mirrored = word.translate(_ROT13), word.translate(_ATBASH)
            plain = self._concepts(word)
            leet = 0 if signs.isalpha() else self._leet.get(leeted, 0)
            meant = word if plain or not letters or word in self._tails else self._meant(word)
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
            heads = tuple(form in self._phrases for form in forms)
            if any(concepts) or any(heads) or any(form in self._tails for form in forms):
                meaning = _Meaning(concepts, heads, forms)
        self._cache[token] = meaning
        return meaning

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
            self._phrases.setdefault(words[0], []).append((words[1:], bit))
        elif entry.endswith("*"):
            self._stems[words[0]] = self._stems.get(words[0], 0) | bit
        elif words:
            self._words[words[0]] = self._words.get(words[0], 0) | bit

    def _finish(self) -> None:
        self._stem_lengths = sorted({len(stem) for stem in self._stems})
        self._tails = {word for phrases in self._phrases.values() for rest, _ in phrases for word in rest}
        known = {*self._words, *self._tails, *self._phrases}
        self._leet = {word.translate(LEET): concepts for word, concepts in self._words.items()}
        self._leet_forms = {word.translate(LEET): word for word in known}
        self._slips: dict[str, list[str]] = {}
        for word in sorted(known):
            if len(word) >= 6 and word.isalpha():
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


def _by_place(hit: tuple[Hit, bool]) -> float:
    return hit[0].place


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
_NOTHING = _Meaning((0,) * CHANNELS, (False,) * CHANNELS, ("",) * CHANNELS)
