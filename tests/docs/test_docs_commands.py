"""What the pages for technicians tell to type: every command is run by a test, here or on a node."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from console_kit import Block, Command, blocks, commands, inline

from millhand.cli import COMMANDS
from millhand.config import Config
from millhand.validation import validate

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs/first-node.md", ROOT / "docs/operate.md"]
INFOS = re.compile(r"console( here)?|toml|ini")
# What a node of the test has: Debian's own tools, systemd's, and the package.
PROGRAMS = {
    "apt-get", "cat", "chown", "date", "df", "dpkg", "du", "hostname", "id", "journalctl", "ls", "millhand", "mv",
    "python3", "rm", "seq", "systemctl", "tar", "timedatectl", "uname", "usermod", "/usr/lib/millhand/bin/python",
}  # fmt: skip
SHOWN = [block for page in PAGES for block in blocks(page)]
HERE = [command for block in SHOWN if block.place == "here" for command in commands(block)]


def program(text: str) -> str:
    return shlex.split(text, comments=True)[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_of_a_kind_that_is_tested(page: Path) -> None:
    for block in blocks(page):
        assert INFOS.fullmatch(block.info), f"{page.name}:{block.line}: a block '{block.info}' is tested by nobody"
    assert not re.search(r"^(?: {4}|\t)(?![-*\d])\S", page.read_text(), re.MULTILINE), "an indented block is no block"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_one_that_a_test_runs(page: Path) -> None:
    found = [command for block in blocks(page) if block.place for command in commands(block)]
    assert found
    for command in found:
        assert program(command.text) in PROGRAMS, f"{command}: the node of the test has no such program"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_text_are_there(page: Path) -> None:
    """Inline, a command of ours must exist; one of others must be run by a block of the page as well."""
    run = [command.text for block in blocks(page) if block.place for command in commands(block)]
    for text in inline(page):
        words = text.split()
        if words[0] == "millhand" and len(words) > 1 and not words[1].startswith("-"):
            assert _exists(words[1:]), f"{page.name}: `{text}` is no command"
        elif words[0] in PROGRAMS - {"millhand"} and len(words) > 1:
            assert any(line.startswith(" ".join(words[:2])) for line in run), f"{page.name}: `{text}` is run by nobody"


def _exists(words: list[str]) -> bool:
    if words[0] not in COMMANDS:
        return False
    command = importlib.import_module(f"millhand.cli.{COMMANDS[words[0]][0]}").command
    lower = len(words) > 1 and re.fullmatch(r"[a-z-]+", words[1])
    return not (isinstance(command, click.Group) and lower) or words[1] in command.commands


@pytest.mark.parametrize(
    "block", [block for block in SHOWN if block.info == "toml"], ids=lambda b: f"{b.page}:{b.line}"
)
def test_configurations_are_valid(block: Block) -> None:
    tables = tomllib.loads("\n".join(block.text))
    if not block.file:  # files of the node's are used by its test
        validate(Config, tables, block.page)


@pytest.mark.parametrize("command", HERE, ids=str)
def test_commands_that_need_no_node(command: Command, tmp_path: Path) -> None:
    path = os.pathsep.join((os.fspath(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {
        **os.environ,
        "PATH": path,
        "MILLHAND_NODE__DATA_DIR": str(tmp_path),
        "MILLHAND_NODE__RUN_DIR": str(tmp_path),
    }
    done = subprocess.run(
        ["sh", "-c", command.text],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not command.missing(done.stdout), f"{command}: '{command.missing(done.stdout)}' did not come"
