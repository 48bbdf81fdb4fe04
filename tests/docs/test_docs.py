"""Docs are checked against code: hooks, configuration keys, commands, links."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from millhand.cli import COMMANDS
from millhand.hookspecs import Hooks
from millhand.reference import markdown

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md"), *ROOT.glob("plugins/**/*.md")]
)


def test_every_hook_is_documented_and_none_is_invented() -> None:
    page = (ROOT / "docs/plugins.md").read_text()
    documented = set(re.findall(r"^\| `(millhand_\w+)`", page, re.MULTILINE))
    assert documented == {name for name in dir(Hooks) if name.startswith("millhand_")}


def test_configuration_page_is_what_the_code_says() -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    assert page == markdown(), "run: millhand config reference > docs/configuration.md"


def test_readme_names_every_command() -> None:
    page = (ROOT / "README.md").read_text()
    for command in COMMANDS:
        assert f"millhand {command}" in page, command


def test_readme_names_every_subcommand() -> None:
    page = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `millhand (\w+)(?: ([\w\\|-]+))?` \|", page, re.MULTILINE)
    named = {(group, word) for group, words in rows for word in words.split("\\|") if word}
    real = set()
    for name, (module, _) in COMMANDS.items():
        command = importlib.import_module(f"millhand.cli.{module}").command
        real |= {(name, sub) for sub in getattr(command, "commands", ())}
    assert named == real


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
