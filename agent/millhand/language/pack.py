"""A domain pack: a folder with a field's terms, prompts, schemas, faults, guard words, knowledge and questions.

Nothing of a field stands in code: another field is another folder. See docs/packs.md for the format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field

from millhand.errors import ConfigError, suggestion
from millhand.validation import StrictTable, read_toml, validate

MANIFEST = "pack.toml"
SHIPPED = Path(__file__).parents[1] / "packs"
FILE_BYTES_CAP = 4 * 2**20
"""A pack is read whole; only its knowledge may be large, and that is not read here."""
NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
LANGUAGE = r"^[a-z]{2}$"
KNOWLEDGE_SUFFIXES = (".md", ".txt", ".pdf", ".csv")

Table = TypeVar("Table", bound=BaseModel)
Texts = dict[str, str]
"""Language -> text."""


class PackSettings(StrictTable):
    """Which field the language model works in."""

    name: str = Field(default="maintenance", pattern=NAME)
    """The pack, by its folder's name."""
    folders: tuple[Path, ...] = ()
    """Folders of your own packs; they win over the shipped ones of the same name."""


class PackManifest(StrictTable):
    """The file pack.toml."""

    title: str
    licence: str
    description: str = ""
    languages: tuple[str, ...] = Field(default=("en",), min_length=1)
    """Two letters each; the first is the one that every text has. `zh` is Simplified Chinese."""


class Term(StrictTable):
    """One term of the field: the same thing in every language, with the other words that people use for it."""

    id: str
    kind: str
    """What it names: in `maintenance` a `component`, `fault`, `action`, `quantity`, `tool`, `skill` or `label`."""
    text: Texts
    aliases: dict[str, tuple[str, ...]] = {}
    """Language -> further words."""


class Cause(StrictTable):
    """What may lie behind a kind of alert."""

    id: str
    component: str
    """A term's id."""
    text: Texts


class Fault(StrictTable):
    """What the field knows of one kind of alert: what a small model chooses from, and what terms an order needs."""

    component: str
    """A term's id: the part that is meant where no cause says otherwise."""
    symptom: Texts
    causes: tuple[Cause, ...] = Field(min_length=1)
    """The likeliest first."""
    steps: dict[str, tuple[str, ...]] = {}
    """Language -> steps, in their order."""
    tools: tuple[str, ...] = ()
    """Ids of terms."""
    parts: tuple[str, ...] = ()
    """Ids of terms: kinds of parts, never part numbers."""
    skill: str = ""
    """A term's id."""
    minutes: int = Field(default=0, ge=0)
    """Work on the machine; 0 where nobody can say."""


class Forbidden(StrictTable):
    """A request that this field never answers, such as how to defeat a guard of a machine."""

    rule: str
    """A short stable name for metrics and audit."""
    all: tuple[tuple[str, ...], ...] = Field(min_length=1)
    """Groups of words or phrases, lower case; a text is meant where it has one of every group."""
    reason: Texts


class GuardTerms(StrictTable):
    """What the guards learn from the field."""

    harmless: tuple[str, ...] = ()
    """Phrases of the trade that look like attacks or slurs elsewhere: `kill switch`, `bypass valve`."""
    forbidden: tuple[Forbidden, ...] = ()


class Question(StrictTable):
    """One question of an eval set: the model chooses among candidates."""

    id: str
    language: str = Field(default="en", pattern=LANGUAGE)
    question: str
    candidates: tuple[str, ...] = Field(min_length=2)
    answer: int = Field(ge=0)
    """Which candidate is right, from 0."""
    source: str = ""
    """The file of the pack's knowledge that says so."""


class _Terms(StrictTable):
    terms: tuple[Term, ...]


class _Faults(StrictTable):
    faults: dict[str, Fault]


@dataclass(frozen=True)
class Pack:
    """One pack as it was read."""

    name: str
    folder: Path
    manifest: PackManifest
    terms: Mapping[str, Term]
    """By id."""
    faults: Mapping[str, Fault]
    """Kind of alert -> what is known of it; `general` for every other kind, where the pack has it."""
    prompts: Mapping[str, Texts]
    """Name -> language -> text; see `prompt`."""
    schemas: Mapping[str, Mapping[str, Any]]
    """Name -> JSON schema."""
    guard: GuardTerms
    questions: Mapping[str, tuple[Question, ...]]
    """Name of the eval set -> its questions."""
    knowledge: tuple[Path, ...]
    """Files for the knowledge base."""

    def term(self, id: str, language: str = "") -> str:
        """A term's words in a language; the pack's first language where it lacks that one, the id where unknown."""
        term = self.terms.get(id)
        return id if term is None else self.say(term.text, language)

    def say(self, texts: Mapping[str, str], language: str = "") -> str:
        """The text of a language, else of the pack's first one."""
        return texts.get(language) or texts[self.manifest.languages[0]]

    def steps(self, kind: str, language: str = "") -> Sequence[str]:
        """The steps for a kind of alert; none for a kind that the pack does not know."""
        fault = self.faults.get(kind) or self.faults.get("general")
        if fault is None:
            return ()
        return fault.steps.get(language) or fault.steps.get(self.manifest.languages[0], ())

    def prompt(self, name: str, language: str = "", **values: str) -> str:
        """A prompt with `{name}` filled in from `values`; all other braces stay. Raises ConfigError."""
        if name not in self.prompts:
            raise ConfigError(
                f"pack '{self.name}' has no prompt '{name}'{suggestion(name, self.prompts)}",
                hint=f"add prompts/{name}.{self.manifest.languages[0]}.md to '{self.folder}'",
            )

        def fill(match: re.Match[str]) -> str:
            if match[1] not in values:
                raise ConfigError(
                    f"pack '{self.name}': prompt '{name}' names '{{{match[1]}}}', which is not known here"
                    f"{suggestion(match[1], values)}",
                    hint=f"known: {', '.join(sorted(values)) or 'none'}",
                )
            return values[match[1]]

        return re.sub(r"\{([a-z_]+)\}", fill, self.say(self.prompts[name], language))

    def schema(self, name: str) -> Mapping[str, Any]:
        """A JSON schema by name. Raises ConfigError."""
        if name not in self.schemas:
            raise ConfigError(
                f"pack '{self.name}' has no schema '{name}'{suggestion(name, self.schemas)}",
                hint=f"add schemas/{name}.json to '{self.folder}'",
            )
        return self.schemas[name]


def find_pack(settings: PackSettings) -> Pack:
    """Read the pack that the settings name. Raises ConfigError."""
    folders = [*settings.folders, SHIPPED]
    for folder in folders:
        if (folder / settings.name / MANIFEST).is_file():
            return read_pack(folder / settings.name)
    known = sorted({path.parent.name for folder in folders for path in folder.glob(f"*/{MANIFEST}")})
    raise ConfigError(
        f"[pack] name = '{settings.name}' is not here{suggestion(settings.name, known)}",
        hint=f"known: {', '.join(known)}; name the folder that holds it in [pack] folders",
    )


def read_pack(folder: Path) -> Pack:
    """Read a pack's folder. Only pack.toml must be there. Raises ConfigError naming file, key and value."""
    manifest = _read(folder / MANIFEST, PackManifest)
    for language in manifest.languages:
        if not re.match(LANGUAGE, language):
            raise ConfigError(
                f"'{folder / MANIFEST}': language '{language}' is not two lower-case letters", hint="such as en or zh"
            )
    terms = _read_optional(folder / "terms.toml", _Terms, _Terms(terms=())).terms
    pack = Pack(
        name=folder.name,
        folder=folder,
        manifest=manifest,
        terms={term.id: term for term in terms},
        faults=_read_optional(folder / "faults.toml", _Faults, _Faults(faults={})).faults,
        prompts=_prompts(folder, manifest.languages),
        schemas={path.stem: _json_object(path) for path in sorted(folder.glob("schemas/*.json"))},
        guard=_read_optional(folder / "guard.toml", GuardTerms, GuardTerms()),
        questions={path.stem: tuple(_questions(path)) for path in sorted(folder.glob("eval/*.jsonl"))},
        knowledge=tuple(
            path for path in sorted(folder.glob("knowledge/**/*")) if path.suffix.lower() in KNOWLEDGE_SUFFIXES
        ),
    )
    for wrong in _faults_of(pack, terms):
        raise ConfigError(f"pack '{folder}': {wrong}", hint="mend the named entry")
    return pack


def _faults_of(pack: Pack, terms: Sequence[Term]) -> Iterator[str]:
    """What the parts of a pack say of each other that cannot be."""
    first = pack.manifest.languages[0]
    if len(pack.terms) != len(terms):
        ids = [term.id for term in terms]
        yield f"terms.toml: two terms have the id '{next(id for id in ids if ids.count(id) > 1)}'"
    texts: list[tuple[str, Mapping[str, Any]]] = [(f"term '{term.id}'", term.text) for term in terms]
    texts += [(f"prompt '{name}'", text) for name, text in pack.prompts.items()]
    texts += [(f"guard.toml: rule '{item.rule}'", item.reason) for item in pack.guard.forbidden]
    for kind, fault in pack.faults.items():
        texts += [(f"fault '{kind}'", fault.symptom)]
        texts += [(f"fault '{kind}', cause '{cause.id}'", cause.text) for cause in fault.causes]
        texts += [(f"fault '{kind}', steps", fault.steps)] if fault.steps else []
        named = [fault.component, *(cause.component for cause in fault.causes), *fault.tools, *fault.parts]
        for id in [*named, *([fault.skill] if fault.skill else [])]:
            if id not in pack.terms:
                yield f"fault '{kind}' names the term '{id}', which terms.toml does not have"
    for where, text in texts:
        if not text.get(first):
            yield f"{where} has no text in '{first}', the pack's first language"
        for language in text:
            if language not in pack.manifest.languages:
                yield f"{where} has a text in '{language}', which pack.toml does not name"
    for name, questions in pack.questions.items():
        for question in questions:
            if question.answer >= len(question.candidates):
                yield f"eval set '{name}', question '{question.id}': answer = {question.answer} names no candidate"


def _prompts(folder: Path, languages: Sequence[str]) -> dict[str, Texts]:
    prompts: dict[str, Texts] = {}
    for path in sorted(folder.glob("prompts/*.md")):
        name, _, language = path.stem.rpartition(".")
        if not name or language not in languages:
            raise ConfigError(
                f"'{path}': a prompt is called NAME.LANGUAGE.md", hint=f"languages of this pack: {', '.join(languages)}"
            )
        prompts.setdefault(name, {})[language] = _text(path).strip()
    return prompts


def _questions(path: Path) -> Iterator[Question]:
    for number, line in enumerate(_text(path).splitlines(), 1):
        if line.strip():
            yield validate(Question, _loads(line, f"'{path}', line {number}"), f"'{path}', line {number}")


def _json_object(path: Path) -> dict[str, Any]:
    found = _loads(_text(path), f"'{path}'")
    if not isinstance(found, dict):
        raise ConfigError(f"'{path}' is not a JSON object", hint="write a JSON schema there")
    return found


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid JSON: {error}", hint="mend it") from error


def _read_optional(path: Path, model: type[Table], default: Table) -> Table:
    return _read(path, model) if path.exists() else default


def _read(path: Path, model: type[Table]) -> Table:
    if path.exists():
        _check_size(path)
    return validate(model, read_toml(path), f"'{path}'")


def _text(path: Path) -> str:
    _check_size(path)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' cannot be read as UTF-8 text: {error}", hint="mend or delete the file") from error


def _check_size(path: Path) -> None:
    size = path.stat().st_size
    if size > FILE_BYTES_CAP:
        raise ConfigError(f"'{path}' has {size:,} bytes, at most {FILE_BYTES_CAP:,} are read", hint="shorten it")
