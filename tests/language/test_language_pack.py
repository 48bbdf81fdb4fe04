"""Packs: the shipped one is whole; another field is a folder and no code; a wrong one is refused by name."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

import millhand_plugins.orders as orders
from millhand.diagnosis import diagnose
from millhand.errors import ConfigError
from millhand.language.pack import Pack, PackSettings, find_pack, read_pack


@pytest.fixture(scope="module")
def maintenance() -> Pack:
    return find_pack(PackSettings())


@pytest.fixture
def bakery(tmp_path: Path) -> Path:
    """A small pack of another field."""
    folder = tmp_path / "bakery"
    for sub in ("prompts", "schemas", "knowledge", "eval"):
        (folder / sub).mkdir(parents=True)
    (folder / "pack.toml").write_text('title = "Bakery"\nlicence = "CC0-1.0"\nlanguages = ["de", "en"]\n')
    (folder / "terms.toml").write_text(
        '[[terms]]\nid = "oven"\nkind = "component"\ntext = { de = "Backofen", en = "oven" }\n'
        'aliases = { de = ["Ofen"] }\n'
    )
    (folder / "faults.toml").write_text(
        '[faults.cold]\ncomponent = "oven"\nsymptom = { de = "Ofen kalt" }\n'
        'causes = [{ id = "burner", component = "oven", text = { de = "Brenner aus" } }]\n'
        'steps = { de = ["Brenner ansehen."] }\n'
    )
    (folder / "guard.toml").write_text('harmless = ["stollen"]\n')
    (folder / "prompts" / "ask.de.md").write_text('Antworte: {question} als {"text": "..."}\n')
    (folder / "schemas" / "order.json").write_text('{"type": "object"}')
    (folder / "knowledge" / "ofen.md").write_text("# Ofen\nDer Brenner zündet nach 3 s.\n")
    question = {"id": "b1", "language": "de", "question": "Wann zündet er?", "candidates": ["3 s", "9 s"], "answer": 0}
    (folder / "eval" / "questions.jsonl").write_text(json.dumps(question, ensure_ascii=False) + "\n")
    return folder


def test_the_shipped_pack_speaks_both_languages_everywhere(maintenance: Pack) -> None:
    assert maintenance.manifest.languages == ("en", "zh")
    texts = [term.text for term in maintenance.terms.values()] + list(maintenance.prompts.values())
    texts += [cause.text for fault in maintenance.faults.values() for cause in fault.causes]
    texts += [fault.symptom for fault in maintenance.faults.values()]
    assert all(set(text) == {"en", "zh"} for text in texts)
    for kind, fault in maintenance.faults.items():
        assert len(fault.steps["en"]) == len(fault.steps["zh"]), kind


def test_the_shipped_pack_knows_every_kind_that_the_order_writer_knows(maintenance: Pack) -> None:
    table = tomllib.loads((Path(orders.__file__).parent / "knowledge.toml").read_text())
    assert set(table["kinds"]) <= set(maintenance.faults)


def test_questions_have_their_answer_in_the_pack(maintenance: Pack) -> None:
    names = {path.name for path in maintenance.knowledge}
    for question in maintenance.questions["questions"]:
        assert question.source in names
    answers = [question.answer for question in maintenance.questions["questions"]]
    assert max(answers.count(place) for place in range(4)) == min(answers.count(place) for place in range(4))


def test_prompts_are_filled_and_other_braces_stay(bakery: Path) -> None:
    pack = read_pack(bakery)
    assert pack.prompt("ask", question="Wann?") == 'Antworte: Wann? als {"text": "..."}'
    assert pack.prompt("ask", "en", question="{question}").startswith("Antworte: {question} als")
    with pytest.raises(ConfigError, match=r"names '\{question\}'"):
        pack.prompt("ask")
    with pytest.raises(ConfigError, match="has no prompt 'aks'; did you mean 'ask'"):
        pack.prompt("aks")


def test_another_field_is_found_by_name_and_needs_no_code(bakery: Path) -> None:
    pack = find_pack(PackSettings(name="bakery", folders=(bakery.parent,)))
    assert pack.term("oven") == "Backofen"
    assert pack.term("oven", "en") == "oven"
    assert pack.steps("cold", "en") == ("Brenner ansehen.",)
    assert [path.name for path in pack.knowledge] == ["ofen.md"]
    assert pack.schema("order") == {"type": "object"}
    assert pack.questions["questions"][0].answer == 0


def test_an_unknown_pack_is_named_with_those_that_are_there(bakery: Path) -> None:
    with pytest.raises(ConfigError, match="'maintenence' is not here; did you mean 'maintenance'") as caught:
        find_pack(PackSettings(name="maintenence", folders=(bakery.parent,)))
    assert "bakery" in caught.value.hint


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("pack.toml", 'title = "x"\nlicence = "y"\nlanguage = ["de"]\n', "'language' is not known"),
        ("pack.toml", 'title = "x"\nlicence = "y"\nlanguages = ["deu"]\n', "'deu' is not two"),
        ("terms.toml", '[[terms]]\nid = "oven"\nkind = "k"\ntext = { en = "oven" }\n', "no text in 'de'"),
        ("terms.toml", '[[terms]]\nid = "oven"\nkind = "k"\ntext = { de = "o", fr = "four" }\n', "text in 'fr'"),
        ("terms.toml", '[[terms]]\nid = "o"\nkind = "k"\ntext = { de = "o" }\n' * 2, "two terms have the id 'o'"),
        ("terms.toml", "terms = []\n", "names the term 'oven'"),
        ("guard.toml", 'harmless = "x"\n', "harmless"),
        ("schemas/order.json", "[1]", "not a JSON object"),
        ("schemas/order.json", "[" * 100_000, "not valid JSON"),
        ("prompts/ask.fr.md", "x", "NAME.LANGUAGE.md"),
        ("eval/questions.jsonl", "{}\n", "line 1"),
        ("eval/questions.jsonl", '{"id":"a","question":"q","candidates":["x","y"],"answer":2}', "names no candidate"),
    ],
)
def test_a_wrong_pack_is_refused_by_file_and_key(bakery: Path, file: str, text: str, message: str) -> None:
    (bakery / file).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_pack(bakery)


def test_files_that_are_no_text_or_too_large_are_refused(bakery: Path) -> None:
    (bakery / "prompts" / "ask.de.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"ask\.de\.md' cannot be read as UTF-8"):
        read_pack(bakery)
    (bakery / "prompts" / "ask.de.md").write_bytes(b"x" * (4 * 2**20 + 1))
    with pytest.raises(ConfigError, match="at most 4,194,304 are read"):
        read_pack(bakery)


def test_check_tells_of_a_pack_that_is_not_here(tmp_path: Path) -> None:
    path = tmp_path / "millhand.toml"
    path.write_text(f'[node]\ndata_dir = "{tmp_path}"\nrun_dir = "{tmp_path}"\n[pack]\nname = "bakery"\n')
    (found,) = (finding for finding in diagnose(path) if finding.name == "pack")
    assert (found.level, "'bakery' is not here" in found.message) == ("error", True)
