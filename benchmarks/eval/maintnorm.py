"""Maintenance shorthand in full: the shipped normaliser on MaintNorm's test parts, each company on its own.

Error reduction rate (van der Goot, 2019): of the words that must change, less those changed wrongly, the share that is
right: (accuracy - accuracy of leaving all as it is) / (1 - that). Also the most frequent replacement, counted on the
same training texts, as the plain opponent. Company B's test part is not in the shared copy: its validation part is
not used here, since it was trained on.

    MILLHAND_DATA=… python benchmarks/eval/maintnorm.py [--misses 30]
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from figures import Figure, parser, report

from millhand_plugins.knowledge.shorthand import Lexicon, Shorthand
from millhand_plugins.knowledge.train_shorthand import Text, read_texts

GOALS = {"a": 95, "c": 90}
TRAINED_ON = [f"company_{company}_{part}.norm.gz" for company in "abc" for part in ("train", "val")]


def most_frequent(folder: Path) -> dict[str, str]:
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for name in TRAINED_ON:
        for text in read_texts(folder / name):
            for word, full in text:
                counts[word][full] += 1
    return {word: forms.most_common(1)[0][0] for word, forms in counts.items()}


def judge(texts: list[Text], answers: list[list[str]]) -> dict[str, float]:
    words = [
        (word, full, said)
        for text, answer in zip(texts, answers, strict=True)
        for (word, full), said in zip(text, answer, strict=True)
    ]
    right = sum(full == said for _, full, said in words)
    as_it_is = sum(word == full for word, full, _ in words)
    mended = sum(word != full and full == said for word, full, said in words)
    changed = sum(word != said for word, _, said in words)
    return {
        "reduction": 100 * (right - as_it_is) / (len(words) - as_it_is),
        "precision": 100 * mended / changed,
        "recall": 100 * mended / (len(words) - as_it_is),
        "wrong": len(words) - right,
        "words": len(words),
    }


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--misses", type=int, default=400, help="how many wrong words to print for each company")
    options = arguments.parse_args()
    folder = Path(os.environ["MILLHAND_DATA"]) / "maintnorm"
    table = most_frequent(folder)
    figures = []
    for company, goal in GOALS.items():
        texts = read_texts(folder / f"company_{company}_test.norm.gz")
        raw = [[word for word, _ in text] for text in texts]
        shorthand = Shorthand(Lexicon.read())  # its caches begin empty
        started_s = time.process_time()
        answers = [shorthand.normalise(words) for words in raw]
        ms = 1000 * (time.process_time() - started_s) / len(texts)
        found = judge(texts, answers)
        plain = judge(texts, [[table.get(word, word) for word in words] for words in raw])
        misses = [
            f"{word} -> {said or '(joined)'} instead of {full or '(joined)'}"
            for text, answer in zip(texts, answers, strict=True)
            for (word, full), said in zip(text, answer, strict=True)
            if said != full
        ]
        print(f"\ncompany {company.upper()}: {found['wrong']:.0f} of {found['words']:.0f} words wrong")
        print("\n".join(f"  {line}" for line in misses[: options.misses]))
        name = company.upper()
        figures += [
            Figure(f"{name}: error reduction", round(found["reduction"], 1), "%", f">= {goal}"),
            Figure(f"{name}: precision", round(found["precision"], 1), "%"),
            Figure(f"{name}: recall", round(found["recall"], 1), "%"),
            Figure(f"{name}: error reduction, most frequent replacement", round(plain["reduction"], 1), "%"),
            Figure(f"{name}: CPU time a text", round(ms, 3), "ms", "<= 1"),
        ]
    return report("maintnorm", figures, trained_on=TRAINED_ON)


if __name__ == "__main__":
    sys.exit(main())
