"""Trains shorthand.json.gz from texts in the form of MaintNorm: `raw<TAB>full` a line, an empty line between texts.

    python -m millhand_plugins.knowledge.train_shorthand OUT FILE.norm.gz … [--english FILE.csv.gz …]

`--english` names tables with prose; their words are taken as right as they are.

Each text is judged with its own words taken off the counts once, so that the model learns what to do with words that
it has not seen. Words seen once as an id, a number or a name are left out of the file: they say nothing of others.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from millhand_plugins.knowledge.shorthand import EDGE, MASKS, Candidate, Lexicon, Shorthand, dump

EPOCHS = 8
SEED = 20261125
SMALLEST_WEIGHT = 0.02
TIMES_LEAST = 2

Text = list[tuple[str, str]]
"""(word, full form)."""


def read_texts(path: Path) -> list[Text]:
    """The texts of one file."""
    texts: list[Text] = [[]]
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            if line := line.rstrip("\n"):
                raw, _, full = line.partition("\t")
                texts[-1].append((raw, full))
            elif texts[-1]:
                texts.append([])
    return [text for text in texts if text]


def spans(text: Text) -> Iterable[tuple[int, int, str]]:
    """(place, span, full form): a word with the empty ones after it is one."""
    place = 0
    while place < len(text):
        span = 1
        while place + span < len(text) and not text[place + span][1]:
            span += 1
        yield place, span, text[place][1]
        place += span


def english(paths: Sequence[Path]) -> list[str]:
    """Words that stand at least twice in prose, of four letters and more."""
    counts: Counter[str] = Counter()
    for path in paths:
        with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
            counts.update(re.findall(r"[a-z]{4,}", file.read().lower()))
    return sorted(word for word, times in counts.items() if times >= TIMES_LEAST)


def count(texts: Sequence[Text]) -> Lexicon:
    """Fill the tables."""
    tables: list[defaultdict[str, Counter[str]]] = [defaultdict(Counter) for _ in range(5)]
    exact, lower, before, after, merges = tables
    words: Counter[str] = Counter()
    pairs: Counter[str] = Counter()
    for text in texts:
        low = [word.lower() for word, _ in text]
        for place, span, full in spans(text):
            if span > 1:
                merges[" ".join(low[place : place + span])][full] += 1
                continue
            exact[text[place][0]][full] += 1
            lower[low[place]][full] += 1
            before[f"{low[place - 1] if place else EDGE}\t{low[place]}"][full] += 1
            after[f"{low[place]}\t{low[place + 1] if place + 1 < len(text) else EDGE}"][full] += 1
        said = [part for _, full in text for part in full.split()]
        words.update(part for part in said if part not in MASKS)
        pairs.update(f"{left} {right}" for left, right in zip([EDGE, *said], [*said, EDGE], strict=True))
    plain = [{key: dict(forms) for key, forms in table.items()} for table in tables]
    return Lexicon(plain[0], plain[1], plain[2], plain[3], plain[4], dict(words), dict(pairs))


def learn(texts: Sequence[Text], lexicon: Lexicon) -> dict[str, float]:
    """Averaged perceptron over the candidates of every word."""
    shorthand = Shorthand(lexicon)
    examples = [example for text in texts for example in _examples(shorthand, text)]
    weights: defaultdict[str, float] = defaultdict(float)
    totals: defaultdict[str, float] = defaultdict(float)
    order, step = random.Random(SEED), 0
    for epoch in range(EPOCHS):
        order.shuffle(examples)
        wrong = 0
        for right, options in examples:
            step += 1
            scores = [sum(weights[name] for name in option) for option in options]
            best = max(range(len(options)), key=lambda at: scores[at] + (at != right))
            if best != right:
                wrong += 1
                for at, sign in ((right, 1.0), (best, -1.0)):
                    for name in options[at]:
                        weights[name] += sign
                        totals[name] += sign * step
        print(f"epoch {epoch + 1}: {wrong} of {len(examples)} not yet by a margin", file=sys.stderr, flush=True)
    averaged = {name: value - totals[name] / step for name, value in weights.items()}
    return {name: round(value, 3) for name, value in averaged.items() if abs(value) >= SMALLEST_WEIGHT}


def _examples(shorthand: Shorthand, text: Text) -> Iterable[tuple[int, list[list[str]]]]:
    words = [word for word, _ in text]
    full: list[str] = []
    for place, span, said in spans(text):
        options = shorthand.candidates(words, place, without=said)
        right = next((at for at, option in enumerate(options) if option.text == said and option.span == span), None)
        if right is not None:
            yield right, [_names(shorthand, words, place, option, full, said) for option in options]
        full += [said, *[""] * (span - 1)]


def _names(
    shorthand: Shorthand, words: Sequence[str], place: int, option: Candidate, full: Sequence[str], said: str
) -> list[str]:
    return list(shorthand.features(words, place, option, full, without=said))


def prune(lexicon: Lexicon) -> Lexicon:
    """What the file needs: contexts of words with one full form, and masks seen once, say nothing."""
    several = {key for key, forms in lexicon.lower.items() if len(forms) > 1}

    def telling(table: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
        return {
            key: forms
            for key, forms in table.items()
            if sum(forms.values()) > 1 or not any(mask in form for form in forms for mask in MASKS)
        }

    return Lexicon(
        telling(lexicon.exact),
        telling(lexicon.lower),
        {key: forms for key, forms in lexicon.before.items() if key.partition("\t")[2] in several},
        {key: forms for key, forms in lexicon.after.items() if key.partition("\t")[0] in several},
        lexicon.merges,
        lexicon.words,
        lexicon.pairs,
        lexicon.common,
        lexicon.weights,
    )


def train(texts: Sequence[Text], common: Sequence[str] = ()) -> Lexicon:
    """Count, then learn. common: words of prose."""
    lexicon = prune(count(texts))
    lexicon.common = list(common)
    lexicon.weights = learn(texts, lexicon)
    return lexicon


def main(arguments: Sequence[str]) -> None:
    cut = arguments.index("--english") if "--english" in arguments else len(arguments)
    out, *files = map(Path, arguments[:cut])
    common = english([Path(name) for name in arguments[cut + 1 :]])
    lexicon = train([text for path in files for text in read_texts(path)], common)
    body = json.dumps(dump(lexicon), ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()
    out.write_bytes(gzip.compress(body, 9, mtime=0))
    print(f"{out}: {out.stat().st_size:,} bytes, {len(lexicon.weights):,} weights")


if __name__ == "__main__":
    main(sys.argv[1:])
