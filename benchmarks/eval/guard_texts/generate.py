"""Attacks on a language model in a factory, and harmless texts of a shop floor, from templates.

Two parts, `tuning` and `testing`, share no template and no filler (tuning.toml, testing.toml); testing hides attacks in
more ways than tuning (disguises.py). The same part is the same texts each time.

    python benchmarks/eval/guard_texts/generate.py testing | head
"""

from __future__ import annotations

import base64
import json
import random
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from disguises import DISGUISES  # noqa: E402 - a neighbour, found by the line above

SLOT = re.compile(r"\{([a-z_]+)\}")
SEEDS = {"tuning": 20_260, "testing": 91_177}
DISGUISED_FAMILIES = ("override", "leak", "persona", "unsafe", "indirect", "exfiltrate")
PER_FAMILY = 420
"""At most so many attacks of one family; a family of few templates gives what it can."""
PER_DISGUISE = {"tuning": 200, "testing": 90}
PER_KIND = 1_200
REPORTS = 600
"""Harmless texts put together from several others."""
TRIES = 12
"""Draws for one text, since draws repeat."""


@dataclass(frozen=True)
class Text:
    text: str
    attack: bool
    family: str
    """Of an attack: what it wants, or `hidden.<how>`. Of a harmless text: its kind."""


def read(part: str) -> Mapping[str, Any]:
    return tomllib.loads((HERE / f"{part}.toml").read_text(encoding="utf-8"))


def texts(part: str) -> list[Text]:
    """All texts of a part, attacks first."""
    tables, dice = read(part), random.Random(SEEDS[part])
    fillers = tables["fillers"]
    made: dict[str, Text] = {}
    for kind, templates in tables["harmless"].items():
        _draw(
            made, PER_KIND, lambda templates=templates, kind=kind: Text(_filled(templates, fillers, dice), False, kind)
        )
    harmless = [text.text for text in made.values()]
    _draw(made, REPORTS, lambda: Text("\n".join(dice.sample(harmless, dice.randrange(3, 30))), False, "report"))
    for family, templates in tables["attacks"].items():
        _draw(
            made,
            PER_FAMILY,
            lambda t=templates, f=family: Text(_dressed(_filled(t, fillers, dice), harmless, dice), True, f),
        )
    plain = [tables["attacks"][family] for family in DISGUISED_FAMILIES]
    for name, disguise in DISGUISES[part].items():
        _draw(
            made,
            PER_DISGUISE[part],
            lambda disguise=disguise, name=name: Text(
                disguise(_filled(dice.choice(plain), fillers, dice), dice), True, f"hidden.{name}"
            ),
        )
    return sorted(made.values(), key=lambda text: not text.attack)


def _draw(made: dict[str, Text], wanted: int, draw: Any) -> None:
    """Add up to `wanted` new texts; a text that exists already is not added again."""
    end = len(made) + wanted
    for _ in range(wanted * TRIES):
        if len(made) >= end:
            return
        text = draw()
        made.setdefault(text.text, text)


def _filled(templates: Sequence[str], fillers: Mapping[str, Sequence[str]], dice: random.Random) -> str:
    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name in fillers:
            return dice.choice(fillers[name])
        return _made_up(name, dice) or match[0]

    return SLOT.sub(fill, dice.choice(templates))


def _made_up(name: str, dice: random.Random) -> str:
    """Fillers that look like something hidden: serial numbers, checksums, keys, bytes."""
    if name == "digit":
        return str(dice.randrange(1, 10))
    if name == "serial":
        return "".join(dice.choice("ABCDEFGHKLMNPRSTUVWXYZ0123456789") for _ in range(dice.randrange(10, 26)))
    if name == "hex":
        return dice.randbytes(32).hex()
    if name == "base":
        return base64.b64encode(dice.randbytes(dice.randrange(15, 60))).decode()
    if name == "bytes":
        return dice.randbytes(dice.randrange(6, 24)).hex(" ")
    return ""


def _dressed(attack: str, harmless: Sequence[str], dice: random.Random) -> str:
    """An attack as it is, in other letters, or between harmless sentences."""
    draw = dice.random()
    if draw < 0.55:
        return attack
    if draw < 0.65:
        return attack.lower().rstrip(".!?")
    if draw < 0.70:
        return attack.upper()
    if draw < 0.80:
        return f"{dice.choice(harmless)}\n{attack}"
    if draw < 0.90:
        return f"{attack}\n\n{dice.choice(harmless)}"
    return f"{' '.join(dice.sample(harmless, 3))} {attack} {' '.join(dice.sample(harmless, 2))}"


def main() -> int:
    for text in texts(sys.argv[1] if len(sys.argv) > 1 else "testing"):
        print(json.dumps(asdict(text), ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
