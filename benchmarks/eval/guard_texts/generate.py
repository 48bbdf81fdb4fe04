"""Attacks on a language model in a factory, and harmless texts of a shop floor, from templates.

Three parts share no template and no filler: `tuning` (tuning.toml) and `broad` (the files of broad/, whose fillers may
hold slots themselves) are for tuning, `testing` (testing.toml) is for testing and hides attacks in more ways
(disguises.py). The same part is the same texts each time.

    python benchmarks/eval/guard_texts/generate.py testing | head
"""

from __future__ import annotations

import base64
import json
import random
import re
import sys
import tomllib
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from disguises import DISGUISES, Disguise  # noqa: E402 - a neighbour, found by the line above

SLOT = re.compile(r"\{([a-z_]+)\}")
SEEDS = {"tuning": 20_260, "testing": 91_177, "broad": 4_711}
DEPTH = 6
"""So deep may slots stand in slots."""
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
    core: str
    """The attack without what stands around it; of a harmless text the same as `text`."""
    template: int
    """Which template it was made of, the same number in each run; 0 where it was several."""


def read(part: str) -> Mapping[str, Any]:
    """Tables `fillers`, `attacks` and `harmless` of a part's file, or of all files in its folder."""
    tables: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for path in sorted((HERE / part).glob("*.toml")) or [HERE / f"{part}.toml"]:
        for name, table in tomllib.loads(path.read_text(encoding="utf-8")).items():
            tables[name].update(table)
    return tables


def texts(part: str) -> list[Text]:
    """All texts of a part, attacks first."""
    return sorted(_Maker(part).texts(), key=lambda text: not text.attack)


class _Maker:
    def __init__(self, part: str) -> None:
        self._part = part
        self._tables = read(part)
        self._dice = random.Random(SEEDS[part])

    def texts(self) -> list[Text]:
        made: dict[str, Text] = {}
        for kind, templates in self._tables["harmless"].items():
            _draw(made, PER_KIND, partial(self._harmless, kind, templates))
        harmless = list(made)
        _draw(made, REPORTS, partial(self._report, harmless))
        attacks = self._tables["attacks"]
        for family, templates in attacks.items():
            _draw(made, PER_FAMILY, partial(self._attack, family, templates, harmless))
        plain = [template for family in DISGUISED_FAMILIES for template in attacks.get(family, ())]
        for name, disguise in DISGUISES.get(self._part, {}).items():
            _draw(made, PER_DISGUISE[self._part], partial(self._hidden, name, disguise, plain))
        return list(made.values())

    def _harmless(self, kind: str, templates: Sequence[str]) -> Text:
        text, template = self._fill(templates)
        return Text(text, False, kind, text, template)

    def _report(self, harmless: Sequence[str]) -> Text:
        text = "\n".join(self._dice.sample(harmless, self._dice.randrange(3, 30)))
        return Text(text, False, "report", text, 0)

    def _attack(self, family: str, templates: Sequence[str], harmless: Sequence[str]) -> Text:
        core, template = self._fill(templates)
        return Text(_dressed(core, harmless, self._dice), True, family, core, template)

    def _hidden(self, name: str, disguise: Disguise, templates: Sequence[str]) -> Text:
        core, template = self._fill(templates)
        text = disguise(core, self._dice)
        return Text(text, True, f"hidden.{name}", text, template)

    def _fill(self, templates: Sequence[str]) -> tuple[str, int]:
        template = self._dice.choice(templates)
        text = template
        for _ in range(DEPTH):
            text = SLOT.sub(self._filler, text)
        return text, zlib.crc32(template.encode())

    def _filler(self, match: re.Match[str]) -> str:
        fillers = self._tables["fillers"].get(match[1])
        return self._dice.choice(fillers) if fillers else _made_up(match[1], self._dice) or match[0]


def _draw(made: dict[str, Text], wanted: int, draw: Callable[[], Text]) -> None:
    """Add up to `wanted` new texts; a text that exists already is not added again."""
    end = len(made) + wanted
    for _ in range(wanted * TRIES):
        if len(made) >= end:
            return
        text = draw()
        made.setdefault(text.text, text)


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
